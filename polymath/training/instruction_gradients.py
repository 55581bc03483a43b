"""The gradients of conversations' instructions with respect to a base adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.artifacts import Progress
from polymath.experts import AdamMoments, Prompt, adapter_sha256, encode_prompt, open_features
from polymath.training.cluster_recipe import ClusterRecipe
from polymath.training.data import ChatRow
from polymath.training.row_gradients import row_gradients

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["InstructionGradients"]


class InstructionGradients:
    """A base model with its base adapter, for many conversations.

    Args:
        base: folder of the base adapter.
    """

    def __init__(
        self, model_folder: Path, base: Path, recipe: ClusterRecipe, progress: Progress
    ) -> None:
        self._features, self.tokenizer = open_features(
            model_folder, base, recipe.dimensions, recipe.seed, recipe.layers
        )
        self._base_sha256 = adapter_sha256(base)
        self._max_length = recipe.max_length
        self._progress = progress

    def kept(
        self, rows: Sequence[ChatRow], moments: AdamMoments | None, file: Path, stage: str
    ) -> Vectors:
        """Of training rows, [rows, dimensions], unit length; `file` has them as they come.

        Args:
            moments: to take the gradients as Adam would, or None to take them as they are.
            stage: what this is called in the progress.
        """
        return row_gradients(
            self._features,
            self._prompts(rows),
            moments,
            file,
            self._base_sha256,
            partial(self._progress, stage),
        )

    def asked(self, rows: Sequence[ChatRow]) -> Vectors:
        """Of requests, one by one, [rows, dimensions], unit length."""
        import numpy as np

        return np.concatenate([self._features.of([prompt]) for prompt in self._prompts(rows)])

    def _prompts(self, rows: Sequence[ChatRow]) -> list[Prompt]:
        return [
            encode_prompt(self.tokenizer, row.conversation()[:-1], self._max_length) for row in rows
        ]
