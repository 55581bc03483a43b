"""The weights of two routers, mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.router import Allowed, HybridRouter, Message, Neighbour, RouteDecision, Why

WORDS = RouteDecision(
    weights={"lawyer": 0.75, "base": 0.25},
    confidence=0.7,
    domain="law",
    source="encoder",
    why=Why({"law": 0.7, "math": 0.3}, (Neighbour("1", "Is it theft?", "law", 0.9),), 0.05),
    latency_ms=2.0,
)
PULL = RouteDecision(
    weights={"base": 0.5, "expert-1": 0.5},
    confidence=0.9,
    domain="cluster-1",
    source="gradient",
    why=Why({"cluster-1": 0.9, "cluster-0": 0.1}),
    latency_ms=40.0,
    combine="logits",
)
TURNS: list[Message] = [{"role": "user", "content": "Is it theft?"}]

distributions = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 1), min_size=1).map(
    lambda values: {name: value / sum(values.values()) for name, value in values.items()}
)


ALL = 100


class DecidedRouter:
    """Stands for a router: its decision is known beforehand."""

    def __init__(self, decision: RouteDecision) -> None:
        self.asked: list[tuple[Sequence[Message], Mapping[str, str] | None]] = []
        self._decision = decision

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        self.asked.append((messages, headers))
        return self._decision


def mixed(
    share: float, words: RouteDecision = WORDS, pull: RouteDecision = PULL, most: int = ALL
) -> RouteDecision:
    return HybridRouter(DecidedRouter(words), DecidedRouter(pull), share, most).route(TURNS)


def decided(weights: Mapping[str, float], **changes: Any) -> RouteDecision:
    return RouteDecision(weights, 0.5, None, "encoder", **changes)


@given(words=distributions, pull=distributions)
def test_a_share_of_zero_is_the_encoder(words: dict[str, float], pull: dict[str, float]) -> None:
    assert mixed(0.0, decided(words), decided(pull)).weights == pytest.approx(words)


@given(words=distributions, pull=distributions)
def test_a_share_of_one_is_the_gradient(words: dict[str, float], pull: dict[str, float]) -> None:
    assert mixed(1.0, decided(words), decided(pull)).weights == pytest.approx(pull)


def test_no_more_than_wanted_answer() -> None:
    words, pull = decided({"a": 0.5, "b": 0.3, "c": 0.2}), decided({"d": 0.9, "a": 0.1})
    found = mixed(0.5, words, pull, most=2).weights
    assert found == pytest.approx({"d": 0.45 / 0.75, "a": 0.3 / 0.75})


@given(weights=distributions, share=st.floats(0, 1))
def test_two_that_agree_are_either_of_them(weights: dict[str, float], share: float) -> None:
    both = decided(weights)
    assert mixed(share, both, both).weights == pytest.approx(weights)


def test_the_weights_are_mixed_by_the_share() -> None:
    assert mixed(0.25).weights == {"lawyer": 0.5625, "base": 0.3125, "expert-1": 0.125}


@given(words=distributions, pull=distributions, share=st.floats(0, 1))
def test_weights_are_a_distribution_over_experts_the_largest_first(
    words: dict[str, float], pull: dict[str, float], share: float
) -> None:
    weights = mixed(share, decided(words), decided(pull)).weights
    assert sum(weights.values()) == pytest.approx(1.0)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert all(weight > 0 for weight in weights.values())
    assert set(weights) <= set(words) | set(pull)


@given(words=distributions, pull=distributions, share=st.floats(0, 1))
def test_the_other_way_round_it_is_the_rest_of_the_share(
    words: dict[str, float], pull: dict[str, float], share: float
) -> None:
    one = mixed(share, decided(words), decided(pull)).weights
    other = mixed(1 - share, decided(pull), decided(words)).weights
    assert {name: one.get(name, 0.0) for name in other} == pytest.approx(dict(other), abs=1e-12)


def test_all_but_the_weights_is_what_the_encoder_says() -> None:
    decision = mixed(0.5)
    assert (decision.domain, decision.confidence, decision.source) == ("law", 0.7, "encoder")
    assert decision.why == WORDS.why
    assert decision.combine == "logits"


def test_both_take_their_time() -> None:
    assert mixed(0.5).latency_ms == 42.0


def test_both_are_asked_the_same() -> None:
    words, pull = DecidedRouter(WORDS), DecidedRouter(PULL)
    HybridRouter(words, pull, 0.5, 4).route(TURNS, {"x-team": "arts"})
    assert words.asked == pull.asked == [(TURNS, {"x-team": "arts"})]


def test_the_decisions_that_are_mixed_are_left_alone() -> None:
    mixed(0.5)
    assert WORDS.weights == {"lawyer": 0.75, "base": 0.25}
    assert PULL.weights == {"base": 0.5, "expert-1": 0.5}


def test_a_decision_is_strict_json() -> None:
    decision = mixed(0.5)
    values = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert values["weights"] == decision.weights
