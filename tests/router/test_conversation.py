"""The forward filter over the turns of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.router import Message
from polymath.router.conversation import Reading, belief, user_turns

DOMAINS = ("coding", "law", "math")

shares = st.floats(0.001, 1)
domain_probabilities = st.tuples(shares, shares, shares).map(
    lambda values: dict(zip(DOMAINS, (value / sum(values) for value in values), strict=True))
)
readings = st.builds(Reading, domain_probabilities, st.floats(0, 1))
conversations = st.lists(readings, min_size=1, max_size=6)
stickiness = st.floats(0, 0.99)

LAW = Reading({"coding": 0.05, "law": 0.9, "math": 0.05}, 0.0)
MATH = Reading({"coding": 0.05, "law": 0.05, "math": 0.9}, 0.0)
SILENT = Reading({"coding": 0.6, "law": 0.2, "math": 0.2}, 1.0)


def likeliest(turns: Sequence[Reading], sticky: float) -> str:
    return next(iter(belief(turns, sticky)))


def by_all_paths(turns: Sequence[Reading], sticky: float) -> dict[str, float]:
    """The posterior by its definition: the sum over every sequence of domains."""
    flat = 1 / len(DOMAINS)
    joint = dict.fromkeys(DOMAINS, 0.0)
    for path in itertools.product(DOMAINS, repeat=len(turns)):
        probability = flat
        for before, after in itertools.pairwise(path):
            probability *= sticky * (before == after) + (1 - sticky) * flat
        for domain, turn in zip(path, turns, strict=True):
            spoken = 1 - turn.out_of_scope
            probability *= turn.out_of_scope * flat + spoken * turn.domains[domain]
        joint[path[-1]] += probability
    total = sum(joint.values())
    return {domain: value / total for domain, value in joint.items()}


@given(turns=conversations)
def test_a_stickiness_of_zero_is_the_last_turn_alone(turns: list[Reading]) -> None:
    assert belief(turns, 0.0) == pytest.approx(belief(turns[-1:], 0.0))


@given(reading=domain_probabilities, sticky=stickiness)
def test_of_one_turn_that_is_in_scope_the_belief_is_its_reading(
    reading: dict[str, float], sticky: float
) -> None:
    assert belief([Reading(reading, 0.0)], sticky) == pytest.approx(reading)


@given(turn=readings, sticky=stickiness)
def test_of_one_turn_out_of_scope_counts_as_evenly_shared(turn: Reading, sticky: float) -> None:
    expected = {
        domain: turn.out_of_scope / 3 + (1 - turn.out_of_scope) * probability
        for domain, probability in turn.domains.items()
    }
    assert belief([turn], sticky) == pytest.approx(expected)


@given(turns=st.lists(readings, min_size=1, max_size=5), sticky=stickiness)
def test_the_filter_is_the_sum_over_all_paths(turns: list[Reading], sticky: float) -> None:
    assert belief(turns, sticky) == pytest.approx(by_all_paths(turns, sticky), abs=1e-9)


@given(turns=conversations, sticky=stickiness)
def test_probabilities_sum_to_one_the_likeliest_first(turns: list[Reading], sticky: float) -> None:
    probabilities = belief(turns, sticky)
    assert set(probabilities) == set(DOMAINS)
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert all(0 <= value <= 1 for value in probabilities.values())
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


@given(turns=conversations, aside=domain_probabilities, sticky=stickiness)
def test_a_silent_turn_keeps_the_order_of_the_belief(
    turns: list[Reading], aside: dict[str, float], sticky: float
) -> None:
    before = belief(turns, sticky)
    after = belief([*turns, Reading(aside, 1.0)], sticky)
    values = [after[domain] for domain in before]
    assert all(left >= right - 1e-12 for left, right in itertools.pairwise(values))


@given(turns=conversations, aside=domain_probabilities, sticky=stickiness)
def test_a_silent_turn_draws_the_belief_to_the_flat_one(
    turns: list[Reading], aside: dict[str, float], sticky: float
) -> None:
    before = belief(turns, sticky)
    after = belief([*turns, Reading(aside, 1.0)], sticky)
    expected = {domain: sticky * value + (1 - sticky) / 3 for domain, value in before.items()}
    assert after == pytest.approx(expected)


@given(turns=conversations)
def test_silent_turns_alone_say_nothing(turns: list[Reading]) -> None:
    silent = [Reading(turn.domains, 1.0) for turn in turns]
    assert list(belief(silent, 0.5).values()) == pytest.approx([1 / 3] * 3)


@given(turns=conversations, sticky=stickiness, order=st.permutations(DOMAINS))
def test_the_order_of_the_domains_does_not_matter(
    turns: list[Reading], sticky: float, order: list[str]
) -> None:
    shuffled = [
        Reading({domain: turn.domains[domain] for domain in order}, turn.out_of_scope)
        for turn in turns
    ]
    assert belief(shuffled, sticky) == pytest.approx(belief(turns, sticky))


@given(turns=conversations, sticky=stickiness)
def test_reading_the_same_turns_again_is_the_same_belief(
    turns: list[Reading], sticky: float
) -> None:
    assert list(belief(turns, sticky).items()) == list(belief(turns, sticky).items())


@pytest.mark.parametrize("sticky", [0.1, 0.3, 0.9])
def test_a_silent_turn_stays_in_the_domain(sticky: float) -> None:
    assert likeliest([LAW, SILENT], sticky) == "law"
    assert likeliest([LAW, SILENT, SILENT], sticky) == "law"


@pytest.mark.parametrize("sticky", [0.0, 0.3, 0.6])
def test_clear_evidence_wins_over_the_turns_before(sticky: float) -> None:
    assert likeliest([LAW, MATH], sticky) == "math"
    assert likeliest([LAW, LAW, LAW, MATH], sticky) == "math"


def test_a_turn_of_two_minds_follows_the_turns_before() -> None:
    torn = Reading({"coding": 0.1, "law": 0.4, "math": 0.5}, 0.0)
    assert likeliest([torn], 0.3) == "math"
    assert likeliest([LAW, torn], 0.3) == "law"
    assert likeliest([LAW, torn], 0.0) == "math"


@given(sticky=st.floats(0.01, 0.98))
def test_more_stickiness_is_more_faith_in_the_past(sticky: float) -> None:
    assert belief([LAW, SILENT], sticky + 0.01)["law"] > belief([LAW, SILENT], sticky)["law"]


def test_repeating_oneself_makes_it_surer() -> None:
    said = [belief([LAW] * times, 0.3)["law"] for times in (1, 2, 3)]
    assert said == sorted(said)
    assert said[0] < said[-1] < 1


def test_certainty_that_proves_wrong_is_no_division_by_zero() -> None:
    sure, other = Reading({"a": 1.0, "b": 0.0}, 0.0), Reading({"a": 0.0, "b": 1.0}, 0.0)
    assert belief([sure, other], 0.99) == {"b": 1.0, "a": 0.0}


def test_domains_that_a_turn_leaves_out_have_no_probability_in_it() -> None:
    """Of many domains that are known by examples, a turn names the nearest alone."""
    first, second = Reading({"a": 0.5, "b": 0.5}, 0.0), Reading({"b": 0.5, "c": 0.5}, 0.0)
    probabilities = belief([first, second], 0.5)
    assert list(probabilities) == ["b", "c", "a"]
    assert probabilities["a"] == 0
    assert sum(probabilities.values()) == pytest.approx(1.0)


def said(*turns: str) -> list[Message]:
    return [{"role": turn.split(":")[0], "content": turn.split(":", 1)[1]} for turn in turns]


@pytest.mark.parametrize(
    ("messages", "most", "expected"),
    [
        (said("user:a"), 4, ["a"]),
        (said("user:a", "assistant:x", "user:b"), 4, ["a", "b"]),
        (said("user:a", "assistant:x", "user:b"), 1, ["b"]),
        (said("user:a", "user:b", "user:c"), 2, ["b", "c"]),
        (said("system:x", "user:a", "assistant:y"), 4, ["a"]),
        (said("user:a", "user:"), 4, ["a", ""]),
        (said("system:x", "assistant:y"), 4, [""]),
        ([], 4, [""]),
    ],
)
def test_user_turns_are_the_last_user_messages_in_order(
    messages: list[Message], most: int, expected: list[str]
) -> None:
    assert user_turns(messages, most) == expected
