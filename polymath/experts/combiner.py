"""Logits of several rows to one next-token distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Combiner", "Select"]


class Combiner(Protocol):
    """How the rows of a decode group become one distribution, step by step."""

    def __call__(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Combine one step.

        Args:
            logits: [rows, vocab], unnormalised.
            state: what the last step returned; None at the first.
        Returns:
            Log-probabilities [vocab] and the state for the next step.
        """
        ...


@dataclass(frozen=True, slots=True)
class Select:
    """The distribution of one row alone."""

    row: int = 0

    def __call__(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        return logits[self.row].log_softmax(-1), state
