"""Running completions as OpenAI's chat completion object, at once or chunk by chunk."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

from polymath.experts import Chunk, ScoredToken
from polymath.gateway.local_answers import Answer, RunningAnswer
from polymath.gateway.protocol import ChatRequest
from polymath.proxy import Events, notes_of
from polymath.router import RouteDecision

__all__ = [
    "ChatCompletion",
    "ExplainedEvents",
    "decision_headers",
    "explained",
    "noting_first_token",
]


FIRST_TOKEN: ContextVar[Callable[[], None]] = ContextVar("FIRST_TOKEN", default=lambda: None)
"""Is told of the tokens of whole answers, whose first one nobody sees otherwise."""


@contextmanager
def noting_first_token(note: Callable[[], None]) -> Iterator[None]:
    """Have `note` called at every token of an answer that the engine gives meanwhile."""
    before = FIRST_TOKEN.set(note)
    try:
        yield
    finally:
        FIRST_TOKEN.reset(before)


class ChatCompletion:
    """One answer on its way into the wire format."""

    def __init__(self, request: ChatRequest, answer: Answer) -> None:
        self._request = request
        self._answer = answer
        self._completion_tokens = 0
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": answer.expert.name,
            "system_fingerprint": _fingerprint(answer),
        }

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion` object, when the last choice is finished."""
        names = self._answer.plan.names
        choices = [_Choice(index, names) for index in range(self._request.n)]
        note = FIRST_TOKEN.get()
        async for index, chunk in _merged(self._answer.completions):
            note()
            self._completion_tokens += 1
            choices[index].add(chunk)
        body = {
            **self._common,
            "object": "chat.completion",
            "choices": [
                choice.to_dict(self._request, completion.note())
                for choice, completion in zip(choices, self._answer.completions, strict=True)
            ],
            "usage": self._usage(),
        }
        if self._request.metadata is not None:
            body["metadata"] = self._request.metadata
        return body

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The `chat.completion.chunk` objects: roles, texts, finish reasons, usage if wanted."""
        for index in range(self._request.n):
            first = {"delta": {"role": "assistant", "content": "", "refusal": None}}
            yield self._chunk(index, first)
        async for index, chunk in _merged(self._answer.completions):
            self._completion_tokens += 1
            if chunk.text or (self._wants_every_token and chunk.token):
                yield self._chunk(index, {"delta": {"content": chunk.text}}, [chunk.token])
            if chunk.finish_reason is not None:
                end: dict[str, Any] = {"delta": {}, "finish_reason": chunk.finish_reason}
                if note := self._answer.completions[index].note():
                    end["polymath"] = note
                yield self._chunk(index, end)
        if self._wants_usage:
            yield self._event([], usage=self._usage())

    @property
    def _wants_every_token(self) -> bool:
        return self._request.logprobs or self._request.polymath.attribution

    @property
    def _wants_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    def _chunk(
        self,
        index: int,
        choice: Mapping[str, Any],
        tokens: Sequence[ScoredToken | None] = (),
        **extra: Any,
    ) -> dict[str, Any]:
        scored = [token for token in tokens if token is not None]
        logprobs = _logprobs(scored) if self._request.logprobs and scored else None
        body = {"index": index, "finish_reason": None, "logprobs": logprobs, **choice}
        if self._request.polymath.attribution and scored:
            body["polymath"] = _attributions(scored, self._answer.plan.names)
        return self._event([body], **extra)

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._wants_usage else {}
        kind = {"object": "chat.completion.chunk"}
        return {**self._common, **kind, "choices": choices, **usage, **extra}

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._answer.prompt_tokens, self._completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class _Choice:
    """One choice of a whole answer, as its chunks come in."""

    def __init__(self, index: int, names: Sequence[str]) -> None:
        self._index = index
        self._names = names
        self._text: list[str] = []
        self._tokens: list[ScoredToken] = []
        self._finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        self._text.append(chunk.text)
        self._finish_reason = chunk.finish_reason
        if chunk.token is not None:
            self._tokens.append(chunk.token)

    def to_dict(self, request: ChatRequest, note: Mapping[str, Any]) -> dict[str, Any]:
        choice = {
            "index": self._index,
            "message": {"role": "assistant", "content": "".join(self._text), "refusal": None},
            "logprobs": _logprobs(self._tokens) if request.logprobs else None,
            "finish_reason": self._finish_reason,
        }
        about = dict(note)
        if request.polymath.attribution:
            about |= _attributions(self._tokens, self._names)
        return {**choice, "polymath": about} if about else choice


def explained(reply: Mapping[str, Any], decision: RouteDecision) -> dict[str, Any]:
    """An answer or chunk in the name of the expert, with the decision that led to it."""
    why = {**notes_of(reply), **decision.to_dict()}
    return {**reply, "model": decision.expert, "polymath": why}


class ExplainedEvents:
    """A stream in the name of the expert, whose first chunk has the decision."""

    def __init__(self, events: Events, decision: RouteDecision) -> None:
        self._events = events
        self._decision = decision
        self._first = True

    def __aiter__(self) -> "ExplainedEvents":
        return self

    async def __anext__(self) -> dict[str, Any]:
        chunk = await anext(self._events)
        if self._first:
            self._first = False
            return explained(chunk, self._decision)
        return {**chunk, "model": self._decision.expert}

    async def aclose(self) -> None:
        """Close the stream."""
        await self._events.aclose()


def decision_headers(decision: RouteDecision) -> dict[str, str]:
    """The headers that say who answered; characters outside ASCII are percent-encoded."""
    return {
        "x-polymath-expert": quote(decision.expert, safe="/:"),
        "x-polymath-domain": quote(decision.domain or "none", safe=" "),
        "x-polymath-confidence": f"{decision.confidence:.4f}",
        "x-polymath-source": decision.source,
    }


async def _merged(completions: Sequence[RunningAnswer]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of all completions with their index, in the order in which they come."""

    async def following(index: int) -> tuple[int, Chunk] | None:
        chunk = await anext(completions[index], None)
        return None if chunk is None else (index, chunk)

    pending = {asyncio.create_task(following(index)) for index in range(len(completions))}
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (arrived := task.result()) is not None:
                    pending.add(asyncio.create_task(following(arrived[0])))
                    yield arrived
    finally:
        for task in pending:
            task.cancel()


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "content": [
            {**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _logprob(token: ScoredToken) -> dict[str, Any]:
    return {
        "token": token.piece.decode("utf-8", "replace"),
        "logprob": token.logprob,
        "bytes": list(token.piece),
    }


def _attributions(tokens: Sequence[ScoredToken], names: Sequence[str]) -> dict[str, Any]:
    """For each token the expert that raised its probability most, and the weights of all."""
    return {
        "attribution": [
            {
                "token": token.piece.decode("utf-8", "replace"),
                "bytes": list(token.piece),
                "expert": names[token.attribution.row],
                "weights": _by_expert(names, token.attribution.weights),
            }
            for token in tokens
            if token.attribution is not None
        ]
    }


def _by_expert(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The coefficient of each expert; one that stands behind several rows has the sum of theirs."""
    totals = dict.fromkeys(names, 0.0)
    for name, weight in zip(names, weights, strict=True):
        totals[name] += weight
    return totals


def _fingerprint(answer: Answer) -> str:
    bases = dict.fromkeys(row.base_model for row in answer.plan.rows)
    return f"polymath-{'+'.join(bases)}"
