"""How many tokens to draft for one call: as many as are likely enough to be accepted."""

from __future__ import annotations

import math

__all__ = ["DraftLength"]

WORTH = 0.2
"""The last token of a draft shall be accepted once in five times: it costs a step of a small local
model, and what it may save is a call."""
ACCEPTED, REFUSED = 8, 2
"""What is believed before the first draft."""
LONGEST = 16


class DraftLength:
    """Follows the share of drafted tokens that are accepted.

    If each is accepted with probability a, the n-th of a draft counts with probability a^n, and a
    call gives (1 - a^(n + 1)) / (1 - a) tokens (Leviathan et al. 2023, equation 1).

    Args:
        fixed: does not change, if given; 0 drafts nothing.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._accepted, self._refused = ACCEPTED, REFUSED

    @property
    def tokens(self) -> int:
        """Of the next draft."""
        if self._fixed is not None:
            return self._fixed
        rate = self._accepted / (self._accepted + self._refused)
        return min(max(int(math.log(WORTH) / math.log(rate)), 1), LONGEST)

    def learn(self, drafted: int, accepted: int) -> None:
        """Note what became of a draft; behind the first token that is refused nothing is known."""
        self._accepted += accepted
        self._refused += accepted < drafted
