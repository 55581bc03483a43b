"""A row that is fed from outside and tells what it would have said after each token.

Speculation (Leviathan et al. 2023) needs logits of a whole block, and has to take back what was
refused. Such a row joins the running batch like a decode group, but samples nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polymath.errors import GenerationFailed, PolymathError
from polymath.experts.adapter_bank import KnownAdapter
from polymath.experts.group import Row
from polymath.experts.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ScoredRow"]


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens to be fed after the last `cut` ones are taken back."""

    tokens: tuple[int, ...]
    cut: int
    scored: asyncio.Future[Tensor]


class ScoredRow:
    """One row; to be used from the event loop that opened it, a block at a time.

    Args:
        wake: tells the engine that there is work.
    """

    def __init__(
        self,
        row: Row,
        adapter: KnownAdapter | None,
        max_tokens: int,
        wake: Callable[[], None],
    ) -> None:
        self._sequence = _CollectingSequence(row, adapter, max_tokens)
        self.rows: list[Sequence] = [self._sequence]
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._block: Block | None = None
        self._error: Exception | None = None
        self._begun = False

    async def extend(self, tokens: Iterable[int], cut: int = 0) -> Tensor:
        """Logits after each of some tokens, [tokens, vocab].

        The first block must be empty: its only logits are those after the prompt.

        Args:
            cut: so many tokens of the answer are taken back first.
        Raises:
            PolymathError: the row failed, or is closed.
        """
        if self._error is not None:
            raise self._error
        block = Block(tuple(tokens), cut, self._loop.create_future())
        self._block = block
        self._wake()
        return await block.scored

    def close(self) -> None:
        """Give the row's place away."""
        self.over = True
        self._error = self._error or GenerationFailed("The generation failed: the row is closed.")
        if self._block is not None:
            self._block.scored.cancel()
        self._wake()

    @property
    def longest(self) -> int:
        """Tokens of cache that the row may need."""
        return self._sequence.longest

    @property
    def ready(self) -> bool:
        """Whether there is something to compute."""
        return self._block is not None

    def hungry(self) -> list[Sequence]:
        """The row, while it has tokens to be fed."""
        if self._block is not None and not self._begun:
            self._sequence.edit(self._block.tokens, self._block.cut)
            self._begun = True
        return self.rows if self._block is not None and self._sequence.pending else []

    def step(self) -> Tensor:
        """The logits of a block that has been fed."""
        return self._sequence.collected()

    def deliver(self, result: Tensor | Exception) -> None:
        """Hand over the logits, or the exception that ends the row; from any thread."""
        block, self._block, self._begun = self._block, None, False
        if block is not None:
            try:
                self._loop.call_soon_threadsafe(_settle, block.scored, result)
            except RuntimeError:  # the event loop is closed: the server is gone, the reader with it
                self.over = True

    def fail(self, error: Exception) -> None:
        """End the row with an error."""
        self.over = True
        known = isinstance(error, PolymathError)
        self._error = error if known else GenerationFailed(f"The generation failed: {error}")
        self.deliver(self._error)


class _CollectingSequence(Sequence):
    """A sequence that keeps the logits of a block."""

    def __init__(self, row: Row, adapter: KnownAdapter | None, max_tokens: int) -> None:
        super().__init__(row, adapter, max_tokens)
        self._kept: list[Tensor] = []

    @property
    def lags(self) -> bool:
        """Whether the logits after each of several tokens are wanted: past the prompt."""
        return self.cached >= self.prompt_tokens and self.pending > 1

    def edit(self, tokens: tuple[int, ...], cut: int) -> None:
        """Take tokens of the answer back and add others."""
        length = max(len(self.tokens) - cut, self.prompt_tokens)
        self.tokens = [*self.tokens[:length], *tokens]
        self.cached = min(self.cached, length)

    def take(self, count: int, logits: Tensor) -> None:
        past_prompt = self.cached >= self.prompt_tokens
        self.cached += count
        self.logits = logits[-1]
        if past_prompt or not self.pending:
            self._kept.append(logits)

    def collected(self) -> Tensor:
        """[tokens of the block, vocab]"""
        import torch

        kept, self._kept = self._kept, []
        return torch.cat(kept)


def _settle(scored: asyncio.Future[Tensor], result: Tensor | Exception) -> None:
    if scored.done():
        return
    if isinstance(result, Exception):
        scored.set_exception(result)
    else:
        scored.set_result(result)
