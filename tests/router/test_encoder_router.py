"""User turns -> calibrated domain probabilities -> weights over experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from polymath.errors import RouterArtifactError
from polymath.router import (
    EncoderRouter,
    Message,
    Policy,
    Reference,
    RouteDecision,
    Router,
    RouterArtifact,
    RouterCard,
    Rule,
    RuledRouter,
    RuleSettings,
    calibrated,
)
from polymath.router.encoder_router import SHOWN_DOMAINS, TURNS

LABELS = ("coding", "law", "math", "poetry")
WORDS = (*LABELS, "chat", "chess", "cooking")
"""Of either half of the fake encoder: the labels, talk of no domain, and two not trained."""

BAR = "|"
"""Parts what the first half of a vector is of from what the second half is of."""

OWNERS = {"coding": "technician", "law": "lawyer", "math": "technician"}
FALLBACK = "generalist"
TEMPERATURE = 0.5
SHARPNESS = 3
"""Logit of a domain that a text is wholly about."""

LIMIT = 0.5
"""From this probability on a prompt is of no domain."""

FAR = 20.0
"""A logit that leaves nothing for the others."""

logits = arrays.arrays(np.float64, (3, 4), elements=st.floats(-50, 50))
temperatures = st.floats(0.05, 20)
texts = st.lists(st.sampled_from([*WORDS, "and", "😀", "\n"])).map(" ".join)
biases = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4)


class FakeEncoder:
    """Stands for the sentence encoder: one dimension a word, counting how often it is named.

    Both halves of a vector are of the whole text, unless there is a `BAR` in it.
    """

    def __init__(self, width: int = len(WORDS)) -> None:
        self.width = width
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        vectors = np.zeros((len(texts), 2, self.width), dtype=np.float32)
        for row, text in enumerate(texts):
            for half, part in enumerate((text.split(BAR) * 2)[:2]):
                counts = np.array([part.count(word) for word in WORDS[: self.width]], np.float32)
                vectors[row, half, : len(counts)] = counts / (np.linalg.norm(counts) or 1.0)
        return vectors.reshape(len(texts), -1)


def artifact(
    sharpness: float = SHARPNESS,
    bias: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    out_of_scope: float | None = None,
) -> RouterArtifact:
    """A head whose logits are `sharpness` times how much a text is about each label."""
    rows = len(LABELS) + (out_of_scope is not None)
    identity = np.eye(len(WORDS), dtype=np.float32)
    return RouterArtifact(
        card=RouterCard(
            encoder="fake",
            labels=LABELS,
            temperature=TEMPERATURE,
            out_of_scope=out_of_scope,
            data_sha256="",
            rows={},
            metrics={},
        ),
        weight=np.float32(sharpness) * identity[:rows],
        bias=np.resize(np.array([*bias, 0.0], dtype=np.float32), rows),
        vectors=identity[[3, 2, 1, 0]],
        references=tuple(
            Reference(id=f"{label}#1", text=f"about {label}", domain=label)
            for label in reversed(LABELS)
        ),
    )


def scoped(sharpness: float = FAR) -> RouterArtifact:
    """A head that knows talk of no domain."""
    return artifact(sharpness, out_of_scope=LIMIT)


def router(
    head: RouterArtifact | None = None,
    owners: Mapping[str, str] = OWNERS,
    policy: Mapping[str, Any] | None = None,
    rules: Sequence[Rule] = (),
    **options: Any,
) -> Router:
    policy_ = Policy(owners, FALLBACK, **(policy or {}))
    asked = EncoderRouter(head or artifact(), FakeEncoder(), policy_, **options)
    return RuledRouter(rules, asked, owners) if rules else asked


def said(*turns: str) -> list[Message]:
    return [{"role": "user", "content": turn} for turn in turns]


def ask(*turns: str, **options: Any) -> RouteDecision:
    return router(**options).route(said(*turns))


def rule(expert: str = "lawyer", **conditions: Any) -> Rule:
    return Rule(RuleSettings.model_validate({"expert": expert, **conditions}))


@given(values=logits)
def test_a_temperature_of_one_is_softmax(values: NDArray[np.float64]) -> None:
    softmax = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    np.testing.assert_allclose(calibrated(values, 1.0), softmax, rtol=1e-12)


@given(values=logits, temperature=temperatures)
def test_a_temperature_divides_the_logits(values: NDArray[np.float64], temperature: float) -> None:
    np.testing.assert_array_equal(
        calibrated(values, temperature), calibrated(values / temperature, 1.0)
    )


@given(values=logits, shift=st.floats(-1e3, 1e3))
def test_adding_a_constant_to_all_logits_changes_nothing(
    values: NDArray[np.float64], shift: float
) -> None:
    np.testing.assert_allclose(calibrated(values + shift, 1.0), calibrated(values, 1.0), rtol=1e-9)


@given(values=logits, temperature=temperatures)
def test_calibrated_probabilities_sum_to_one(
    values: NDArray[np.float64], temperature: float
) -> None:
    probabilities = calibrated(values, temperature)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1.0)


@given(values=logits, temperature=temperatures)
def test_no_temperature_changes_the_order(values: NDArray[np.float64], temperature: float) -> None:
    order = values.argsort(axis=-1)
    ordered = np.take_along_axis(calibrated(values, temperature), order, axis=-1)
    assert (np.diff(ordered, axis=-1) >= 0).all()


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
    assert next(iter(domains)) == "law"


def test_the_domains_of_one_expert_add_up() -> None:
    decision = ask("coding and math")
    domains = decision.why.domains
    assert decision.weights["technician"] == domains["coding"] + domains["math"]
    assert decision.expert == "technician"


def test_a_domain_without_an_expert_belongs_to_the_fallback() -> None:
    decision = ask("poetry")
    assert decision.domain == "poetry"
    assert decision.expert == FALLBACK
    assert decision.weights[FALLBACK] == decision.why.domains["poetry"]
    assert decision.source == "encoder"


def test_without_experts_everything_goes_to_the_fallback() -> None:
    assert ask("law", owners={}).weights == {FALLBACK: pytest.approx(1.0)}


@given(
    text=texts,
    bias=biases,
    owners=st.dictionaries(st.sampled_from(LABELS), st.sampled_from(["a", "b", FALLBACK])),
    min_confidence=st.floats(0, 1),
    scope=st.sampled_from([None, 0.01, 0.5]),
    sticky=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_weights_are_a_distribution_whatever_the_head_says(
    text: str,
    bias: list[float],
    owners: dict[str, str],
    min_confidence: float,
    scope: float | None,
    sticky: float,
) -> None:
    decision = ask(
        *text.split("and"),
        head=artifact(bias=bias, out_of_scope=scope),
        owners=owners,
        policy={"min_confidence": min_confidence},
        sticky=sticky,
    )
    assert sum(decision.weights.values()) == pytest.approx(1.0)
    assert all(weight >= 0 for weight in decision.weights.values())
    assert set(decision.weights) <= {"a", "b", FALLBACK}
    assert 0 <= decision.confidence <= 1
    assert sum(decision.why.domains.values()) == pytest.approx(1.0)


@given(bias=biases, min_confidence=st.floats(0, 1))
def test_the_fallback_answers_exactly_below_the_minimal_confidence(
    bias: list[float], min_confidence: float
) -> None:
    decision = ask("", head=artifact(bias=bias), policy={"min_confidence": min_confidence})
    assume(decision.confidence != min_confidence)
    assert (decision.source == "fallback") == (decision.confidence < min_confidence)


def test_the_fallback_answers_alone_and_says_what_it_replaced() -> None:
    decision = ask("coding and law", policy={"min_confidence": 0.9})
    assert decision.weights == {FALLBACK: 1.0}
    assert decision.source == "fallback"
    assert decision.domain == "coding"
    assert decision.confidence == decision.why.domains["coding"] < 0.9


def test_exactly_the_minimal_confidence_is_enough() -> None:
    """Four equal logits: each probability is 1/4 to the last bit."""
    decision = ask("law", head=artifact(sharpness=0), policy={"min_confidence": 0.25})
    assert decision.source == "encoder"


@given(text=texts, scope=st.sampled_from([None, LIMIT]), sticky=st.sampled_from([0.0, 0.5]))
def test_the_confidence_is_the_probability_of_the_likeliest_domain(
    text: str, scope: float | None, sticky: float
) -> None:
    decision = ask(*text.split("and"), head=artifact(out_of_scope=scope), sticky=sticky)
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


@pytest.mark.parametrize("sticky", [0.0, 0.5])
@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "system", "content": "law"}], [{"role": "assistant", "content": "law"}]],
)
def test_a_conversation_without_a_user_turn_is_an_empty_text(
    messages: list[Message], sticky: float
) -> None:
    assert router(sticky=sticky).route(messages).why == ask("").why


def test_a_text_that_says_nothing_goes_to_the_fallback() -> None:
    assert ask("", policy={"min_confidence": 0.4}).source == "fallback"


def test_routing_twice_decides_the_same() -> None:
    one = router()
    first, second = (one.route(said("law and math")).to_dict() for _ in range(2))
    assert first | {"latency_ms": 0} == second | {"latency_ms": 0}


def test_a_decision_says_how_long_it_took() -> None:
    assert 0 < ask("law").latency_ms < 10_000
    assert 0 < ask("law", rules=[rule(keyword="law")]).latency_ms < 10_000


def test_weights_of_zero_are_left_out() -> None:
    assert ask("law", head=artifact(3000)).weights == {"lawyer": 1.0}


@pytest.mark.parametrize("combine", ["ensemble", "posterior"])
def test_an_unsure_router_lets_two_experts_answer_together(combine: str) -> None:
    decision = ask("law and math", policy={"combine": combine, "margin": 0.2, "top_k": 2})
    assert decision.combine == combine
    assert set(decision.weights) == {"lawyer", "technician"}
    assert decision.source == "encoder"


def test_a_sure_router_lets_one_expert_answer() -> None:
    decision = ask("law", policy={"combine": "ensemble", "margin": 0.2})
    assert (decision.combine, decision.expert) == ("select", "lawyer")


def test_a_fallback_never_answers_together() -> None:
    policy = {"combine": "ensemble", "margin": 0.2, "min_confidence": 0.9}
    decision = ask("law and math", policy=policy)
    assert (decision.combine, decision.weights) == ("select", {FALLBACK: 1.0})


def test_talk_of_no_domain_goes_to_the_fallback() -> None:
    decision = ask("chat", head=scoped())
    assert decision.source == "fallback"
    assert decision.weights == {FALLBACK: 1.0}
    assert decision.why.out_of_scope == pytest.approx(1.0)
    assert decision.confidence == pytest.approx(1 / len(LABELS))


def test_a_prompt_of_a_domain_is_in_scope() -> None:
    decision = ask("law", head=scoped())
    assert (decision.source, decision.expert) == ("encoder", "lawyer")
    assert decision.why.out_of_scope == pytest.approx(0.0)
    assert decision.confidence == pytest.approx(1.0)


def test_the_probability_of_no_domain_is_the_calibrated_last_row() -> None:
    """Logits 3 for chat, 0 for the rest."""
    decision = ask("chat", head=scoped(SHARPNESS))
    assert decision.why.out_of_scope == pytest.approx(np.exp(6) / (np.exp(6) + len(LABELS)))
    assert list(decision.why.domains.values()) == pytest.approx([0.25] * 4)


def test_what_is_likely_of_no_domain_is_evenly_shared() -> None:
    """Law and chat have the logit 3/sqrt(2), the others 0; law is one of four labels."""
    decision = ask("law chat", head=scoped(SHARPNESS), out_of_scope=1.0)
    said_law = np.exp(SHARPNESS / np.sqrt(2) / TEMPERATURE)
    outside = said_law / (2 * said_law + 3)
    law = said_law / (said_law + 3)
    assert decision.why.out_of_scope == pytest.approx(outside)
    assert decision.why.domains["law"] == pytest.approx(outside / 4 + (1 - outside) * law)


def test_a_tie_by_rounding_is_not_taken_for_stickiness() -> None:
    """So near to out of scope the belief is flat in float64, though math is a little likelier."""
    almost = artifact(17.5, bias=(0.0, 0.0, 0.01, 0.0), out_of_scope=LIMIT)
    decision = ask("chat", head=almost, out_of_scope=1.0, sticky=0.5)
    assert decision.domain != "math"
    assert decision.source == "encoder"


def test_a_head_without_that_row_takes_nothing_for_out_of_scope() -> None:
    decision = ask("chat")
    assert decision.why.out_of_scope == 0.0
    assert decision.source == "encoder"


@pytest.mark.parametrize(
    ("limit", "source"), [(None, "encoder"), (0.6, "encoder"), (0.4, "fallback")]
)
def test_the_limit_of_the_config_goes_before_the_artifacts(
    limit: float | None, source: str
) -> None:
    """Of law and chat alike, the probability of no domain is a little below 1/2."""
    assert ask("law chat", head=scoped(SHARPNESS), out_of_scope=limit).source == source


def test_a_follow_up_that_says_nothing_stays_with_its_expert() -> None:
    decision = ask("law", "chat", head=scoped(), sticky=0.3)
    assert (decision.source, decision.expert, decision.domain) == ("sticky", "lawyer", "law")
    assert decision.why.out_of_scope == pytest.approx(1.0)
    assert decision.confidence == decision.why.domains["law"]


def test_without_stickiness_it_goes_to_the_fallback() -> None:
    assert ask("law", "chat", head=scoped(), sticky=0.0).source == "fallback"


@given(turns=st.lists(texts, min_size=1, max_size=4), limit=st.sampled_from([None, 0.2, 0.5]))
def test_a_stickiness_of_zero_is_the_last_turn_alone(turns: list[str], limit: float | None) -> None:
    head = artifact(out_of_scope=limit)
    whole, last = (ask(*some, head=head) for some in (turns, turns[-1:]))
    assert replace(whole, latency_ms=0) == replace(last, latency_ms=0)
    assert whole.source != "sticky"


@given(text=texts, sticky=st.floats(0.01, 0.99), limit=st.sampled_from([None, 0.2, 0.5]))
def test_the_first_turn_has_nothing_to_stick_to(
    text: str, sticky: float, limit: float | None
) -> None:
    head = artifact(out_of_scope=limit)
    alone, stuck = ask(text, head=head), ask(text, head=head, sticky=sticky)
    assert stuck.why.domains == pytest.approx(alone.why.domains)
    assert stuck.source == alone.source


def test_a_clear_change_of_subject_is_followed() -> None:
    decision = ask("law", "law", "math", head=scoped(), sticky=0.5)
    assert (decision.source, decision.domain) == ("encoder", "math")


def test_a_turn_of_two_minds_follows_the_turns_before() -> None:
    turns = ("law", "math math math law law")
    assert ask(*turns, sticky=0.0).domain == "math"
    decision = ask(*turns, sticky=0.7)
    assert (decision.domain, decision.source) == ("law", "sticky")


def test_a_turn_that_was_out_of_scope_is_no_domain_to_stay_in() -> None:
    assert ask("chat", "chat", head=scoped(), sticky=0.9).source == "fallback"


def test_a_conversation_that_is_stuck_but_unsure_goes_to_the_fallback() -> None:
    policy = {"min_confidence": 0.9}
    decision = ask("law", "chat", head=scoped(), sticky=0.3, policy=policy)
    assert (decision.source, decision.domain) == ("fallback", "law")


def test_only_the_last_turns_are_looked_back_on() -> None:
    silent = ["chat"] * TURNS
    assert ask("law", *silent[1:], head=scoped(), sticky=0.9).source == "sticky"
    assert ask("law", *silent, head=scoped(), sticky=0.9).source == "fallback"


def test_turns_of_the_assistant_say_nothing() -> None:
    spoken: list[Message] = [{"role": "assistant", "content": "law"}, *said("chat")]
    assert router(scoped(), sticky=0.9).route(spoken).source == "fallback"


def test_turns_that_were_read_before_are_not_encoded_again() -> None:
    encoder = FakeEncoder()
    asked = EncoderRouter(scoped(), encoder, Policy(OWNERS, FALLBACK), sticky=0.3)
    encoder.texts.clear()
    asked.route(said("law"))
    asked.route(said("law", "chat"))
    assert encoder.texts == ["law", "chat"]


def test_a_rule_that_matches_decides_alone() -> None:
    decision = ask("law", rules=[rule("technician", keyword="law", name="contrary")])
    assert decision.weights == {"technician": 1.0}
    assert (decision.source, decision.confidence, decision.domain) == ("rule", 1.0, "coding")
    assert decision.why.rule == "contrary"
    assert (decision.why.domains, decision.why.nearest, decision.why.out_of_scope) == ({}, (), None)


def test_a_rule_may_name_an_expert_of_no_domain() -> None:
    decision = ask("law", rules=[rule("poet", keyword="law")])
    assert (decision.weights, decision.domain) == ({"poet": 1.0}, None)


def test_a_rule_is_asked_before_the_encoder() -> None:
    encoder = FakeEncoder()
    behind = EncoderRouter(artifact(), encoder, Policy(OWNERS, FALLBACK))
    asked = RuledRouter([rule(keyword="law")], behind, OWNERS)
    encoder.texts.clear()
    asked.route(said("law"))
    assert encoder.texts == []


def test_where_no_rule_matches_the_encoder_decides() -> None:
    with_rules, without = ask("math", rules=[rule(keyword="law")]), ask("math")
    assert replace(with_rules, latency_ms=0) == replace(without, latency_ms=0)
    assert without.why.rule is None


def test_the_first_rule_that_matches_decides() -> None:
    rules = [rule("b", keyword="math"), rule("a", keyword="law"), rule("c", keyword="law")]
    assert ask("law", rules=rules).expert == "a"


def test_rules_read_the_last_user_turn() -> None:
    rules = [rule("poet", keyword="math")]
    assert ask("math", "law", rules=rules, sticky=0.3).source == "encoder"
    assert ask("law", "math", rules=rules, sticky=0.3).source == "rule"


def test_rules_read_headers_and_system_prompts() -> None:
    asked = router(
        rules=[
            rule("poet", header={"X-Team": "arts"}),
            rule("clerk", system_prompt="(?i)contracts"),
        ]
    )
    system: list[Message] = [{"role": "system", "content": "You draft contracts."}, *said("math")]
    assert asked.route(said("math"), {"x-team": "arts"}).expert == "poet"
    assert asked.route(said("math"), {"x-team": "sales"}).source == "encoder"
    assert asked.route(said("math"), None).source == "encoder"
    assert asked.route(system).expert == "clerk"
    assert asked.route(system, {"x-team": "arts"}).expert == "poet"


EXAMPLES = {"chess": ["chess", "chess chess"], "cooking": ["cooking"]}
EXAMPLE_OWNERS = {**OWNERS, "chess": "player", "cooking": "cook"}


@pytest.mark.parametrize(("text", "expert"), [("chess", "player"), ("cooking", "cook")])
def test_a_domain_is_known_by_its_examples(text: str, expert: str) -> None:
    decision = ask(text, owners=EXAMPLE_OWNERS, examples=EXAMPLES)
    assert (decision.domain, decision.expert, decision.source) == (text, expert, "encoder")
    assert decision.confidence > 0.9


@pytest.mark.parametrize("text", LABELS)
def test_trained_domains_are_still_known(text: str) -> None:
    decision = ask(text, owners=EXAMPLE_OWNERS, examples=EXAMPLES)
    assert decision.domain == text
    assert decision.confidence > 0.9


def test_examples_are_in_scope_where_the_trained_head_knows_nothing() -> None:
    """Trained on everything else as out of scope, the head alone would take chess for chat."""
    head = scoped()
    weight = head.weight.copy()
    weight[len(LABELS), WORDS.index("chess")] = FAR
    deaf = replace(head, weight=weight)
    assert ask("chess", head=deaf).source == "fallback"
    decision = ask("chess", head=deaf, owners=EXAMPLE_OWNERS, examples=EXAMPLES)
    assert (decision.source, decision.expert) == ("encoder", "player")


@given(read=texts, other=texts, limit=st.sampled_from([None, LIMIT]))
def test_the_head_reads_the_first_half_alone(read: str, other: str, limit: float | None) -> None:
    head = artifact(out_of_scope=limit)
    whole, decision = ask(read, head=head), ask(read + BAR + other, head=head)
    assert decision.weights == whole.weights
    assert decision.why.domains == whole.why.domains
    assert decision.why.out_of_scope == whole.why.out_of_scope


@given(read=texts, likeness=texts)
def test_the_nearest_prompts_are_those_of_the_second_half_alone(read: str, likeness: str) -> None:
    decision = ask(read + BAR + likeness, examples=EXAMPLES)
    assert decision.why.nearest == ask(BAR + likeness, examples=EXAMPLES).why.nearest


@pytest.mark.parametrize("read", WORDS)
def test_a_domain_is_known_by_the_second_half_of_a_prompt(read: str) -> None:
    decision = ask(f"{read}{BAR}chess", owners=EXAMPLE_OWNERS, examples=EXAMPLES)
    assert (decision.domain, decision.why.nearest[0].domain) == ("chess", "chess")
    assert decision.confidence > 0.9


@pytest.mark.parametrize("likeness", LABELS)
def test_a_domain_is_not_known_by_the_first_half_of_a_prompt(likeness: str) -> None:
    domains = ask(f"chess{BAR}{likeness}", examples=EXAMPLES).why.domains
    assert domains["chess"] < 0.1


@given(read=texts, text=texts)
def test_of_an_example_the_second_half_alone_is_remembered(read: str, text: str) -> None:
    plain, odd = (
        ask(text, examples={"chess": [prefix + "chess"], "law": [prefix + "cooking"]})
        for prefix in ("", read + BAR)
    )
    assert odd.why.domains == plain.why.domains
    similarities = [neighbour.similarity for neighbour in plain.why.nearest]
    assert [neighbour.similarity for neighbour in odd.why.nearest] == similarities


def test_an_example_is_the_nearest_to_itself_and_says_whose_it_is() -> None:
    nearest = ask("chess", examples=EXAMPLES).why.nearest[0]
    assert nearest.domain == "chess"
    assert nearest.similarity == pytest.approx(1.0)
    assert nearest.id in ("examples/chess#0", "examples/chess#1")
    assert nearest.text in EXAMPLES["chess"]


def test_examples_of_a_trained_domain_add_to_it() -> None:
    """The head knows chess from nowhere; as an example of law it is law."""
    decision = ask("chess", examples={"law": ["chess"]})
    assert decision.domain == "law"
    assert decision.confidence > 0.9
    assert set(decision.why.domains) == set(LABELS)


@given(text=texts)
def test_no_examples_change_nothing(text: str) -> None:
    without, empty = ask(text), ask(text, examples={})
    assert replace(without, latency_ms=0) == replace(empty, latency_ms=0)


@given(text=texts, examples=st.dictionaries(st.sampled_from("abcd"), st.lists(texts, min_size=1)))
def test_probabilities_sum_to_one_whatever_the_examples(
    text: str, examples: dict[str, list[str]]
) -> None:
    domains = ask(text, examples=examples).why.domains
    assert sum(domains.values()) == pytest.approx(1.0)
    assert all(0 <= value <= 1 for value in domains.values())


def test_a_decision_shows_the_likeliest_of_many_domains() -> None:
    many = {f"domain {index}": ["chess " * (index + 1) + "cooking"] for index in range(50)}
    domains = ask("chess cooking", examples=many).why.domains
    assert len(domains) == SHOWN_DOMAINS
    assert list(domains.values()) == sorted(domains.values(), reverse=True)
    assert next(iter(domains)) == "domain 0"


def test_the_nearest_prompts_are_sorted_by_similarity() -> None:
    nearest = ask("law law law math math coding").why.nearest
    similarities = [neighbour.similarity for neighbour in nearest]
    assert [neighbour.domain for neighbour in nearest] == ["law", "math", "coding"]
    assert similarities == pytest.approx(np.array([3.0, 2.0, 1.0]) / np.sqrt(14))


def test_the_prompt_itself_is_its_own_nearest() -> None:
    nearest = ask("poetry").why.nearest[0]
    assert (nearest.id, nearest.text, nearest.domain) == ("poetry#1", "about poetry", "poetry")
    assert nearest.similarity == pytest.approx(1.0)


def test_the_nearest_prompts_are_those_of_the_last_turn() -> None:
    assert ask("law", "math", sticky=0.9).why.nearest[0].domain == "math"


@pytest.mark.parametrize(("references", "expected"), [(0, 0), (1, 1), (4, 3)])
def test_at_most_three_prompts_are_shown(references: int, expected: int) -> None:
    head = artifact()
    some = replace(head, vectors=head.vectors[:references], references=head.references[:references])
    assert len(ask("law", head=some).why.nearest) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": {"min_confidence": 1.0}},
        {"rules": [rule(keyword="law")]},
        {"head": artifact(out_of_scope=LIMIT), "sticky": 0.5},
        {"examples": EXAMPLES},
        {"policy": {"combine": "posterior", "margin": 1.0}},
    ],
)
def test_a_decision_is_strict_json(options: dict[str, Any]) -> None:
    decision = ask("chat", "law and math", **options)
    values = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert values["expert"] == decision.expert
    assert values["weights"] == decision.weights
    assert values["why"]["domains"] == decision.why.domains


@pytest.mark.parametrize("width", [1, 3, 8, 14])
def test_an_encoder_whose_halves_have_another_length_is_refused(width: int) -> None:
    with pytest.raises(RouterArtifactError, match=f"7 dimensions.*gives {width};"):
        EncoderRouter(artifact(), FakeEncoder(width), Policy(OWNERS, FALLBACK))


def test_an_encoder_of_one_half_is_refused() -> None:
    class OldEncoder(FakeEncoder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return super().encode(texts)[:, : self.width]

    with pytest.raises(RouterArtifactError, match=r"7 dimensions.*gives 3;"):
        EncoderRouter(artifact(), OldEncoder(), Policy(OWNERS, FALLBACK))


def test_an_error_of_the_encoder_surfaces_and_the_next_prompt_is_routed() -> None:
    class FailingEncoder(FakeEncoder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if "fail" in texts:
                raise RuntimeError("out of memory")
            return super().encode(texts)

    asked = EncoderRouter(artifact(), FailingEncoder(), Policy(OWNERS, FALLBACK))
    with pytest.raises(RuntimeError, match="out of memory"):
        asked.route(said("fail"))
    assert asked.route(said("law")).expert == "lawyer"
