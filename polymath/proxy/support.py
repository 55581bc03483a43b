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
        unsure: the end of the answer, where the upstream does not tell whether it is among the
            likeliest.
    """

    log_probs: Mapping[int, float]
    unsure: int | None = None

    @property
    def missing_mass(self) -> float:
        """Probability of all other tokens."""
        return max(1.0 - sum(map(math.exp, self.log_probs.values())), 0.0)

    def with_unsure(self) -> Support:
        """The end as likely as it can be."""
        if self.unsure is None or not self.missing_mass:
            return self
        return Support({**self.log_probs, self.unsure: math.log(self.missing_mass)})

    def logits(self, vocabulary: int) -> Tensor:
        """[vocab], minus infinity outside of the support and without ids that it pads with."""
        import torch

        known = {index: value for index, value in self.log_probs.items() if index < vocabulary}
        row = torch.full((vocabulary,), -math.inf)
        row[list(known)] = torch.tensor(list(known.values()))
        return row
