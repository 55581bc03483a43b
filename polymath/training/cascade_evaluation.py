"""How well a cascade's judge knows which cheap answers to trust: accuracy against cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "CascadeCurve",
    "JudgedAnswer",
    "Match",
    "cascade_curve",
    "is_right",
    "write_cascade_report",
]

Match = Literal["exact", "contains", "number"]
REPORT_FILE = "cascade.html"
TEMPLATE = Path(__file__).with_name("cascade_report.html.j2")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One question: the judge's score of the cheap answer, and who was right."""

    score: float
    cheap_right: bool
    strong_right: bool


@dataclass(frozen=True, slots=True)
class Point:
    """All answers below `threshold` go to the strong expert.

    Attributes:
        escalated: their share.
    """

    threshold: float
    escalated: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class CascadeCurve:
    """Accuracy over the share that is escalated.

    Attributes:
        answers: how many were judged.
        points: from nobody to everybody.
        area: under the curve; random_area: under that of escalating at random.
    """

    answers: int
    points: tuple[Point, ...]
    area: float
    random_area: float

    def summary(self) -> dict[str, float]:
        """The numbers without the curve."""
        return {
            "n": self.answers,
            "accuracy_cheap": round(self.points[0].accuracy, 4),
            "accuracy_strong": round(self.points[-1].accuracy, 4),
            "area": round(self.area, 4),
            "random_area": round(self.random_area, 4),
        }


def cascade_curve(answers: Sequence[JudgedAnswer]) -> CascadeCurve:
    """The curve over all thresholds; the least trusted answers are escalated first.

    Answers of equal score are escalated together, as a threshold cannot part them; between such
    points the curve is straight (escalating some of them at random).

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("a curve needs answers")
    ordered = sorted(answers, key=lambda answer: answer.score)
    right = sum(answer.cheap_right for answer in ordered)
    points = [Point(float("-inf"), 0.0, right / len(ordered))]
    for place, answer in enumerate(ordered, 1):
        right += answer.strong_right - answer.cheap_right
        last = place == len(ordered)
        if last or ordered[place].score > answer.score:
            threshold = float("inf") if last else ordered[place].score
            points.append(Point(threshold, place / len(ordered), right / len(ordered)))
    area = sum(
        (there.escalated - here.escalated) * (here.accuracy + there.accuracy) / 2
        for here, there in pairwise(points)
    )
    random_area = (points[0].accuracy + points[-1].accuracy) / 2
    return CascadeCurve(len(ordered), tuple(points), area, random_area)


def is_right(said: str, wanted: str, match: Match) -> bool:
    """Whether an answer is the reference: as a whole, as a part, or in its last number.

    Case, space and a final full stop do not count.
    """
    if match == "number":
        numbers = [found.replace(",", "") for found in NUMBER.findall(said)]
        references = [found.replace(",", "") for found in NUMBER.findall(wanted)]
        return bool(numbers and references) and float(numbers[-1]) == float(references[-1])
    plain, reference = _plain(said), _plain(wanted)
    return reference in plain if match == "contains" else plain == reference


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def write_cascade_report(
    folder: Path, curve: CascadeCurve, title: str, prices: Mapping[str, Any]
) -> Path:
    """The curve as one HTML file that needs nothing else.

    Args:
        prices: of the cheap and the strong expert, in dollars for a thousand of these requests.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, curve=curve, summary=curve.summary(), prices=prices
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / REPORT_FILE
    file.write_text(html, encoding="utf-8")
    return file
