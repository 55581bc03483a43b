"""What `polymath eval router` reports, on decisions that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from polymath.router import Allowed, Message, RouteDecision, Source
from polymath.training import (
    ConversationRow,
    PromptRow,
    RoutedPrompt,
    evaluate_conversations,
    route_prompts,
    summarise_routing,
)

GENERALISTS = ("general", "fallback")


def decision(
    domain: str | None,
    confidence: float = 1.0,
    expert: str | None = None,
    source: Source = "encoder",
    latency_ms: float = 1.0,
) -> RouteDecision:
    weights = {expert or str(domain): 1.0}
    return RouteDecision(weights, confidence, domain, source, latency_ms=latency_ms)


class FakeRouter:
    """Stands for a router: the decision for a text is looked up."""

    def __init__(self, decisions: Mapping[str, RouteDecision]) -> None:
        self.decisions = decisions
        self.asked: list[Sequence[Message]] = []

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        self.asked.append(list(messages))
        return self.decisions[messages[-1]["content"]]


IN_SCOPE = {
    "theft": ("law", decision("law", 0.9, latency_ms=1)),
    "tort": ("law", decision("math", 0.6, latency_ms=2)),
    "sum": ("math", decision("math", 0.9, latency_ms=3)),
    "root": ("math", decision("math", 0.6, latency_ms=4)),
}
OUT_OF_SCOPE = {
    "weather": ("none", decision("general", 0.9, "general", latency_ms=5)),
    "alarm": ("none", decision("law", 0.2, "fallback", "fallback", latency_ms=6)),
    "song": ("none", decision("law", 0.9, "lawyer", latency_ms=7)),
    "pizza": ("none", decision("none", 0.9, "math", latency_ms=8)),
}


Cases = Mapping[str, tuple[str, RouteDecision]]


def router_of(cases: Cases) -> FakeRouter:
    return FakeRouter({text: known for text, (_, known) in cases.items()})


def evaluate(cases: Cases) -> dict[str, Any]:
    rows = [PromptRow(text=text, domain=domain) for text, (domain, _) in cases.items()]
    return summarise_routing(route_prompts(router_of(cases), rows), GENERALISTS)


def judged(source: str | None, domain: str, guess: str, kind: Source = "encoder") -> RoutedPrompt:
    row = PromptRow(text="x", domain=domain, source=source)
    return RoutedPrompt(row, decision(guess, source=kind))


def conversations(*rows: str) -> list[ConversationRow]:
    """`law:theft math:sum` is a conversation of two turns."""
    turns = [[turn.split(":") for turn in row.split()] for row in rows]
    return [
        ConversationRow(turns=[text for _, text in row], domains=[domain for domain, _ in row])
        for row in turns
    ]


def test_a_whole_report_of_a_hand_computed_example() -> None:
    assert evaluate(IN_SCOPE | OUT_OF_SCOPE) == {
        "n": 4,
        "accuracy": 0.75,
        "macro_f1": round((2 / 3 + 4 / 5) / 2, 4),
        "per_domain": {
            "law": {"n": 2, "accuracy": 0.5, "precision": 1.0, "f1": 0.6667},
            "math": {"n": 2, "accuracy": 1.0, "precision": 0.6667, "f1": 0.8},
        },
        "per_source": {},
        "ece": round((abs(1.8 - 2) + abs(1.2 - 1)) / 4, 4),
        "lost": 0.0,
        "latency_ms": {"p50": 4, "p95": 8},
        "n_oos": 4,
        "oos_misroute": 0.5,
    }


def test_a_report_is_strict_json() -> None:
    report = evaluate(IN_SCOPE | OUT_OF_SCOPE)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_without_prompts_out_of_scope_nothing_is_said_about_them() -> None:
    report = evaluate(IN_SCOPE)
    assert "oos_misroute" not in report
    assert "n_oos" not in report


def test_with_only_prompts_out_of_scope_nothing_else_is_said() -> None:
    assert evaluate(OUT_OF_SCOPE) == {
        "n": 0,
        "latency_ms": {"p50": 6, "p95": 8},
        "n_oos": 4,
        "oos_misroute": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "share"), [("weather", 0), ("alarm", 0), ("song", 1), ("pizza", 1)]
)
def test_only_a_specialised_expert_misroutes_what_is_out_of_scope(text: str, share: int) -> None:
    """The expert that answers counts, not the domain that was guessed."""
    assert evaluate({text: OUT_OF_SCOPE[text]})["oos_misroute"] == share


def test_prompts_out_of_scope_do_not_change_the_scores_in_scope() -> None:
    alone, among = evaluate(IN_SCOPE), evaluate(OUT_OF_SCOPE | IN_SCOPE)
    for key in ("n", "accuracy", "macro_f1", "per_domain", "per_source", "ece", "lost"):
        assert alone[key] == among[key]


def test_the_domain_counts_in_scope_even_where_the_fallback_answers() -> None:
    unsure = {"theft": ("law", decision("law", 0.1, "fallback", "fallback"))}
    assert evaluate(unsure)["accuracy"] == 1.0


def test_a_decision_without_a_domain_is_wrong() -> None:
    assert evaluate({"theft": ("law", decision(None, 1.0, "general"))})["accuracy"] == 0.0


def test_a_confidence_that_is_always_right_has_no_calibration_error() -> None:
    assert evaluate({text: IN_SCOPE[text] for text in ("theft", "sum")})["ece"] == 0.1
    sure = {"theft": ("law", decision("law", 1.0)), "sum": ("math", decision("math", 1.0))}
    assert evaluate(sure)["ece"] == 0.0


def test_the_share_of_lost_prompts_is_of_those_in_scope_that_the_fallback_got() -> None:
    """It counts whoever the fallback is and whatever the domain; prompts out of scope do not."""
    routed = [
        judged(None, "law", "law", "fallback"),
        judged(None, "law", "math"),
        judged(None, "law", "law", "rule"),
        judged(None, "math", "law", "fallback"),
        judged(None, "none", "law", "fallback"),
    ]
    assert summarise_routing(routed, GENERALISTS)["lost"] == 0.5


def test_accuracy_by_source_is_of_the_data_set_by_name() -> None:
    routed = [
        judged("squad/train", "law", "law"),
        judged("squad/test", "law", "math"),
        judged("mbpp", "math", "math"),
        judged(None, "law", "math"),
        judged("clinc/oos", "none", "law"),
    ]
    report = summarise_routing(routed, GENERALISTS)
    assert report["per_source"] == {"mbpp": 1.0, "squad": 0.5}
    assert list(report["per_source"]) == ["mbpp", "squad"]


@pytest.mark.parametrize(("domain", "in_scope"), [("law", True), ("none", False)])
def test_a_prompt_is_in_scope_if_it_has_a_domain(domain: str, in_scope: bool) -> None:
    assert judged(None, domain, "law").in_scope is in_scope


def test_each_prompt_is_routed_once_as_one_user_turn() -> None:
    rows = [PromptRow(text=text, domain="law") for text in IN_SCOPE]
    router = router_of(IN_SCOPE)
    routed = route_prompts(router, rows)
    assert router.asked == [[{"role": "user", "content": text}] for text in IN_SCOPE]
    assert [prompt.row for prompt in routed] == rows
    assert [prompt.decision for prompt in routed] == [known for _, known in IN_SCOPE.values()]


def test_no_prompts_are_routed_to_nothing() -> None:
    assert route_prompts(FakeRouter({}), []) == []


def test_progress_counts_every_prompt() -> None:
    rows = [PromptRow(text=text, domain="none") for text in IN_SCOPE]
    steps: list[int] = []
    route_prompts(router_of(IN_SCOPE), rows, steps.append)
    assert steps == [1] * len(rows)


def test_turn_accuracy_of_a_hand_computed_example() -> None:
    """`theft`, `sum` and `root` are right, `tort` is not."""
    rows = conversations("law:theft law:tort math:sum", "math:root")
    assert evaluate_conversations(router_of(IN_SCOPE), rows) == {
        "conversations": 2,
        "turns": 4,
        "turn_accuracy": 0.75,
    }


def test_a_turn_is_routed_with_the_turns_before_it() -> None:
    router = router_of(IN_SCOPE)
    evaluate_conversations(router, conversations("law:theft law:tort math:sum", "math:root"))
    answer = {"role": "assistant", "content": ""}
    theft, tort, total, root = ({"role": "user", "content": text} for text in IN_SCOPE)
    assert router.asked == [
        [theft],
        [theft, answer, tort],
        [theft, answer, tort, answer, total],
        [root],
    ]


def test_progress_counts_every_conversation() -> None:
    steps: list[int] = []
    rows = conversations("law:theft law:tort", "math:root")
    evaluate_conversations(router_of(IN_SCOPE), rows, steps.append)
    assert steps == [1, 1]


def test_no_conversations_have_no_turns() -> None:
    report = evaluate_conversations(FakeRouter({}), [])
    assert report == {"conversations": 0, "turns": 0, "turn_accuracy": 0.0}
