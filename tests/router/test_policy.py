"""From domain probabilities to the experts that answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polymath.router import Policy
from polymath.router.policy import Choice

OWNERS = {"coding": "technician", "law": "lawyer", "math": "technician"}
DOMAINS = ("coding", "law", "math", "poetry")
EXPERTS = {"technician", "lawyer", "generalist"}

weights = st.lists(st.floats(1e-6, 1), min_size=len(DOMAINS), max_size=len(DOMAINS))
distributions = weights.map(
    lambda values: {
        domain: value / sum(values) for domain, value in zip(DOMAINS, values, strict=True)
    }
)
policies = st.builds(
    Policy,
    st.dictionaries(st.sampled_from(DOMAINS), st.sampled_from(["technician", "lawyer"])),
    st.just("generalist"),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(2, 5),
    st.sampled_from(["select", "ensemble", "posterior"]),
)


def policy(**changes: Any) -> Policy:
    return Policy(**{"owners": OWNERS, "fallback": "generalist", **changes})


def test_a_policy_of_defaults_selects_the_owner_of_the_likeliest_domain() -> None:
    assert policy().choose({"law": 0.75, "math": 0.25}) == Choice(
        {"lawyer": 0.75, "technician": 0.25}, "encoder", "select"
    )


def test_the_domains_of_one_expert_add_up() -> None:
    """Two domains of 3/8 outweigh the likeliest one."""
    choice = policy().choose({"law": 0.4, "coding": 0.3, "math": 0.3})
    assert choice.weights == {"technician": 0.6, "lawyer": 0.4}


def test_a_domain_without_an_owner_belongs_to_the_fallback() -> None:
    choice = policy().choose({"poetry": 0.75, "law": 0.25})
    assert choice == Choice({"generalist": 0.75, "lawyer": 0.25}, "encoder")


def test_a_fallback_that_owns_a_domain_gets_the_unowned_ones_as_well() -> None:
    choice = policy(owners={"law": "generalist"}).choose({"poetry": 0.5, "law": 0.25, "math": 0.25})
    assert choice.weights == {"generalist": 1.0}


def test_an_owner_of_no_known_domain_gets_nothing() -> None:
    assert policy(owners={"cooking": "cook"}).choose({"law": 1.0}).weights == {"generalist": 1.0}


def test_weights_of_zero_are_left_out() -> None:
    assert policy().choose({"law": 1.0, "math": 0.0}).weights == {"lawyer": 1.0}


@given(policy=policies, probabilities=distributions, in_scope=st.booleans())
def test_weights_are_a_distribution_over_experts_the_largest_first(
    policy: Policy, probabilities: dict[str, float], in_scope: bool
) -> None:
    values = policy.choose(probabilities, in_scope).weights
    assert sum(values.values()) == pytest.approx(1.0)
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert all(value > 0 for value in values.values())
    assert set(values) <= EXPERTS


@given(policy=policies, probabilities=distributions)
def test_what_is_out_of_scope_goes_to_the_fallback_alone(
    policy: Policy, probabilities: dict[str, float]
) -> None:
    choice = policy.choose(probabilities, in_scope=False)
    assert choice == Choice({"generalist": 1.0}, "fallback", "select")


@given(probabilities=distributions, least=st.floats(0, 1))
def test_the_fallback_answers_exactly_below_the_minimal_confidence(
    probabilities: dict[str, float], least: float
) -> None:
    choice = policy(min_confidence=least).choose(probabilities)
    assert (choice.source == "fallback") == (max(probabilities.values()) < least)


def test_exactly_the_minimal_confidence_is_enough() -> None:
    assert policy(min_confidence=0.5).choose({"law": 0.5, "math": 0.5}).source == "encoder"


def test_the_confidence_is_that_of_a_domain_not_of_an_expert() -> None:
    """The technician has 0.6, but no domain is likely."""
    choice = policy(min_confidence=0.5).choose({"law": 0.4, "coding": 0.3, "math": 0.3})
    assert choice.source == "fallback"


@pytest.mark.parametrize("combine", ["ensemble", "posterior"])
def test_two_experts_that_are_close_answer_together(combine: Any) -> None:
    unsure = policy(combine=combine, margin=0.5)
    choice = unsure.choose({"law": 0.5, "math": 0.25, "poetry": 0.25})
    assert choice.combine == combine
    assert choice.source == "encoder"
    assert choice.weights == pytest.approx({"lawyer": 2 / 3, "technician": 1 / 3})


@pytest.mark.parametrize(
    ("lead", "together"), [(0.0, True), (0.2, True), (0.25, False), (0.5, False), (1.0, False)]
)
def test_a_lead_of_the_margin_is_enough_to_answer_alone(lead: float, together: bool) -> None:
    probabilities = {"law": (1 + lead) / 2, "math": (1 - lead) / 2}
    choice = policy(combine="ensemble", margin=0.25).choose(probabilities)
    assert (choice.combine == "ensemble") == together


def test_the_margin_is_between_experts_not_domains() -> None:
    """Coding and math are equal, but of one expert."""
    choice = policy(combine="ensemble", margin=0.5).choose({"coding": 0.5, "math": 0.5})
    assert choice == Choice({"technician": 1.0}, "encoder", "select")


@given(probabilities=distributions, top_k=st.integers(2, 5))
def test_at_most_top_k_experts_answer_together(probabilities: dict[str, float], top_k: int) -> None:
    choice = policy(combine="ensemble", margin=1.1, top_k=top_k).choose(probabilities)
    assert choice.combine == "ensemble"
    assert len(choice.weights) == min(top_k, len(EXPERTS))


@given(probabilities=distributions, margin=st.floats(0, 1))
def test_those_who_answer_together_keep_their_proportions(
    probabilities: dict[str, float], margin: float
) -> None:
    alone = policy().choose(probabilities).weights
    together = policy(combine="ensemble", margin=margin).choose(probabilities).weights
    first = next(iter(alone))
    for expert, weight in together.items():
        assert weight / together[first] == pytest.approx(alone[expert] / alone[first])


@given(probabilities=distributions, margin=st.floats(0, 1))
def test_select_never_combines(probabilities: dict[str, float], margin: float) -> None:
    choice = policy(margin=margin).choose(probabilities)
    assert choice == policy(margin=0).choose(probabilities)
    assert choice.combine == "select"


@given(probabilities=distributions, margin=st.floats(0, 1))
def test_the_expert_of_the_largest_weight_is_in_whatever_is_combined(
    probabilities: dict[str, float], margin: float
) -> None:
    alone, together = (
        policy(combine=combine, margin=margin).choose(probabilities).weights
        for combine in ("select", "ensemble")
    )
    assert next(iter(alone)) == next(iter(together))


@given(probabilities=distributions, order=st.permutations(DOMAINS))
def test_the_order_of_the_domains_does_not_matter(
    probabilities: dict[str, float], order: list[str]
) -> None:
    assume(len(set(probabilities.values())) == len(DOMAINS))
    shuffled: Mapping[str, float] = {domain: probabilities[domain] for domain in order}
    expected = policy().choose(probabilities).weights
    assert policy().choose(shuffled).weights == pytest.approx(expected)


@pytest.mark.parametrize("value", [policy(), Choice({"a": 1.0}, "encoder")])
def test_what_was_set_cannot_be_changed(value: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, next(iter(value.__slots__)), None)
