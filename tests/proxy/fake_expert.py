"""A stand-in for an expert, for what guides, judges and falls back."""

from __future__ import annotations

import asyncio
from typing import Any

from polymath.errors import ModelNotFound, PolymathError
from polymath.proxy import Ask, Body, Events
from polymath.proxy.messages import events_of

__all__ = ["FakeExpert", "among", "answer", "request", "scored"]

Said = str | dict[str, Any] | PolymathError


class FakeExpert:
    """Stands for an expert: says the same each time, and notes what it was asked.

    Args:
        said: a text, a whole answer, or why there is none.
        delay: seconds that it takes.
    """

    def __init__(self, said: Said = "Hello.", delay: float = 0) -> None:
        self.said = said
        self.delay = delay
        self.asked: list[Body] = []
        self.cancelled = False

    async def whole(self, body: Body) -> dict[str, Any]:
        self.asked.append(body)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self.said, PolymathError):
            raise self.said
        return answer(self.said) if isinstance(self.said, str) else self.said

    async def stream(self, body: Body) -> Events:
        return events_of(await self.whole(body), body)


def among(**experts: FakeExpert) -> Ask:
    def ask(name: str) -> FakeExpert:
        if name not in experts:
            raise ModelNotFound(f"no {name}")
        return experts[name]

    return ask


def request(text: str = "What is a tort?", **more: Any) -> dict[str, Any]:
    return {"model": "x", "messages": [{"role": "user", "content": text}], **more}


def answer(content: str, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    first = {"index": 0, "message": message, "finish_reason": "stop", **choice}
    return {"id": "1", "object": "chat.completion", "model": "fake", "choices": [first]}


def scored(content: str, *logprobs: float) -> dict[str, Any]:
    """An answer with the log-probabilities of its tokens."""
    tokens = [{"token": "a", "logprob": value, "top_logprobs": []} for value in logprobs]
    return answer(content, logprobs={"content": tokens})
