"""Chat answers as the objects of OpenAI's responses API: a whole response, or its events in order.

A response here has one output item, a message, with one part, its text. What a model says to refuse
is text too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from polymath.errors import PolymathError
from polymath.gateway.chat_reply import choices_of, said_text, scored_tokens, usage_of
from polymath.proxy import Events, notes_of

__all__ = ["ResponseEvents", "whole_response"]

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer was cut off: finish reason of the chat API -> `incomplete_details.reason`."""
PLACE = {"output_index": 0, "content_index": 0}
TOO_MANY, CLIENT_ERRORS = 429, range(400, 500)


class Draft:
    """A response as it comes into being.

    Args:
        chat: a chat completion, or the first chunk of one.
        repeated: what is said again of the request.
    """

    def __init__(self, chat: Mapping[str, Any], repeated: Mapping[str, Any]) -> None:
        known = str(chat.get("id") or uuid.uuid4().hex)
        self.item_id = f"msg_{known}"
        self._common = {
            "id": f"resp_{known}",
            "object": "response",
            "created_at": chat.get("created") or int(time.time()),
            "model": chat.get("model"),
            **repeated,
        }
        if notes := notes_of(chat):
            self._common["polymath"] = dict(notes)
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] | None = None

    def add(self, chat: Mapping[str, Any], part: str) -> tuple[str, list[Any]]:
        """Take in the answer, or a chunk of it; what it added.

        Args:
            part: of a choice, `message` or `delta`.
        """
        self._usage = usage_of(chat) or self._usage
        text, logprobs = "", list[Any]()
        for _, choice in choices_of(chat):
            text, logprobs = said_text(choice, part), list(scored_tokens(choice) or ())
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._texts.append(text)
        self._logprobs += logprobs
        return text, logprobs

    @property
    def status(self) -> str:
        """Of a response that is over."""
        return "incomplete" if self._finish_reason in INCOMPLETE else "completed"

    def begun(self) -> dict[str, Any]:
        """The response before it has an output."""
        return self._response("in_progress", [])

    def ended(self) -> dict[str, Any]:
        """The response with all of its output."""
        return self._response(self.status, [self.item(self.status)])

    def failed(self, error: PolymathError) -> dict[str, Any]:
        """The response with what there was of it."""
        output = [self.item("incomplete")] if any(self._texts) else []
        return {
            **self._response("failed", output),
            "error": {"code": _code(error), "message": error.message},
        }

    def item(self, status: str) -> dict[str, Any]:
        """The output item; as long as it is in progress it has no part."""
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self.part()],
        }

    def part(self) -> dict[str, Any]:
        """The text, as far as it has come."""
        text = "".join(self._texts)
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        reason = INCOMPLETE.get(self._finish_reason or "") if status == "incomplete" else None
        over = status in ("completed", "incomplete")
        return {
            **self._common,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            "usage": _usage(self._usage) if over and self._usage else None,
        }


def whole_response(reply: Mapping[str, Any], repeated: Mapping[str, Any]) -> dict[str, Any]:
    """The `response` object of a chat completion."""
    draft = Draft(reply, repeated)
    draft.add(reply, "message")
    return draft.ended()


class ResponseEvents:
    """The events of a streamed response; a failure is the last of them.

    Args:
        chunks: of the chat answer.
        expert: who answers.
    """

    def __init__(self, chunks: Events, repeated: Mapping[str, Any], expert: str) -> None:
        self._chunks = chunks
        self._repeated = repeated
        self._expert = expert
        self._sent = 0
        self._events = self._all()

    def __aiter__(self) -> ResponseEvents:
        return self

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Close the answer."""
        await self._events.aclose()
        await self._chunks.aclose()

    async def _all(self) -> AsyncGenerator[dict[str, Any], None]:
        draft: Draft | None = None
        try:
            async for chunk in self._chunks:
                if draft is None:
                    draft = Draft(chunk, self._repeated)
                    for event in self._opening(draft):
                        yield event
                delta, logprobs = draft.add(chunk, "delta")
                if delta or logprobs:
                    said = {"item_id": draft.item_id, **PLACE, "delta": delta}
                    yield self._event("output_text.delta", **said, logprobs=logprobs)
        except PolymathError as error:
            draft = draft or Draft({"model": self._expert}, self._repeated)
            yield self._event("failed", response=draft.failed(error))
            return
        draft = draft or Draft({"model": self._expert}, self._repeated)
        for event in self._closing(draft):
            yield event

    def _opening(self, draft: Draft) -> list[dict[str, Any]]:
        item = draft.item("in_progress")
        return [
            self._event("created", response=draft.begun()),
            self._event("in_progress", response=draft.begun()),
            self._event("output_item.added", output_index=0, item=item),
            self._event("content_part.added", item_id=draft.item_id, **PLACE, part=draft.part()),
        ]

    def _closing(self, draft: Draft) -> list[dict[str, Any]]:
        part = draft.part()
        said = {"item_id": draft.item_id, **PLACE}
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            self._event("output_text.done", **said, **text),
            self._event("content_part.done", **said, part=part),
            self._event("output_item.done", output_index=0, item=draft.item(draft.status)),
            self._event(draft.status, response=draft.ended()),
        ]

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        event = {"type": f"response.{name}", "sequence_number": self._sent, **fields}
        self._sent += 1
        return event


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens in the words of this API."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": _detail(usage, "prompt_tokens_details", "cached_tokens"),
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": _detail(usage, "completion_tokens_details", "reasoning_tokens")
        },
        "total_tokens": usage["total_tokens"],
    }


def _detail(usage: Mapping[str, Any], details: str, name: str) -> int:
    given = usage.get(details)
    count = given.get(name) if isinstance(given, Mapping) else None
    return count if isinstance(count, int) else 0


def _code(error: PolymathError) -> str:
    """The nearest of the codes that this API has."""
    if error.status == TOO_MANY:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.status in CLIENT_ERRORS else "server_error"
