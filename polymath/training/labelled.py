"""Labelled prompts as a classifier takes them: targets, and how much each prompt counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polymath.errors import DataError
from polymath.training.data import OUT_OF_SCOPE, PromptRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LabelledPrompts"]

DATA_SET_CAP = 1000
"""Prompts of one data set are alike: together they count as at most so many for a domain. Rows
without a source count as they are."""


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """Prompts with their targets.

    Attributes:
        labels: the domains, by name; targets are positions in them.
        targets: [rows]; `len(labels)` stands for "none of them".
        weights: [rows], with a mean of 1; every class counts the same.
        draws: [rows], with a mean of 1; a class counts as the square root of its size. A head is
            fitted with `weights`, so that a rare class is not drowned; fine-tuning draws by this,
            so that the few prompts of a rare class are not learned by heart.
    """

    rows: Sequence[PromptRow]
    labels: tuple[str, ...]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64]
    draws: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[PromptRow]) -> LabelledPrompts:
        """Number the domains of the rows.

        Raises:
            DataError: there are fewer than two domains, or a class has a single prompt.
        """
        import numpy as np

        counts = Counter(row.domain for row in rows)
        labels = tuple(sorted(set(counts) - {OUT_OF_SCOPE}))
        if len(labels) < 2:
            raise DataError(f"a router needs prompts of at least two domains, found {list(labels)}")
        if rare := [domain for domain, count in counts.items() if count < 2]:
            raise DataError(f"a router needs at least two prompts of every domain: {rare[0]!r}")
        place = {label: index for index, label in enumerate((*labels, OUT_OF_SCOPE))}
        targets = np.array([place[row.domain] for row in rows], dtype=np.int64)
        return cls(rows, labels, targets, *_weights(rows, targets))

    @property
    def knows_none(self) -> bool:
        """Whether there are prompts of no domain."""
        return bool((self.targets == len(self.labels)).any())

    def take(self, indices: NDArray[np.int64]) -> LabelledPrompts:
        """Some of the rows, in that order, weighed anew."""
        rows = [self.rows[index] for index in indices]
        targets = self.targets[indices]
        return LabelledPrompts(rows, self.labels, targets, *_weights(rows, targets))


def _weights(
    rows: Sequence[PromptRow], targets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    sizes = Counter((row.domain, row.family) for row in rows)
    weights: NDArray[np.float64] = np.array(
        [
            min(1.0, DATA_SET_CAP / sizes[row.domain, row.family]) if row.source else 1.0
            for row in rows
        ]
    )
    draws = weights.copy()
    for target in np.unique(targets):
        members = targets == target
        size = weights[members].sum()
        weights[members] /= size
        draws[members] /= np.sqrt(size)
    return weights / weights.mean(), draws / draws.mean()
