"""Leave-one-source-out folds: how a router does on data sets that it never saw.

A fold leaves out one data set: the part of `source` before the slash. Where a domain has a single
data set, half of its sub-sources (the whole `source`) are left out instead, as the domain could not
be learned otherwise. Rows without a source are trained on in every fold.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polymath.training.data import OUT_OF_SCOPE, PromptRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SourceFold", "source_folds"]


@dataclass(frozen=True, slots=True)
class SourceFold:
    """One data set left out.

    Attributes:
        held_out: indices of its rows; training takes all others.
    """

    name: str
    held_out: tuple[int, ...]

    def kept(self, rows: int) -> NDArray[np.int64]:
        """Indices of the others, of so many rows in all."""
        import numpy as np

        return np.setdiff1d(np.arange(rows), np.array(self.held_out, dtype=np.int64))


def source_folds(rows: Sequence[PromptRow], seed: int = 0) -> list[SourceFold]:
    """A fold for each data set of which something can be left out, by name."""
    sources: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row.source and row.domain != OUT_OF_SCOPE:
            sources[row.domain][row.family].add(row.source)
    folds = []
    for name in sorted({family for families in sources.values() for family in families}):
        left_out = {
            (domain, source)
            for domain, families in sources.items()
            for source in _left_out(families, name, seed)
        }
        held_out = tuple(
            index for index, row in enumerate(rows) if (row.domain, row.source) in left_out
        )
        if held_out:
            folds.append(SourceFold(name, held_out))
    return folds


def _left_out(families: dict[str, set[str]], name: str, seed: int) -> list[str]:
    """The sources of a domain that the fold `name` leaves out."""
    sources = sorted(families.get(name, ()))
    if len(families) > 1:
        return sources
    random.Random(seed).shuffle(sources)
    return sources[: len(sources) // 2]
