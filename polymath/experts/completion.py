"""The answer of one decode group, on its way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from polymath.errors import GenerationFailed, PolymathError
from polymath.experts.group import Chunk

__all__ = ["Completion"]


class Completion:
    """An async iterator of chunks, to be closed when nobody listens."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._cancel: Callable[[], None] = lambda: None
        self._over = False

    def __aiter__(self) -> Completion:
        return self

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        chunk = await self._chunks.get()
        if isinstance(chunk, Exception):
            self._over = True
            if isinstance(chunk, PolymathError):
                raise chunk
            raise GenerationFailed(f"The generation failed: {chunk}") from chunk
        self._over = chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Stop generating within one step."""
        self._cancel()

    def note(self) -> dict[str, object]:
        """There is nothing to say of how it came about."""
        return {}

    def on_close(self, cancel: Callable[[], None]) -> None:
        """Have `cancel` called when the answer is not wanted any more."""
        self._cancel = cancel

    def deliver(self, chunk: Chunk | Exception) -> None:
        """Hand over a chunk, or the exception that ends the answer; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        except RuntimeError:  # the event loop is closed: the server is gone, and the reader with it
            self.close()
