"""What `polymath eval router` reports, on decisions that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest

from polymath.router import Message, RouteDecision, Source
from polymath.training import PromptRow, evaluate_router

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

    def route(self, messages: Sequence[Message]) -> RouteDecision:
        self.asked.append(messages)
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


def evaluate(cases: Mapping[str, tuple[str, RouteDecision]]) -> dict[str, object]:
    rows = [PromptRow(text=text, domain=domain) for text, (domain, _) in cases.items()]
    router = FakeRouter({text: known for text, (_, known) in cases.items()})
    return evaluate_router(router, rows, GENERALISTS)


def test_a_whole_report_of_a_hand_computed_example() -> None:
    assert evaluate(IN_SCOPE | OUT_OF_SCOPE) == {
        "n": 4,
        "accuracy": 0.75,
        "macro_f1": round((2 / 3 + 4 / 5) / 2, 4),
        "per_domain": {
            "law": {"n": 2, "accuracy": 0.5, "precision": 1.0, "f1": 0.6667},
            "math": {"n": 2, "accuracy": 1.0, "precision": 0.6667, "f1": 0.8},
        },
        "ece": round((abs(1.8 - 2) + abs(1.2 - 1)) / 4, 4),
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
    for key in ("n", "accuracy", "macro_f1", "per_domain", "ece"):
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


def test_each_prompt_is_routed_once_as_one_user_turn() -> None:
    rows = [PromptRow(text=text, domain="law") for text in IN_SCOPE]
    router = FakeRouter({text: known for text, (_, known) in IN_SCOPE.items()})
    evaluate_router(router, rows, GENERALISTS)
    assert router.asked == [[{"role": "user", "content": text}] for text in IN_SCOPE]


def test_progress_counts_every_prompt() -> None:
    rows = [PromptRow(text=text, domain="none") for text in IN_SCOPE]
    router = FakeRouter({text: known for text, (_, known) in IN_SCOPE.items()})
    steps: list[int] = []
    evaluate_router(router, rows, GENERALISTS, steps.append)
    assert sum(steps) == len(rows)
