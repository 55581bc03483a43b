"""What is read from and put into chat requests and answers in OpenAI's format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from polymath.proxy.answering import Body, Events

__all__ = [
    "FirstNoted",
    "answer_text",
    "events_of",
    "last_user_text",
    "noted",
    "notes_of",
    "text_of",
    "wants_usage",
    "with_system_text",
]

SYSTEM = ("system", "developer")


def text_of(content: Any) -> str:
    """The text of a message's content, of which other parts are left out."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def last_user_text(body: Body) -> str:
    """Of a request; empty if no user speaks in it."""
    turns = [message for message in body["messages"] if message.get("role") == "user"]
    return text_of(turns[-1].get("content")) if turns else ""


def answer_text(reply: Mapping[str, Any]) -> str:
    """The text of the first choice of a whole answer."""
    choices = reply.get("choices") or [{}]
    return text_of(choices[0].get("message", {}).get("content"))


def wants_usage(body: Body) -> bool:
    """Whether the stream shall end with what was used."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


def with_system_text(body: Body, text: str) -> Body:
    """The request with a text added to its system message."""
    first, *others = body["messages"]
    if first.get("role") in SYSTEM:
        content = f"{text_of(first.get('content'))}\n\n{text}"
        return {**body, "messages": [{**first, "content": content}, *others]}
    return {**body, "messages": [{"role": "system", "content": text}, first, *others]}


def noted(reply: Mapping[str, Any], note: Mapping[str, Any]) -> dict[str, Any]:
    """An answer or chunk with more to say of how it came about."""
    return {**reply, "polymath": {**notes_of(reply), **note}}


def notes_of(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an answer or chunk says of how it came about; an upstream may have put anything here."""
    notes = reply.get("polymath")
    return notes if isinstance(notes, Mapping) else {}


class FirstNoted:
    """A stream whose first chunk has more to say."""

    def __init__(self, events: Events, note: Mapping[str, Any]) -> None:
        self._events = events
        self._note = note

    def __aiter__(self) -> FirstNoted:
        return self

    async def __anext__(self) -> dict[str, Any]:
        chunk = await anext(self._events)
        note, self._note = self._note, {}
        return noted(chunk, note) if note else chunk

    async def aclose(self) -> None:
        """Close the stream."""
        await self._events.aclose()


async def events_of(reply: Mapping[str, Any], body: Body) -> AsyncGenerator[dict[str, Any], None]:
    """A whole answer as the chunks of a stream: each choice in one chunk, its end in another."""
    common = {
        name: reply[name]
        for name in ("id", "created", "model", "system_fingerprint")
        if name in reply
    }
    common |= {"object": "chat.completion.chunk"}
    for choice in reply["choices"]:
        index, message = choice.get("index", 0), _delta(choice.get("message", {}))
        delta = {"index": index, "delta": message, "logprobs": choice.get("logprobs")}
        yield {**common, "choices": [{**delta, "finish_reason": None}]}
        end = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
        yield {**common, "choices": [{**end, "logprobs": None}]}
    if wants_usage(body):
        yield {**common, "choices": [], "usage": reply.get("usage")}


def _delta(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the only delta of a stream, whose tool calls are numbered."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
