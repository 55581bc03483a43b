"""Numbers that say how good a classifier is, from plain lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CalibrationBin",
    "DomainScore",
    "McNemar",
    "accuracy",
    "calibration_bins",
    "domain_scores",
    "expected_calibration_error",
    "mcnemar",
    "percentile",
]

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


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Predictions of like confidence: how many, their mean confidence and their accuracy."""

    n: int
    confidence: float
    accuracy: float


def calibration_bins(
    confidence: Sequence[float], correct: Sequence[bool]
) -> dict[int, CalibrationBin]:
    """The equal-width bins that are not empty, by their position: a reliability diagram."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for value, right in zip(confidence, correct, strict=True):
        index = min(int(value * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins.setdefault(index, []).append((value, right))
    return {
        index: CalibrationBin(
            n=len(members),
            confidence=sum(value for value, _ in members) / len(members),
            accuracy=accuracy([right for _, right in members]),
        )
        for index, members in sorted(bins.items())
    }


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, eq. 3)."""
    bins = calibration_bins(confidence, correct).values()
    gap = sum(part.n * abs(part.confidence - part.accuracy) for part in bins)
    return gap / len(confidence) if confidence else 0.0


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two classifiers on the same prompts (McNemar 1947, exact form).

    Attributes:
        only_first: prompts that only the first has right; only_second: only the second.
        p_value: how likely so uneven a split is if neither is better, two-sided.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test on which of their answers are right, prompt by prompt."""
    pairs = list(zip(first, second, strict=True))
    only_first = sum(one and not other for one, other in pairs)
    only_second = sum(other and not one for one, other in pairs)
    n, least = only_first + only_second, min(only_first, only_second)
    ways = tail = 1
    for k in range(least):
        ways = ways * (n - k) // (k + 1)  # C(n, k + 1)
        tail += ways
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = math.ceil(round(share * len(ordered), 9))  # 0.07 * 100 is 7.000000000000001
    return ordered[min(len(ordered), max(1, rank)) - 1]
