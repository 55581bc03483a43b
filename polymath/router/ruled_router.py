"""Rules first: a router that asks another one only where no rule matches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from polymath.router.conversation import user_turns
from polymath.router.decision import Allowed, Message, RouteDecision, Router, Why
from polymath.router.embedder import Embedder, HasEmbedder
from polymath.router.rules import Rule, first_match

__all__ = ["RuledRouter"]


class RuledRouter:
    """Asks the rules in order, then the router.

    Args:
        owners: domain -> expert that answers it.
    """

    def __init__(self, rules: Iterable[Rule], router: Router, owners: Mapping[str, str]) -> None:
        self._rules = tuple(rules)
        self._router = router
        self._domains: dict[str, str] = {}
        for domain, expert in owners.items():
            self._domains.setdefault(expert, domain)

    @property
    def embedder(self) -> Embedder | None:
        """That of the router behind the rules."""
        return self._router.embedder if isinstance(self._router, HasEmbedder) else None

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The decision of the first rule that matches, else of the router."""
        started = time.perf_counter()
        (text,) = user_turns(messages, 1)
        rules = [rule for rule in self._rules if allowed is None or rule.expert in allowed]
        rule = first_match(rules, text, messages, headers or {})
        if rule is None:
            return self._router.route(messages, headers, allowed)
        return RouteDecision(
            weights={rule.expert: 1.0},
            confidence=1.0,
            domain=self._domains.get(rule.expert),
            source="rule",
            why=Why(rule=rule.name),
            latency_ms=(time.perf_counter() - started) * 1e3,
        )
