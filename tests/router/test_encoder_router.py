"""Last user turn -> calibrated domain probabilities -> weights over experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from polymath.errors import RouterArtifactError
from polymath.router import (
    EncoderRouter,
    Message,
    Reference,
    RouteDecision,
    RouterArtifact,
    RouterCard,
    calibrated,
)

LABELS = ("coding", "law", "math", "poetry")
EXPERTS = {"coding": "technician", "law": "lawyer", "math": "technician"}
TEMPERATURE = 0.5

logits = arrays.arrays(np.float64, (3, 4), elements=st.floats(-50, 50))
temperatures = st.floats(0.05, 20)


class FakeEncoder:
    """Stands for the sentence encoder: one dimension a label, counting how often it is named."""

    def __init__(self, dimensions: int = len(LABELS)) -> None:
        self.dimensions = dimensions

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in enumerate(texts):
            for column, label in enumerate(LABELS[: self.dimensions]):
                vectors[row, column] = text.count(label)
            vectors[row] /= np.linalg.norm(vectors[row]) or 1.0
        return vectors


def artifact(
    weight: NDArray[np.float32] | None = None, bias: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
) -> RouterArtifact:
    identity = np.eye(len(LABELS), dtype=np.float32)
    return RouterArtifact(
        card=RouterCard(
            encoder="fake",
            labels=LABELS,
            temperature=TEMPERATURE,
            data_sha256="",
            rows={},
            metrics={},
        ),
        weight=3 * identity if weight is None else weight,
        bias=np.array(bias, dtype=np.float32),
        vectors=identity[[3, 2, 1, 0]],
        references=tuple(
            Reference(id=f"{label}#1", text=f"about {label}", domain=label)
            for label in reversed(LABELS)
        ),
    )


def router(
    head: RouterArtifact | None = None,
    experts: Mapping[str, str] = EXPERTS,
    min_confidence: float = 0.0,
) -> EncoderRouter:
    return EncoderRouter(head or artifact(), FakeEncoder(), experts, "generalist", min_confidence)


def ask(text: str, **how: Any) -> RouteDecision:
    return router(**how).route([{"role": "user", "content": text}])


@settings(deadline=None)
@given(values=logits)
def test_a_temperature_of_one_is_softmax(values: NDArray[np.float64]) -> None:
    softmax = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    np.testing.assert_allclose(calibrated(values, 1.0), softmax, rtol=1e-12)


@settings(deadline=None)
@given(values=logits, temperature=temperatures)
def test_a_temperature_divides_the_logits(values: NDArray[np.float64], temperature: float) -> None:
    np.testing.assert_array_equal(
        calibrated(values, temperature), calibrated(values / temperature, 1.0)
    )


@settings(deadline=None)
@given(values=logits, shift=st.floats(-1e3, 1e3))
def test_adding_a_constant_to_all_logits_changes_nothing(
    values: NDArray[np.float64], shift: float
) -> None:
    np.testing.assert_allclose(calibrated(values + shift, 1.0), calibrated(values, 1.0), rtol=1e-9)


@settings(deadline=None)
@given(values=logits, temperature=temperatures)
def test_calibrated_probabilities_sum_to_one(
    values: NDArray[np.float64], temperature: float
) -> None:
    probabilities = calibrated(values, temperature)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1.0)


@settings(deadline=None)
@given(values=logits, temperature=temperatures)
def test_no_temperature_changes_the_order(values: NDArray[np.float64], temperature: float) -> None:
    order = values.argsort(axis=-1)
    ordered = np.take_along_axis(calibrated(values, temperature), order, axis=-1)
    assert (np.diff(ordered, axis=-1) >= 0).all()


@settings(deadline=None)
@given(values=logits, temperature=temperatures)
def test_a_higher_temperature_is_never_surer(
    values: NDArray[np.float64], temperature: float
) -> None:
    cool, warm = calibrated(values, temperature), calibrated(values, 2 * temperature)
    assert (warm.max(-1) <= cool.max(-1) + 1e-12).all()


def test_huge_logits_do_not_overflow() -> None:
    probabilities = calibrated(np.array([[1e300, -1e300, 0.0]]), 1.0)
    np.testing.assert_array_equal(probabilities, [[1.0, 0.0, 0.0]])


def test_calibration_leaves_the_logits_alone() -> None:
    values = np.array([[1.0, 2.0]])
    calibrated(values, 0.5)
    np.testing.assert_array_equal(values, [[1.0, 2.0]])


def test_the_domain_probabilities_are_the_calibrated_head() -> None:
    """Logits 3, 0, 0, 0 at temperature 1/2: exp(6) against three times one."""
    domains = ask("law").why.domains
    total = np.exp(6) + 3
    assert domains == pytest.approx(
        {"coding": 1 / total, "law": np.exp(6) / total, "math": 1 / total, "poetry": 1 / total}
    )


def test_the_domains_of_one_expert_add_up() -> None:
    decision = ask("coding and math")
    domains = decision.why.domains
    assert decision.weights["technician"] == domains["coding"] + domains["math"]
    assert decision.expert == "technician"


def test_a_domain_without_an_expert_belongs_to_the_fallback() -> None:
    decision = ask("poetry")
    assert decision.domain == "poetry"
    assert decision.expert == "generalist"
    assert decision.weights["generalist"] == decision.why.domains["poetry"]
    assert decision.source == "encoder"


def test_a_fallback_that_owns_a_domain_gets_the_unmapped_ones_as_well() -> None:
    decision = ask("law", experts={**EXPERTS, "law": "generalist"})
    domains = decision.why.domains
    assert decision.weights["generalist"] == domains["law"] + domains["poetry"]


def test_without_experts_everything_goes_to_the_fallback() -> None:
    assert ask("law", experts={}).weights == {"generalist": pytest.approx(1.0)}


def test_an_expert_of_no_known_domain_gets_nothing() -> None:
    decision = ask("law", experts={**EXPERTS, "cooking": "cook"})
    assert "cook" not in decision.weights


@settings(deadline=None)
@given(
    bias=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    owners=st.dictionaries(st.sampled_from(LABELS), st.sampled_from(["a", "b", "generalist"])),
    min_confidence=st.floats(0, 1),
)
def test_weights_are_a_distribution_whatever_the_head_says(
    bias: list[float], owners: dict[str, str], min_confidence: float
) -> None:
    decision = ask("law", head=artifact(bias=bias), experts=owners, min_confidence=min_confidence)
    assert sum(decision.weights.values()) == pytest.approx(1.0)
    assert all(weight >= 0 for weight in decision.weights.values())
    assert set(decision.weights) <= {"a", "b", "generalist"}


@settings(deadline=None)
@given(bias=st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_confidence=st.floats(0, 1))
def test_the_fallback_answers_exactly_below_the_minimal_confidence(
    bias: list[float], min_confidence: float
) -> None:
    decision = ask("", head=artifact(bias=bias), min_confidence=min_confidence)
    assume(decision.confidence != min_confidence)
    assert (decision.source == "fallback") == (decision.confidence < min_confidence)


def test_the_fallback_answers_alone_and_says_what_it_replaced() -> None:
    decision = ask("coding and law", min_confidence=0.9)
    assert decision.weights == {"generalist": 1.0}
    assert decision.source == "fallback"
    assert decision.domain == "coding"
    assert decision.confidence == decision.why.domains["coding"] < 0.9


def test_exactly_the_minimal_confidence_is_enough() -> None:
    """Four equal logits: each probability is 1/4 to the last bit."""
    flat = artifact(np.zeros((4, 4), dtype=np.float32))
    assert ask("law", head=flat, min_confidence=0.25).source == "encoder"


@settings(deadline=None)
@given(text=st.lists(st.sampled_from([*LABELS, "and", "😀", "\n"])).map(" ".join))
def test_the_confidence_is_the_probability_of_the_likeliest_domain(text: str) -> None:
    decision = ask(text)
    assert decision.domain is not None
    assert decision.confidence == decision.why.domains[decision.domain]
    assert decision.confidence == max(decision.why.domains.values())


def test_the_last_user_turn_decides() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "math"},
        {"role": "user", "content": "math"},
        {"role": "assistant", "content": "math"},
        {"role": "user", "content": "law"},
        {"role": "assistant", "content": "math"},
        {"role": "system", "content": "math"},
    ]
    assert router().route(messages).why == ask("law").why


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "system", "content": "law"}], [{"role": "assistant", "content": "law"}]],
)
def test_a_conversation_without_a_user_turn_is_an_empty_text(messages: list[Message]) -> None:
    assert router().route(messages).why == ask("").why


def test_a_text_that_says_nothing_goes_to_the_fallback() -> None:
    assert ask("", min_confidence=0.4).source == "fallback"


def test_routing_twice_decides_the_same() -> None:
    first, second = ask("law and math").to_dict(), ask("law and math").to_dict()
    assert first | {"latency_ms": 0} == second | {"latency_ms": 0}


def test_a_decision_says_how_long_it_took() -> None:
    assert 0 < ask("law").latency_ms < 10_000


def test_the_nearest_prompts_are_sorted_by_similarity() -> None:
    nearest = ask("law law law math math coding").why.nearest
    similarities = [neighbour.similarity for neighbour in nearest]
    assert [neighbour.domain for neighbour in nearest] == ["law", "math", "coding"]
    assert similarities == pytest.approx(np.array([3.0, 2.0, 1.0]) / np.sqrt(14))


def test_the_prompt_itself_is_its_own_nearest() -> None:
    nearest = ask("poetry").why.nearest[0]
    assert (nearest.id, nearest.text, nearest.domain) == ("poetry#1", "about poetry", "poetry")
    assert nearest.similarity == pytest.approx(1.0)


@pytest.mark.parametrize(("references", "expected"), [(0, 0), (1, 1), (4, 3)])
def test_at_most_three_prompts_are_shown(references: int, expected: int) -> None:
    head = artifact()
    some = RouterArtifact(
        head.card, head.weight, head.bias, head.vectors[:references], head.references[:references]
    )
    assert len(ask("law", head=some).why.nearest) == expected


@pytest.mark.parametrize("min_confidence", [0.0, 1.0])
def test_a_decision_is_strict_json(min_confidence: float) -> None:
    decision = ask("law and math", min_confidence=min_confidence)
    values = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert values["expert"] == decision.expert
    assert values["weights"] == decision.weights
    assert values["why"]["domains"] == decision.why.domains


@pytest.mark.parametrize("dimensions", [1, 3])
def test_an_encoder_of_another_length_is_refused(dimensions: int) -> None:
    with pytest.raises(RouterArtifactError, match=f"4 dimensions.*gives {dimensions}"):
        EncoderRouter(artifact(), FakeEncoder(dimensions), EXPERTS, "generalist", 0.4)


def test_weights_of_zero_are_left_out() -> None:
    sure = artifact(3000 * np.eye(len(LABELS), dtype=np.float32))
    assert ask("law", head=sure).weights == {"lawyer": 1.0}
