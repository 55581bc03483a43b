"""The likeliest tokens of a remote model at one position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Support"]


@dataclass(frozen=True, slots=True)
class Support:
    """The likeliest tokens at one position.

    Attributes:
        log_probs: token id -> nats.
        unsure: tokens of which it is not told whether and how likely they are among them.
    """

    log_probs: Mapping[int, float]
    unsure: frozenset[int] = frozenset()

    @property
    def missing_mass(self) -> float:
        """Probability of all other tokens."""
        return max(1.0 - sum(map(math.exp, self.log_probs.values())), 0.0)

    def with_unsure(self) -> Support:
        """The unsure ones as likely as they can be."""
        if not self.missing_mass:
            return Support(self.log_probs)
        most = math.log(self.missing_mass)
        return Support({**self.log_probs, **dict.fromkeys(self.unsure, most)})

    def sure_of(self, token: int, nats: float | None) -> Support:
        """With what was asked of one of the unsure ones; without it, if that cannot be told."""
        told = {} if nats is None else {token: nats}
        return Support({**self.log_probs, **told}, self.unsure - {token})

    def logits(self, vocabulary: int) -> Tensor:
        """[vocab], minus infinity outside of the support and without ids that it pads with."""
        import torch

        known = {index: value for index, value in self.log_probs.items() if index < vocabulary}
        row = torch.full((vocabulary,), -math.inf)
        row[list(known)] = torch.tensor(list(known.values()))
        return row
