"""Who answers best in each cluster: the bare base, its adapter, the cluster's expert, or all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from polymath.artifacts import Progress
from polymath.router import BASE_FOLDER, ClusterArtifact, ClusterPolicy, cluster_weights
from polymath.training.cluster_recipe import (
    BASE_WEIGHT,
    TEMPERATURE,
    ClusterRecipe,
    expert_folder,
)
from polymath.training.data import ChatRow
from polymath.training.ensemble_loss import AdapterEnsemble
from polymath.training.examples import encode_chat, padding_id
from polymath.training.instruction_gradients import InstructionGradients

__all__ = ["cluster_losses"]


def cluster_losses(
    model_folder: Path,
    out: Path,
    artifact: ClusterArtifact,
    gradients: InstructionGradients,
    rows: Sequence[ChatRow],
    recipe: ClusterRecipe,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Cluster -> who answers -> loss a token (nats) on the held-out rows that are nearest to it.

    Args:
        out: folder of the adapters.
    """
    import numpy as np

    longest = recipe.lora.max_length
    encoded = [(row, encode_chat(gradients.tokenizer, row, longest)) for row in rows]
    kept = [(row, example) for row, example in encoded if example is not None]
    if not kept:
        return {}
    examples = [example for _, example in kept]
    labels = artifact.card.labels
    vectors = gradients.asked([row for row, _ in kept])
    shares = [
        dict(zip(labels, row.tolist(), strict=True))
        for row in cluster_weights(vectors, artifact.centroids, TEMPERATURE)
    ]
    nearest = [max(some, key=lambda label: some[label]) for some in shares]
    policy = ClusterPolicy(BASE_FOLDER, {name: name for name in labels}, BASE_WEIGHT, recipe.top_k)
    who: dict[str, list[Mapping[str | None, float]]] = {
        "base model": [{None: 1.0} for _ in kept],
        "base adapter": [{BASE_FOLDER: 1.0} for _ in kept],
        "own expert": [{label: 1.0} for label in nearest],
        "ensemble": [dict(policy.choose(some).items()) for some in shares],
    }
    folders = {label: expert_folder(out, index) for index, label in enumerate(labels)}
    ensemble = AdapterEnsemble(
        model_folder, {BASE_FOLDER: out / BASE_FOLDER, **folders}, padding_id(gradients.tokenizer)
    )
    tokens = np.array([sum(label >= 0 for label in one.labels[1:]) for one in examples])
    losses = {
        name: ensemble.losses(examples, weights, partial(progress, f"measuring {name}"))
        for name, weights in who.items()
    }
    return {
        cluster: {
            name: float(values[mine].sum() / tokens[mine].sum()) for name, values in losses.items()
        }
        for cluster in labels
        if (mine := np.array([label == cluster for label in nearest])).any()
    }
