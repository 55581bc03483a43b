"""How many tokens to draft for one call: more while all are accepted, fewer when they are not."""

from __future__ import annotations

__all__ = ["DraftLength"]

FIRST = 8
LONGEST = 16


class DraftLength:
    """Two more after a block that was accepted as a whole, else one fewer.

    The same rule as in Hugging Face's assisted generation (Gante 2023).

    Args:
        fixed: does not change, if given; 0 drafts nothing.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._tokens = FIRST if fixed is None else fixed

    @property
    def tokens(self) -> int:
        """Of the next draft."""
        return self._tokens

    def learn(self, drafted: int, accepted: int) -> None:
        """Note what became of a draft."""
        if self._fixed is None:
            change = 2 if accepted == drafted else -1
            self._tokens = min(max(self._tokens + change, 1), LONGEST)
