"""The evaluation of a router as one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymath.training.metrics import CALIBRATION_BINS, calibration_bins
from polymath.training.router_evaluation import RoutedPrompt

__all__ = ["REPORT_FILE", "write_router_report"]

REPORT_FILE = "router.html"
TEMPLATE = Path(__file__).with_name("router_report.html.j2")
MISTAKES = 50
EXCERPT = 400
HISTOGRAM_BINS = 20
CHART = 300
"""Side of a chart, in pixels."""


def write_router_report(
    folder: Path, routed: Sequence[RoutedPrompt], summary: Mapping[str, Any], title: str
) -> Path:
    """Accuracy table, confusion matrix, reliability diagram, confidences, the worst mistakes.

    Args:
        summary: of the same prompts (`summarise_routing`).
    Returns:
        The file that was written.
    """
    from jinja2 import Environment

    inside = [prompt for prompt in routed if prompt.in_scope]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary,
        confusion=_confusion(inside),
        reliability=_reliability(inside),
        histogram=_histogram(routed),
        mistakes=_mistakes(inside),
        chart=CHART,
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / REPORT_FILE
    file.write_text(html, encoding="utf-8")
    return file


def _confusion(routed: Sequence[RoutedPrompt]) -> dict[str, Any]:
    """Rows are the true domains, columns what the router said; shares are of the row."""
    counts = Counter((prompt.row.domain, prompt.decision.domain or "none") for prompt in routed)
    truths = sorted({truth for truth, _ in counts})
    guesses = sorted({*truths, *(guess for _, guess in counts)})
    totals = Counter(prompt.row.domain for prompt in routed)
    return {
        "columns": guesses,
        "rows": [
            (
                truth,
                [
                    (counts[truth, guess], counts[truth, guess] / totals[truth], truth == guess)
                    for guess in guesses
                ],
            )
            for truth in truths
        ],
    }


def _reliability(routed: Sequence[RoutedPrompt]) -> list[dict[str, float]]:
    bins = calibration_bins(
        [prompt.decision.confidence for prompt in routed], [prompt.correct for prompt in routed]
    )
    width = CHART / CALIBRATION_BINS
    return [
        {
            "x": index * width,
            "width": width - 1,
            "height": part.accuracy * CHART,
            "mark_x": part.confidence * CHART,
            "mark_y": (1 - part.accuracy) * CHART,
            "n": part.n,
            "confidence": part.confidence,
            "accuracy": part.accuracy,
        }
        for index, part in bins.items()
    ]


def _histogram(routed: Sequence[RoutedPrompt]) -> list[dict[str, float]]:
    """Shares of the prompts in and out of scope by confidence, as bars side by side."""
    groups = {
        kind: [prompt.decision.confidence for prompt in routed if prompt.in_scope == kind]
        for kind in (True, False)
    }
    width = CHART / HISTOGRAM_BINS
    shares = {kind: _shares(values) for kind, values in groups.items() if values}
    largest = max((share for values in shares.values() for share in values), default=1.0)
    return [
        {
            "x": index * width + (0 if kind else width / 2),
            "width": width / 2 - 0.5,
            "height": share / largest * CHART,
            "in_scope": kind,
            "share": share,
        }
        for kind, values in shares.items()
        for index, share in enumerate(values)
    ]


def _shares(values: Sequence[float]) -> list[float]:
    counts = Counter(min(int(value * HISTOGRAM_BINS), HISTOGRAM_BINS - 1) for value in values)
    return [counts[index] / len(values) for index in range(HISTOGRAM_BINS)]


def _mistakes(routed: Sequence[RoutedPrompt]) -> list[dict[str, Any]]:
    """The wrong answers that the router was surest of."""
    wrong = [prompt for prompt in routed if not prompt.correct]
    wrong.sort(key=lambda prompt: prompt.decision.confidence, reverse=True)
    return [
        {
            "text": prompt.row.text[:EXCERPT],
            "source": prompt.row.source or "",
            "truth": prompt.row.domain,
            "guess": prompt.decision.domain,
            "confidence": prompt.decision.confidence,
            "nearest": [
                neighbour.text or neighbour.id for neighbour in prompt.decision.why.nearest
            ],
        }
        for prompt in wrong[:MISTAKES]
    ]
