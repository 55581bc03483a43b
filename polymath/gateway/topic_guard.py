"""What the gateway talks about: prompts of other domains are refused, or go to the fallback."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.gateway.keys import KeyRecord, OffTopic
from polymath.proxy import Body, Events
from polymath.router import RouteDecision

__all__ = ["Refusal", "TopicGuardSettings", "guard_of", "off_topic"]

REFUSAL = "I can only help with these topics: {domains}."


class TopicGuardSettings(BaseModel):
    """Which domains may be asked about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_domains: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Router domains; without them there is no guard."
    )
    off_topic: OffTopic = Field(
        default="refuse",
        description="What becomes of other prompts, and of those out of scope: `refuse` answers "
        "with `refusal`, `fallback` lets the router's fallback answer, `answer` only says so in "
        "the decision.",
    )
    refusal: str = Field(
        default=REFUSAL, min_length=1, description="May hold `{domains}`, the allowed ones."
    )


def guard_of(settings: TopicGuardSettings, key: KeyRecord | None) -> TopicGuardSettings:
    """The gateway's guard with what the key has in its place."""
    own = (
        {} if key is None else {"allowed_domains": key.allowed_domains, "off_topic": key.off_topic}
    )
    return settings.model_copy(update={name: value for name, value in own.items() if value})


def off_topic(guard: TopicGuardSettings, decision: RouteDecision) -> bool:
    """Whether the router found the prompt out of scope or in another domain."""
    if guard.allowed_domains is None:
        return False
    return decision.source == "fallback" or decision.domain not in guard.allowed_domains


class Refusal:
    """Answers every request with the refusal."""

    def __init__(self, guard: TopicGuardSettings) -> None:
        domains = ", ".join(guard.allowed_domains or ())
        self._text = guard.refusal.replace("{domains}", domains)

    async def whole(self, body: Body) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self._text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for index in range(_choices(body))
        ]
        return {
            **_common("chat.completion"),
            "choices": choices,
            "usage": _NO_TOKENS,
            "polymath": {"off_topic": "refuse"},
        }

    async def stream(self, body: Body) -> Events:
        return self._chunks(body)

    async def _chunks(self, body: Body) -> AsyncGenerator[dict[str, Any], None]:
        common = _common("chat.completion.chunk")
        said = {"role": "assistant", "content": self._text, "refusal": None}
        for index in range(_choices(body)):
            choice = {"index": index, "delta": said, "logprobs": None, "finish_reason": None}
            yield {**common, "choices": [choice], "polymath": {"off_topic": "refuse"}}
            yield {**common, "choices": [{**choice, "delta": {}, "finish_reason": "stop"}]}
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {**common, "choices": [], "usage": _NO_TOKENS}


_NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def _choices(body: Body) -> int:
    n = body.get("n")
    return n if isinstance(n, int) else 1


def _common(kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": "",
    }
