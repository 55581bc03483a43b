"""The router that reads nothing: behind the rules it sends every prompt to the fallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polymath.router.decision import Allowed, Message, RouteDecision, within

__all__ = ["FallbackRouter"]


class FallbackRouter:
    """Knows one expert, and needs no model."""

    def __init__(self, fallback: str) -> None:
        self._weights = {fallback: 1.0}

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The fallback, or if that is not allowed an expert that is."""
        weights = within(self._weights, allowed)
        return RouteDecision(weights, confidence=0.0, domain=None, source="fallback")
