"""Rules before whatever router: the first that matches decides, else the router does.

(What rules do to the encoder's decisions is in `test_encoder_router.py`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.router import Allowed, Message, RouteDecision, Rule, RuledRouter, RuleSettings

DECISION = RouteDecision({"base": 0.5, "expert": 0.5}, 0.9, "cluster-1", "gradient")
OWNERS = {"coding": "technician", "law": "lawyer", "math": "technician"}


class DecidedRouter:
    """Stands for a router: its decision is known beforehand."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[Message], Mapping[str, str] | None]] = []

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        self.asked.append((messages, headers))
        return DECISION


def rule(expert: str = "lawyer", **conditions: Any) -> Rule:
    return Rule(RuleSettings.model_validate({"expert": expert, **conditions}))


def said(*turns: str) -> list[Message]:
    return [{"role": "user", "content": turn} for turn in turns]


def ask(rules: Sequence[Rule], *turns: str) -> RouteDecision:
    return RuledRouter(rules, DecidedRouter(), OWNERS).route(said(*turns))


@given(text=st.text(st.characters(exclude_categories=())))
def test_without_rules_the_router_decides(text: str) -> None:
    assert ask([], text) is DECISION


def test_where_no_rule_matches_the_router_decides() -> None:
    router = DecidedRouter()
    ruled = RuledRouter([rule(keyword="law")], router, OWNERS)
    turns = said("law", "math")
    assert ruled.route(turns, {"x-team": "arts"}) is DECISION
    assert router.asked == [(turns, {"x-team": "arts"})]


def test_where_a_rule_matches_the_router_is_not_asked() -> None:
    router = DecidedRouter()
    RuledRouter([rule(keyword="law")], router, OWNERS).route(said("law"))
    assert router.asked == []


def test_a_rule_that_matches_decides_alone() -> None:
    decision = ask([rule(keyword="law", name="lawyers first")], "law")
    assert decision.weights == {"lawyer": 1.0}
    assert (decision.source, decision.confidence) == ("rule", 1.0)
    assert (decision.combine, decision.why.rule) == ("select", "lawyers first")
    assert 0 < decision.latency_ms < 10_000


@pytest.mark.parametrize(
    ("expert", "domain"), [("technician", "coding"), ("lawyer", "law"), ("poet", None)]
)
def test_the_domain_is_the_first_of_the_expert(expert: str, domain: str | None) -> None:
    assert ask([rule(expert, keyword="law")], "law").domain == domain


def test_the_first_rule_that_matches_decides() -> None:
    rules = [rule("b", keyword="math"), rule("a", keyword="law"), rule("c", keyword="law")]
    assert ask(rules, "law").expert == "a"
    assert ask(rules[::-1], "law").expert == "c"


def test_rules_may_be_given_once() -> None:
    ruled = RuledRouter(iter([rule(keyword="law")]), DecidedRouter(), OWNERS)
    assert [ruled.route(said("law")).source for _ in range(2)] == ["rule", "rule"]


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "law"}]])
def test_a_conversation_without_a_user_turn_has_no_keyword(messages: list[Message]) -> None:
    ruled = RuledRouter([rule(keyword="law")], DecidedRouter(), OWNERS)
    assert ruled.route(messages) is DECISION


def test_headers_are_enough() -> None:
    ruled = RuledRouter([rule("poet", header={"X-Team": "arts"})], DecidedRouter(), OWNERS)
    assert ruled.route([], {"x-team": "arts"}).expert == "poet"
    assert ruled.route([], {"x-team": "sales"}) is ruled.route([], None) is DECISION
