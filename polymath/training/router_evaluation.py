"""`polymath eval router`: how often the domain is right, how honest the confidence, how fast."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from polymath.router import RouteDecision, Router
from polymath.training.data import OUT_OF_SCOPE, PromptRow
from polymath.training.metrics import (
    accuracy,
    domain_scores,
    expected_calibration_error,
    percentile,
)

__all__ = ["evaluate_router"]

DIGITS = 4


def evaluate_router(
    router: Router,
    rows: Sequence[PromptRow],
    generalists: Sequence[str],
    advance: Callable[[int], Any] = lambda prompts: None,
) -> dict[str, Any]:
    """Route every prompt and compare.

    Args:
        rows: labelled prompts; those of domain `none` are out of scope.
        generalists: experts to which an out-of-scope prompt may go.
    Returns:
        `n`, `accuracy`, `macro_f1`, `per_domain`, `ece` over the prompts in scope (where there are
        any), `latency_ms` over all, and `oos_misroute`, the share of the prompts out of scope that
        went to a specialised expert (where there are any).
    """
    decisions: list[RouteDecision] = []
    for row in rows:
        decisions.append(router.route([{"role": "user", "content": row.text}]))
        advance(1)
    in_scope = [
        pair for pair in zip(rows, decisions, strict=True) if pair[0].domain != OUT_OF_SCOPE
    ]
    outside = [d for row, d in zip(rows, decisions, strict=True) if row.domain == OUT_OF_SCOPE]
    latencies = [decision.latency_ms for decision in decisions]
    report: dict[str, Any] = {"n": len(in_scope)}
    if in_scope:
        report |= _in_scope_report(*zip(*in_scope, strict=True))
    report["latency_ms"] = {
        "p50": round(percentile(latencies, 0.5), 3),
        "p95": round(percentile(latencies, 0.95), 3),
    }
    if outside:
        misrouted = [decision.expert not in generalists for decision in outside]
        report |= {"n_oos": len(outside), "oos_misroute": round(accuracy(misrouted), DIGITS)}
    return report


def _in_scope_report(
    rows: Sequence[PromptRow], decisions: Sequence[RouteDecision]
) -> dict[str, Any]:
    truth = [row.domain for row in rows]
    guesses = [decision.domain or "" for decision in decisions]
    correct = [right == guess for right, guess in zip(truth, guesses, strict=True)]
    scores = domain_scores(truth, guesses)
    confidence = [decision.confidence for decision in decisions]
    return {
        "accuracy": round(accuracy(correct), DIGITS),
        "macro_f1": round(sum(score.f1 for score in scores.values()) / len(scores), DIGITS),
        "per_domain": {
            domain: {name: round(value, DIGITS) for name, value in asdict(score).items()}
            for domain, score in scores.items()
        },
        "ece": round(expected_calibration_error(confidence, correct), DIGITS),
    }
