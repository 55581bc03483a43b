"""`polymath eval router`: how often the domain is right, how honest the confidence, how fast."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polymath.router import Message, RouteDecision, Router
from polymath.training.data import OUT_OF_SCOPE, ConversationRow, PromptRow
from polymath.training.metrics import (
    accuracy,
    domain_scores,
    expected_calibration_error,
    percentile,
)

__all__ = ["RoutedPrompt", "evaluate_conversations", "route_prompts", "summarise_routing"]

DIGITS = 4

Advance = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """A labelled prompt and what a router said of it."""

    row: PromptRow
    decision: RouteDecision

    @property
    def in_scope(self) -> bool:
        """Whether the prompt belongs to a domain."""
        return self.row.domain != OUT_OF_SCOPE

    @property
    def correct(self) -> bool:
        """Whether the domain is right."""
        return self.decision.domain == self.row.domain

    @property
    def lost(self) -> bool:
        """Whether the fallback answers, as for a prompt of no domain."""
        return self.decision.source == "fallback"


def route_prompts(
    router: Router, rows: Sequence[PromptRow], advance: Advance = lambda prompts: None
) -> list[RoutedPrompt]:
    """Route every prompt by itself, one at a time.

    Args:
        advance: called with the number of prompts of each step.
    """
    routed = []
    for row in rows:
        routed.append(RoutedPrompt(row, router.route([_user(row.text)])))
        advance(1)
    return routed


def summarise_routing(
    routed: Sequence[RoutedPrompt], generalists: Collection[str]
) -> dict[str, Any]:
    """The numbers of an evaluation.

    Args:
        generalists: experts to which an out-of-scope prompt may go.
    Returns:
        `n`, `accuracy`, `macro_f1`, `per_domain`, `per_source`, `ece` and `lost` (share that the
        fallback got) over the prompts in scope, where there are any; `latency_ms` over all; and
        `oos_misroute`, the share of the prompts out of scope that went to a specialised expert,
        where there are any.
    """
    inside = [prompt for prompt in routed if prompt.in_scope]
    outside = [prompt for prompt in routed if not prompt.in_scope]
    latencies = [prompt.decision.latency_ms for prompt in routed]
    report: dict[str, Any] = {"n": len(inside)}
    if inside:
        report |= _in_scope_report(inside)
    report["latency_ms"] = {
        "p50": round(percentile(latencies, 0.5), 3),
        "p95": round(percentile(latencies, 0.95), 3),
    }
    if outside:
        misrouted = [prompt.decision.expert not in generalists for prompt in outside]
        report |= {"n_oos": len(outside), "oos_misroute": round(accuracy(misrouted), DIGITS)}
    return report


def evaluate_conversations(
    router: Router, rows: Sequence[ConversationRow], advance: Advance = lambda conversations: None
) -> dict[str, Any]:
    """Route every user turn with the turns before it.

    Returns:
        `conversations`, `turns`, and `turn_accuracy`, the share of turns whose domain is right.
    """
    correct: list[bool] = []
    for row in rows:
        messages: list[Message] = []
        for text, domain in zip(row.turns, row.domains, strict=True):
            messages.append(_user(text))
            correct.append(_is_right(router.route(messages), domain))
            messages.append({"role": "assistant", "content": ""})
        advance(1)
    return {
        "conversations": len(rows),
        "turns": len(correct),
        "turn_accuracy": round(accuracy(correct), DIGITS),
    }


def _is_right(decision: RouteDecision, domain: str) -> bool:
    if domain == OUT_OF_SCOPE:
        return decision.source == "fallback"
    return decision.domain == domain


def _in_scope_report(routed: Sequence[RoutedPrompt]) -> dict[str, Any]:
    truth = [prompt.row.domain for prompt in routed]
    guesses = [prompt.decision.domain or "" for prompt in routed]
    correct = [prompt.correct for prompt in routed]
    scores = domain_scores(truth, guesses)
    confidence = [prompt.decision.confidence for prompt in routed]
    return {
        "accuracy": round(accuracy(correct), DIGITS),
        "macro_f1": round(sum(score.f1 for score in scores.values()) / len(scores), DIGITS),
        "per_domain": {
            domain: {name: round(value, DIGITS) for name, value in asdict(score).items()}
            for domain, score in scores.items()
        },
        "per_source": _by_source(routed),
        "ece": round(expected_calibration_error(confidence, correct), DIGITS),
        "lost": round(accuracy([prompt.lost for prompt in routed]), DIGITS),
    }


def _by_source(routed: Sequence[RoutedPrompt]) -> dict[str, float]:
    """Accuracy by data set; rows without a source are left out."""
    groups: dict[str, list[bool]] = {}
    for prompt in routed:
        if prompt.row.source:
            groups.setdefault(prompt.row.family, []).append(prompt.correct)
    return {source: round(accuracy(groups[source]), DIGITS) for source in sorted(groups)}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
