"""`polymath train clusters`: experts found in the data by the directions in which examples pull the
weights (ELREA, Li et al., "Ensembles of Low-Rank Expert Adapters", ICLR 2025).

A base adapter learns from all data. The gradient of each example's own instruction with respect to
that adapter, as Adam would take it, is projected; the projections are clustered; one expert a
cluster goes on from the base adapter. Every step leaves its result in the folder, so that a killed
run goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from polymath.artifacts import Progress, no_progress
from polymath.errors import DataError
from polymath.experts import ADAPTER_WEIGHTS, AdamMoments, adapter_sha256
from polymath.router import (
    BASE_FOLDER,
    CLUSTERS_FILE,
    DISTILLED_FOLDER,
    ClusterArtifact,
    ClusterCard,
    cluster_weights,
    locate_encoder,
)
from polymath.training.cluster_config import write_cluster_config
from polymath.training.cluster_losses import cluster_losses
from polymath.training.cluster_recipe import TEMPERATURE, ClusterRecipe, expert_folder
from polymath.training.cluster_report import cluster_findings, write_cluster_report
from polymath.training.clustering import centroids_of, cluster
from polymath.training.data import ChatRow, fingerprint
from polymath.training.distillation import distil
from polymath.training.examples import encode_chat
from polymath.training.instruction_gradients import InstructionGradients
from polymath.training.lora import CHECKPOINT_FOLDER, Advance, LoraTrainer
from polymath.training.recipe import LoraRecipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["ClusterTraining"]

Value = TypeVar("Value")

WORK_FOLDER = ".training"
MOMENTS_FILE = "moments.safetensors"
FEATURES_FILE = "features.f16"
RAW_FEATURES_FILE = "requests.f16"


class ClusterTraining:
    """One run.

    Args:
        model_folder: Hugging Face folder of the base model; `base_model` is where it came from.
        rows: the conversations; domain labels are not asked for.
    Raises:
        DataError: fewer rows than clusters have an answer, or `out` holds something else.
        ModelSourceError: there is no encoder.
    """

    def __init__(
        self,
        model_folder: Path,
        base_model: str,
        rows: Sequence[ChatRow],
        recipe: ClusterRecipe,
        out: Path,
        progress: Progress = no_progress,
    ) -> None:
        locate_encoder(recipe.encoder)
        self._answered = _answered(model_folder, rows, recipe.lora.max_length)
        rows = _of(rows, self._answered)
        if len(rows) < recipe.clusters:
            raise DataError(f"{recipe.clusters} clusters need as many rows, found {len(rows)}")
        self._model_folder = model_folder
        self._base_model = base_model
        self._rows = rows
        self._recipe = recipe
        self._out = out
        self._work = out / WORK_FOLDER
        self._base = out / BASE_FOLDER
        self._progress = progress
        self._fingerprint = fingerprint(rows)
        self._open_work_folder()

    def run(
        self, held_out: Sequence[ChatRow] = (), labels: Sequence[str] | None = None
    ) -> ClusterArtifact:
        """Train, measure, and write the folder.

        Args:
            held_out: conversations on which the losses are measured.
            labels: of the rows, for the report alone.
        """
        recipe = self._recipe
        vectors = self.gradients(self.train_base())
        members = cluster(vectors, recipe.clusters, recipe.algorithm, recipe.seed)
        if members.max() == 0:
            raise DataError("all conversations pull alike: there is nothing to tell apart")
        self.train_experts(members, self._out)
        artifact = self._artifact(vectors, members)
        shares = cluster_weights(self._raw(vectors), artifact.centroids, TEMPERATURE)
        texts = [_instruction(row) for row in self._rows]
        self._progress("distilling", 0, 1)
        distilled = self._out / DISTILLED_FOLDER
        agreement, embeddings = distil(
            texts, shares, artifact.card.labels, recipe.encoder, distilled, recipe.seed
        )
        self._progress("distilling", 1, 1)
        known = None if labels is None else _of(labels, self._answered)
        findings = cluster_findings(
            texts, vectors, embeddings, members, artifact.centroids, known
        ) | {"agreement": asdict(agreement)}
        losses = cluster_losses(
            self._model_folder,
            self._out,
            artifact,
            self._instructions,
            held_out,
            recipe,
            self._progress,
        )
        write_cluster_report(self._out, findings, losses, f"Clusters of {self._base_model}")
        write_cluster_config(self._out, artifact.card, recipe.top_k)
        artifact.save(self._out)
        for folder in (self._work, *self._out.glob(f"*/{CHECKPOINT_FOLDER}")):
            shutil.rmtree(folder)
        return artifact

    def _open_work_folder(self) -> None:
        key = f"{self._base_model}:{self._fingerprint}:{self._recipe.model_dump_json()}"
        file = self._work / "key"
        if file.exists() and file.read_text(encoding="utf-8") == key:
            return
        card = self._out / CLUSTERS_FILE
        old = [folder for folder in (self._base, *self._out.glob("expert-*")) if folder.exists()]
        if old and not (self._work.exists() or card.exists()):
            raise DataError(f"{old[0]} is not of clusters; choose another --out")
        self._work.mkdir(parents=True, exist_ok=True)
        card.unlink(missing_ok=True)
        for folder in (*old, self._work):
            shutil.rmtree(folder)
        self._work.mkdir()
        file.write_text(key, encoding="utf-8")

    def train_base(self) -> AdamMoments:
        """The base adapter, on all rows; gives Adam's state at its end."""
        from safetensors.torch import load_file, save_file

        file = self._work / MOMENTS_FILE
        if not (file.exists() and (self._base / ADAPTER_WEIGHTS).exists()):
            recipe = self._lora(self._recipe.base_share)
            trainer = LoraTrainer(self._model_folder, self._rows, recipe, self._base)
            trainer.train(self._advance("base adapter"))
            tensors = {
                f"{factor}.{kind}": values.contiguous()
                for factor, pair in trainer.moments.items()
                for kind, values in zip(("mean", "square"), pair, strict=True)
            }
            save_file(tensors, file)
            trainer.save()
        tensors = load_file(file)
        factors = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {
            factor: (tensors[f"{factor}.mean"], tensors[f"{factor}.square"]) for factor in factors
        }

    def gradients(self, moments: AdamMoments) -> Vectors:
        """Projected gradients of all rows' instructions, [rows, dimensions], unit length."""
        given = moments if self._recipe.preconditioned else None
        file = self._work / FEATURES_FILE
        return self._instructions.kept(self._rows, given, file, "gradient features")

    @cached_property
    def _instructions(self) -> InstructionGradients:
        """To be asked for when there is a base adapter."""
        return InstructionGradients(self._model_folder, self._base, self._recipe, self._progress)

    def _raw(self, vectors: Vectors) -> Vectors:
        """The gradients as a request would have them."""
        if not self._recipe.preconditioned:
            return vectors
        file = self._work / RAW_FEATURES_FILE
        return self._instructions.kept(self._rows, None, file, "gradients of requests")

    def train_experts(self, members: NDArray[np.int64], out: Path) -> None:
        """One expert a cluster, from the base adapter on.

        Args:
            members: cluster of each row, [rows].
        """
        for index in range(int(members.max()) + 1):
            folder = expert_folder(out, index)
            if (folder / ADAPTER_WEIGHTS).exists():
                continue
            rows = [row for row, member in zip(self._rows, members, strict=True) if member == index]
            recipe = self._lora((1 - self._recipe.base_share) * len(rows) / len(self._rows))
            trainer = LoraTrainer(self._model_folder, rows, recipe, folder, self._base)
            trainer.train(self._advance(f"expert {index}"))
            trainer.save()

    def _lora(self, share: float) -> LoraRecipe:
        lora = self._recipe.lora
        tokens = max(1, round(lora.train_tokens * share))
        return lora.model_copy(update={"train_tokens": tokens, "seed": self._recipe.seed})

    def _advance(self, stage: str) -> Advance:
        return lambda done, total, loss: self._progress(stage, done, total)

    def _artifact(self, vectors: Vectors, members: NDArray[np.int64]) -> ClusterArtifact:
        import numpy as np

        centroids = centroids_of(vectors, members)
        cosines = (vectors * centroids[members]).sum(axis=1)
        clusters = range(len(centroids))
        card = ClusterCard(
            base_model=self._base_model,
            base_sha256=adapter_sha256(self._base),
            dimensions=self._recipe.dimensions,
            projection_seed=self._recipe.seed,
            layers=self._recipe.layers,
            max_length=self._recipe.max_length,
            algorithm=self._recipe.algorithm,
            sizes=tuple(np.bincount(members).tolist()),
            similarity=tuple(round(float(cosines[members == c].mean()), 4) for c in clusters),
            data_sha256=self._fingerprint,
        )
        return ClusterArtifact(card, centroids)


def _answered(model_folder: Path, rows: Sequence[ChatRow], max_length: int) -> list[bool]:
    """Which rows have an answer within the length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [encode_chat(tokenizer, row, max_length) is not None for row in rows]


def _of(values: Sequence[Value], kept: Sequence[bool]) -> list[Value]:
    return [value for value, keep in zip(values, kept, strict=True) if keep]


def _instruction(row: ChatRow) -> str:
    """What the user asked last."""
    return next((turn.content for turn in reversed(row.messages) if turn.role == "user"), "")
