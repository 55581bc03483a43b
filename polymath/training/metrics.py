"""Numbers that say how good a classifier is, from plain lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DomainScore", "accuracy", "domain_scores", "expected_calibration_error", "percentile"]

CALIBRATION_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017."""


@dataclass(frozen=True, slots=True)
class DomainScore:
    """How one domain fared: `accuracy` is the share of its own prompts that were recognised."""

    n: int
    accuracy: float
    precision: float
    f1: float


def accuracy(correct: Sequence[bool]) -> float:
    """Share of True; 0 for nothing."""
    return sum(correct) / len(correct) if correct else 0.0


def domain_scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, DomainScore]:
    """Recall, precision and F1 of every domain that occurs in `truth`, by name."""
    pairs = list(zip(truth, predicted, strict=True))
    scores = {}
    for domain in sorted(set(truth)):
        hits = sum(right == guess == domain for right, guess in pairs)
        n = sum(right == domain for right, _ in pairs)
        guesses = sum(guess == domain for _, guess in pairs)
        scores[domain] = DomainScore(
            n=n,
            accuracy=hits / n,
            precision=hits / guesses if guesses else 0.0,
            f1=2 * hits / (n + guesses),
        )
    return scores


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, eq. 3)."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for value, right in zip(confidence, correct, strict=True):
        index = min(int(value * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins.setdefault(index, []).append((value, right))
    gaps = (
        abs(sum(value for value, _ in members) - sum(right for _, right in members))
        for members in bins.values()
    )
    return sum(gaps) / len(confidence) if confidence else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = math.ceil(round(share * len(ordered), 9))  # 0.07 * 100 is 7.000000000000001
    return ordered[min(len(ordered), max(1, rank)) - 1]
