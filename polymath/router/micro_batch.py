"""Concurrent encodings as one batch, without waiting for company.

Whoever comes first encodes at once. Those who come while the encoder is busy queue up; the next of
them to get hold of it encodes the whole queue (leader and followers). So a lone request is never
delayed, and the batches grow with the load.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Encoder", "MicroBatcher"]

MAX_BATCH = 16
CACHED_VECTORS = 4096
LONGEST_CACHED = 2048
"""Characters; longer texts are encoded again, so that the cache stays small."""


class Encoder(Protocol):
    """Texts to vectors of two halves (`polymath.router.encoder.halves`)."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, dimensions]"""
        ...


class _Pending:
    __slots__ = ("error", "text", "vector")

    def __init__(self, text: str) -> None:
        self.text = text
        self.vector: NDArray[np.float32] | None = None
        self.error: Exception | None = None


class MicroBatcher:
    """Encodes texts for many threads; remembers vectors of late, as conversations repeat turns."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._busy = threading.Lock()
        self._queue: deque[_Pending] = deque()
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._cache_lock = threading.Lock()

    def vectors(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """The vector of each text, [dimensions]."""
        found = [self._remembered(text) for text in texts]
        pending = {
            text: _Pending(text)
            for text, vector in zip(texts, found, strict=True)
            if vector is None
        }
        self._encode(list(pending.values()))
        return [
            vector if vector is not None else self._result(pending[text])
            for text, vector in zip(texts, found, strict=True)
        ]

    def _encode(self, pending: list[_Pending]) -> None:
        self._queue.extend(pending)
        while any(item.vector is None and item.error is None for item in pending):
            with self._busy:
                if batch := self._next_batch():
                    self._run(batch)

    def _next_batch(self) -> list[_Pending]:
        size = min(MAX_BATCH, len(self._queue))
        return [self._queue.popleft() for _ in range(size)]

    def _run(self, batch: list[_Pending]) -> None:
        try:
            vectors = self._encoder.encode([item.text for item in batch])
            for item, vector in zip(batch, vectors, strict=True):
                item.vector = vector
        except Exception as error:  # noqa: BLE001 - raised again in the thread of each request
            for item in batch:
                item.error = error

    def _result(self, item: _Pending) -> NDArray[np.float32]:
        if item.error is not None:
            raise item.error
        assert item.vector is not None
        self._remember(item.text, item.vector)
        return item.vector

    def _remembered(self, text: str) -> NDArray[np.float32] | None:
        with self._cache_lock:
            vector = self._cache.get(text)
            if vector is not None:
                self._cache.move_to_end(text)
            return vector

    def _remember(self, text: str, vector: NDArray[np.float32]) -> None:
        if len(text) > LONGEST_CACHED:
            return
        with self._cache_lock:
            self._cache[text] = vector
            if len(self._cache) > CACHED_VECTORS:
                self._cache.popitem(last=False)
