"""`POST /v1/completions`: OpenAI's older API for text, on top of the chat API.

A prompt is the only user turn of a conversation with whoever the router chooses, as if it had come
to `/v1/chat/completions`: the experts are made for conversations, and so it is answered rather than
continued. Hence `echo` and `suffix` are refused, which only make sense for a text that goes on. Of
several prompts each is routed and answered for itself, and is a request of its own for the limits
of a key; if one fails, all do. Each choice then says under `polymath` who gave it.

The id of an answer is that of the chat completion behind it with `cmpl-` in front.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import Request
from pydantic import BeforeValidator, Field, Strict, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from polymath.errors import InvalidRequest
from polymath.gateway.batch import Arrived, entered_together
from polymath.gateway.chat_reply import (
    COUNTS,
    choices_of,
    said_text,
    scored_tokens,
    usage_of,
)
from polymath.gateway.endpoint import Shared, in_words_of, json_response
from polymath.gateway.middleware import CLIENT_CLOSED_REQUEST
from polymath.gateway.protocol import Bias, PolymathOptions, Stops, StreamOptions, Wire
from polymath.gateway.streaming import EventStream, unless_disconnected
from polymath.gateway.text_tokens import TextTokens
from polymath.proxy import Body, notes_of

__all__ = ["CompletionRequest", "create_completion"]

DEFAULT_TOKENS = 16
"""OpenAI's, of an answer whose request gives no `max_tokens`."""
ALIKE = frozenset(
    {
        "model",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "stop",
        "seed",
        "ignore_eos",
        "polymath",
        "user",
        "stream_options",
        "timeout",
    }
)
"""Fields that the chat API has under the same name."""
CHAT_FIELDS = {"messages": "prompt", "top_logprobs": "logprobs"}


def _prompts(value: Any) -> Any:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts:
        raise PydanticCustomError("prompt_type", "must be a string or a non-empty list of strings")
    if any(isinstance(prompt, int | list) for prompt in prompts):
        raise PydanticCustomError(
            "prompt_tokens", "token ids are not supported, as experts differ in theirs; give text"
        )
    return prompts


Prompts = Annotated[
    list[str],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(Wire):
    """Body of `POST /v1/completions`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"echo": (False,), "suffix": ("",)}

    model: str
    prompt: Prompts
    max_tokens: int = Field(default=DEFAULT_TOKENS, ge=1)
    n: int = Field(default=1, ge=1, le=128)
    best_of: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[Annotated[int, Strict(False), Field(ge=0)], Bias] = Field(default_factory=dict)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    ignore_eos: bool = False
    polymath: PolymathOptions | None = None
    user: str | None = None
    timeout: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise _disagreement("best_of", "must be n: no choices are made to be thrown away")
        if self.stream_options is not None and not self.stream:
            raise _disagreement("stream_options", "is only allowed when stream is true")
        return self

    def chats(self) -> list[Body]:
        """A chat request for each prompt."""
        alike = self.model_dump(include=set(ALIKE), exclude_unset=True)
        common = {**alike, "max_tokens": self.max_tokens, "stream": self.stream}
        if self.logit_bias:
            common["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        if self.logprobs is not None:
            common |= {"logprobs": True, "top_logprobs": self.logprobs}
        return [
            {**common, "messages": [{"role": "user", "content": prompt}]} for prompt in self.prompt
        ]


async def create_completion(body: CompletionRequest, request: Request, gateway: Shared) -> Response:
    """Answer prompts, whole or as a stream."""
    settings = gateway.settings
    most = settings.limits.max_choices
    if len(body.prompt) * body.n > most:
        raise InvalidRequest(
            f"prompt: {len(body.prompt)} prompts with {body.n} choices each are more than the "
            f"{most} choices that are served here.",
            param="prompt",
        )
    at_once = max(1, settings.engine.max_num_seqs // body.n)
    with in_words_of(CHAT_FIELDS):
        batch = await entered_together(gateway, body.chats(), request, at_once)
        if body.stream:
            arriving = await unless_disconnected(request.receive, batch.stream())
            if arriving is not None:
                return EventStream(_Chunks(body, arriving), batch.headers)
        else:
            replies = await unless_disconnected(request.receive, batch.wholes())
            if replies is not None:
                return json_response(_completion(body, replies), headers=batch.headers)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _completion(body: CompletionRequest, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `text_completion` object of the answers to all prompts."""
    choices = [
        _choice(choice, place * body.n + index, body, reply)
        for place, reply in enumerate(replies)
        for index, choice in choices_of(reply)
    ]
    return {
        **_common(body, replies),
        "choices": sorted(choices, key=lambda choice: int(choice["index"])),
        "usage": _sum([usage_of(reply) for reply in replies]),
    }


def _choice(
    choice: Mapping[str, Any], index: int, body: CompletionRequest, reply: Mapping[str, Any]
) -> dict[str, Any]:
    scored = scored_tokens(choice)
    logprobs = None
    if body.logprobs is not None and scored is not None:
        logprobs = TextTokens(body.logprobs).add(scored)
    own = {} if len(body.prompt) == 1 else _notes_of_one(reply)
    return {
        "index": index,
        "text": said_text(choice, "message"),
        "logprobs": logprobs,
        "finish_reason": choice.get("finish_reason"),
        **_noted({**own, **notes_of(choice)}),
    }


class _Chunks:
    """Chunks of chat answers as those of one completion, and in the end the usage if wanted."""

    def __init__(self, body: CompletionRequest, arriving: AsyncGenerator[Arrived, None]) -> None:
        self._body = body
        self._arriving = arriving
        self._alone = len(body.prompt) == 1
        self._common: dict[str, Any] = {}
        self._wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self._tells_usage = self._wants_usage
        self._usage: dict[int, Mapping[str, Any]] = {}
        self._notes: dict[int, Mapping[str, Any]] = {}
        self._tokens: dict[int, TextTokens] = {}

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> dict[str, Any]:
        async for place, chunk in self._arriving:
            if (event := self._event(place, chunk)) is not None:
                return event
        if not self._tells_usage:
            raise StopAsyncIteration
        self._tells_usage = False
        usage = [self._usage.get(place) for place in range(len(self._body.prompt))]
        return {**self._common, "choices": [], "usage": _sum(usage)}

    async def aclose(self) -> None:
        """Close the answers."""
        await self._arriving.aclose()

    def _event(self, place: int, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """None for a chunk that says nothing here."""
        if notes := notes_of(chunk):
            self._notes[place] = notes if self._alone else _notes_of_one(chunk)
        if (usage := usage_of(chunk)) is not None:
            self._usage[place] = usage
        if not self._common:
            plain = {name: value for name, value in chunk.items() if name != "polymath"}
            self._common = _common(self._body, [plain] if self._alone else [])
        spoken = [self._choice(place, index, choice) for index, choice in choices_of(chunk)]
        choices = [choice for choice in spoken if choice is not None]
        if not choices:
            return None
        unknown = {"usage": None} if self._wants_usage else {}
        notes = self._notes.pop(place, {})
        if not self._alone:
            choices[0] |= _noted({**notes, **notes_of(choices[0])})
            notes = {}
        return {**self._common, "choices": choices, **unknown, **_noted(notes)}

    def _choice(
        self, place: int, own_index: int, choice: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        index = place * self._body.n + own_index
        text, scored = said_text(choice, "delta"), scored_tokens(choice)
        logprobs = None
        if self._body.logprobs is not None and scored:
            tokens = self._tokens.setdefault(index, TextTokens(self._body.logprobs))
            logprobs = tokens.add(scored)
        ended, notes = choice.get("finish_reason"), notes_of(choice)
        if not (text or logprobs or ended or notes or place in self._notes):
            return None
        said = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": ended}
        return {**said, **_noted(notes)}


def _common(body: CompletionRequest, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an answer says of itself; of several who answered, those who are called alike."""
    names = {str(reply.get("model")) for reply in replies}
    common: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": names.pop() if len(names) == 1 else body.model,
    }
    if len(body.prompt) > 1:
        return common
    (reply,) = replies
    common["id"] = f"cmpl-{reply.get('id', '')}"
    kept = {name: reply[name] for name in ("created", "system_fingerprint") if name in reply}
    return {**common, **kept, **_noted(notes_of(reply))}


def _notes_of_one(reply: Mapping[str, Any]) -> dict[str, Any]:
    """How the answer to one prompt of several came about, with its id for feedback."""
    return {"id": reply.get("id"), **notes_of(reply)}


def _noted(notes: Mapping[str, Any]) -> dict[str, Any]:
    return {"polymath": dict(notes)} if notes else {}


def _sum(usages: Sequence[Mapping[str, Any] | None]) -> dict[str, int] | None:
    """Tokens of all answers; None if one does not say how many it took."""
    if None in usages:
        return None
    known = [usage for usage in usages if usage is not None]
    return {name: sum(usage[name] for usage in known) for name in COUNTS}


def _disagreement(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("disagreement", "{reason}", {"param": param, "reason": message})
