"""What there is to say of an answered request when it is over, and who wants to hear it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polymath.gateway.answer_cache import CacheStatus
from polymath.router import RouteDecision

__all__ = ["ANSWERED", "CANCELLED", "OFF_TOPIC", "REMOTE", "Observer", "Report"]

REMOTE = frozenset({"upstream", "guided", "cascade"})
"""Kinds of experts whose answers come from elsewhere, or may."""
ANSWERED, OFF_TOPIC, CANCELLED = "ok", "off_topic", "cancelled"
"""Outcomes of requests that did not fail; the guard has refused what is off topic."""


@dataclass(frozen=True, slots=True)
class Report:
    """One request to the experts, from the door to the bill.

    Attributes:
        id: of the completion.
        key: id of the API key, or of anybody.
        model: as it was asked for.
        expert: who answered in the end, which may be a fallback.
        kind: of that expert.
        cache: how the cache answered; None where it was not asked.
        outcome: `ok`, `off_topic`, `cancelled`, or the code of the error.
        started: seconds since 1970.
        routed, first_token, ended: seconds since `started`; None where there was none.
        cost: nanodollars.
        prompt: the conversation.
        keeps_prompt: whether the key allows to keep it.
        parent: the client's `traceparent` header (W3C Trace Context).
    """

    id: str
    request_id: str
    key: str
    model: str
    expert: str
    kind: str
    decision: RouteDecision
    cache: CacheStatus | None
    outcome: str
    stream: bool
    started: float
    routed: float
    first_token: float | None
    ended: float
    prompt_tokens: int
    completion_tokens: int
    cost: int
    prompt: Any
    keeps_prompt: bool = False
    parent: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the outcome is an error."""
        return self.outcome not in (ANSWERED, OFF_TOPIC, CANCELLED)

    def to_dict(self) -> dict[str, Any]:
        """What is shown of it, without the prompt."""
        return {
            "id": self.id,
            "request_id": self.request_id,
            "key": self.key,
            "model": self.model,
            "expert": self.expert,
            "domain": self.decision.domain,
            "confidence": self.decision.confidence,
            "source": self.decision.source,
            "weights": dict(self.decision.weights),
            "cache": self.cache,
            "outcome": self.outcome,
            "stream": self.stream,
            "created": int(self.started),
            "seconds": round(self.ended, 6),
            "first_token_seconds": self.first_token,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost / 1e9,
        }


Observer = Callable[[Report], None]
"""Must not raise, nor wait."""
