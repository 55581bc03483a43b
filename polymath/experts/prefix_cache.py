"""Keys and values of finished rows, so that the next turn prefills only what is new.

An entry belongs to (base model, adapter) and to its tokens; a lookup gives the longest common
beginning with any entry (RadixAttention, Zheng et al. 2024, with a list in place of a tree). The
budget is in tokens; the entry that was used longest ago is let go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["PrefixCache"]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    owner: Hashable
    tokens: NDArray[np.int64]
    saved: Tensor


class PrefixCache:
    """Saved prefixes under a budget.

    Args:
        max_tokens: of all entries together; 0 keeps nothing.

    Attributes:
        queried, hit: tokens of all lookups, and those of them that were found.
        tokens: of all entries.
    """

    def __init__(self, max_tokens: int) -> None:
        self.queried = self.hit = self.tokens = 0
        self.max_tokens = max_tokens
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, owner: Hashable, tokens: Sequence[int]) -> Tensor | None:
        """What is saved of the longest beginning of a prompt, its last two tokens left out.

        Two, because a network may sum a single token in another order than several; so that a
        prompt that is found gives the same bits as one that is not.

        Args:
            owner: base model and adapter.
        Returns:
            [layers, 2, heads, length, head_dim], or None.
        """
        import numpy as np

        self.queried += len(tokens)
        wanted = np.array(tokens[:-2], dtype=np.int64)
        lengths = {
            key: _common(entry.tokens, wanted)
            for key, entry in self._entries.items()
            if entry.owner == owner
        }
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or lengths[best] == 0:
            return None
        self._entries.move_to_end(best)
        self.hit += lengths[best]
        return self._entries[best].saved[:, :, :, : lengths[best]]

    def keep(self, owner: Hashable, tokens: Sequence[int], saved: Tensor) -> None:
        """Add an entry in place of those that are a beginning of it; let old ones go.

        Args:
            saved: [layers, 2, heads, length, head_dim], of all the tokens.
        """
        import numpy as np

        if not 0 < len(tokens) <= self.max_tokens:
            return
        entry = _Entry(owner, np.array(tokens, dtype=np.int64), saved)
        for key, other in list(self._entries.items()):
            if other.owner == owner and _common(other.tokens, entry.tokens) == len(other.tokens):
                self._drop(key)
        self._entries[id(entry)] = entry
        self.tokens += len(entry.tokens)
        while self.tokens > self.max_tokens:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.tokens -= len(self._entries.pop(key).tokens)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the longest common beginning."""
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()[0]
    return int(different[0]) if len(different) else length
