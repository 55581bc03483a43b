"""What the gateway talks about: prompts of other domains are refused, or go to the fallback."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.gateway.keys import KeyRecord, OffTopic
from polymath.proxy import Body, Events, FirstNoted, events_of
from polymath.router import RouteDecision

__all__ = ["Refusal", "TopicGuardSettings", "guard_of", "off_topic"]

NOTE = {"off_topic": "refuse"}
NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
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
    if key is None:
        return settings
    own = {"allowed_domains": key.allowed_domains, "off_topic": key.off_topic}
    given = {name: value for name, value in own.items() if value is not None}
    return settings.model_copy(update=given)


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
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "",
            "choices": choices,
            "usage": NO_TOKENS,
            "polymath": NOTE,
        }

    async def stream(self, body: Body) -> Events:
        return FirstNoted(events_of(await self.whole(body), body), NOTE)


def _choices(body: Body) -> int:
    n = body.get("n")
    return max(1, n) if isinstance(n, int) else 1
