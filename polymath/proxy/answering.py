"""Whoever answers a chat request in OpenAI's format, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

__all__ = ["Answering", "Ask", "Body", "Events"]

Body = Mapping[str, Any]
"""The JSON object of a request to `/v1/chat/completions`."""


class Events(Protocol):
    """Chunks of a streamed answer that has begun; to be closed, however it ends."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...

    async def __anext__(self) -> dict[str, Any]: ...

    async def aclose(self) -> None:
        """Let go of what stands behind it."""
        ...


class Answering(Protocol):
    """An expert that answers by itself or through others.

    What there is to say of how it came about stands under `polymath`, in the answer or in the first
    chunk.
    """

    async def whole(self, body: Body) -> dict[str, Any]:
        """The `chat.completion` object.

        Raises:
            PolymathError: there is no answer.
        """
        ...

    async def stream(self, body: Body) -> Events:
        """The `chat.completion.chunk` objects of an answer that has begun.

        Raises:
            PolymathError: it did not begin; from the iterator, if it breaks.
        """
        ...


class Ask(Protocol):
    """Finds an expert by its name."""

    def __call__(self, name: str) -> Answering:
        """The expert.

        Raises:
            ModelNotFound: there is none.
        """
        ...
