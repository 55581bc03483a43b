"""Who is fed in a step: every row that decodes, and a chunk of one prompt."""

from __future__ import annotations

from collections.abc import Callable

from polymath.experts.lora_model import Feed
from polymath.experts.sequence import Sequence

__all__ = ["Scheduler"]


class Scheduler:
    """Keeps prompts from stalling answers: at most `chunk` tokens of prompts are fed in a step.

    Chunks go in turn to the prompt with the least left, so that short ones are answered early, and
    to the one that came first, so that long ones are answered at all.

    Args:
        reuse: called with a row before its first token is fed; may find it cached in part.
    """

    def __init__(self, chunk: int, reuse: Callable[[Sequence], None]) -> None:
        self._chunk = chunk
        self._reuse = reuse
        self._oldest_is_next = False

    def feeds(self, hungry: list[Sequence]) -> list[Feed]:
        """What to feed of the rows that have tokens pending, the oldest of them first."""
        feeds = [Feed(row, 1, 1) for row in hungry if row.pending == 1]
        prompts = [row for row in hungry if row.pending > 1]
        if prompts:
            chosen = self._choose(prompts)
            if chosen.cached == 0:
                self._reuse(chosen)
            feeds.append(Feed(chosen, self._next_chunk(chosen.pending), chosen.pending))
        return feeds

    def _next_chunk(self, pending: int) -> int:
        """Never all but one: a network may sum a single token in another order than several."""
        count = min(pending, self._chunk)
        return count - 1 if pending - count == 1 else count

    def _choose(self, prompts: list[Sequence]) -> Sequence:
        self._oldest_is_next = not self._oldest_is_next
        if not self._oldest_is_next:
            return prompts[0]
        return min(prompts, key=lambda row: row.pending)
