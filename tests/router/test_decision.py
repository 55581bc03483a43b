"""What a router says, as values that cannot change and as JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.router import Neighbour, RouteDecision, Why

DECISION = RouteDecision(
    weights={"general": 0.25, "lawyer": 0.75},
    confidence=0.7,
    domain="law",
    source="encoder",
    why=Why({"law": 0.7, "none": 0.3}, (Neighbour("squad#1", "Is it theft?", "law", 0.9),), 0.05),
    latency_ms=1.5,
)

names = st.text(min_size=1)


def test_the_expert_is_the_one_of_the_largest_weight() -> None:
    assert DECISION.expert == "lawyer"


@given(weights=st.dictionaries(names, st.floats(0, 1), min_size=1))
def test_no_expert_outweighs_the_expert(weights: dict[str, float]) -> None:
    decision = RouteDecision(weights, 1.0, None, "explicit")
    assert weights[decision.expert] == max(weights.values())


def test_of_two_equal_experts_the_first_answers() -> None:
    assert RouteDecision({"b": 0.5, "a": 0.5}, 0.5, None, "rule").expert == "b"


def test_a_decision_in_json_says_everything_that_it_holds() -> None:
    assert json.loads(json.dumps(DECISION.to_dict())) == {
        "expert": "lawyer",
        "weights": {"general": 0.25, "lawyer": 0.75},
        "confidence": 0.7,
        "domain": "law",
        "source": "encoder",
        "why": {
            "domains": {"law": 0.7, "none": 0.3},
            "nearest": [
                {"id": "squad#1", "text": "Is it theft?", "domain": "law", "similarity": 0.9}
            ],
            "out_of_scope": 0.05,
            "rule": None,
        },
        "latency_ms": 1.5,
        "combine": "select",
    }


def test_a_decision_that_nobody_explains_has_an_empty_why() -> None:
    decision = RouteDecision({"general": 1.0}, 1.0, None, "explicit")
    assert decision.to_dict()["why"] == {
        "domains": {},
        "nearest": (),
        "out_of_scope": None,
        "rule": None,
    }


def test_experts_answer_alone_unless_it_is_said() -> None:
    assert RouteDecision({"general": 1.0}, 1.0, None, "explicit").combine == "select"


def test_a_rule_is_named_in_json() -> None:
    decision = RouteDecision({"lawyer": 1.0}, 1.0, "law", "rule", Why(rule="lawyers first"))
    assert decision.to_dict()["why"]["rule"] == "lawyers first"


def test_changing_the_json_leaves_the_decision_alone() -> None:
    values = DECISION.to_dict()
    values["weights"]["lawyer"] = 0.0
    values["why"]["domains"].clear()
    assert DECISION.weights["lawyer"] == 0.75
    assert DECISION.why.domains == {"law": 0.7, "none": 0.3}


@pytest.mark.parametrize("value", [DECISION, DECISION.why, DECISION.why.nearest[0]])
def test_what_was_decided_cannot_be_changed(value: Any) -> None:
    field = next(iter(value.__slots__))
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, None)


def test_two_explanations_do_not_share_their_domains() -> None:
    assert Why().domains is not Why().domains
