"""What a cascade's judge is worth: the curve of accuracy over cost, and when an answer is right."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.training import JudgedAnswer, cascade_curve, is_right, write_cascade_report
from polymath.training.cascade_evaluation import CascadeCurve, Match

judged = st.builds(
    JudgedAnswer, st.sampled_from([-1.5, -0.5, 0.0, 0.25, 2.0]), st.booleans(), st.booleans()
)
answers = st.lists(judged, min_size=1, max_size=20)


def told(*values: tuple[float, bool, bool]) -> list[JudgedAnswer]:
    return [JudgedAnswer(*each) for each in values]


def points(curve: CascadeCurve) -> list[tuple[float, float]]:
    return [(point.escalated, point.accuracy) for point in curve.points]


def accuracy_above(values: Sequence[JudgedAnswer], threshold: float) -> float:
    """What a cascade does: scores of at least the threshold are trusted."""
    right = [a.cheap_right if a.score >= threshold else a.strong_right for a in values]
    return sum(right) / len(right)


def area_of(values: Sequence[JudgedAnswer]) -> float:
    return cascade_curve(values).area


# --- the curve ------------------------------------------------------------------------------------


def test_a_curve_of_a_hand_computed_example() -> None:
    curve = cascade_curve(
        told((0.9, True, True), (0.1, False, True), (0.6, True, False), (0.3, False, True))
    )
    assert points(curve) == [(0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.75, 0.75), (1, 0.75)]
    assert [point.threshold for point in curve.points] == [-math.inf, 0.3, 0.6, 0.9, math.inf]
    assert curve.area == pytest.approx(0.25 * (0.625 + 0.875 + 0.875 + 0.75))
    assert curve.random_area == 0.625


@given(answers)
def test_its_ends_are_the_cheap_and_the_strong_expert(values: list[JudgedAnswer]) -> None:
    first, *_, last = cascade_curve(values).points
    assert (first.escalated, last.escalated) == (0.0, 1.0)
    assert first.accuracy == sum(answer.cheap_right for answer in values) / len(values)
    assert last.accuracy == sum(answer.strong_right for answer in values) / len(values)


@given(answers)
def test_every_point_is_what_the_cascade_does_at_its_threshold(values: list[JudgedAnswer]) -> None:
    for point in cascade_curve(values).points:
        below = [answer for answer in values if answer.score < point.threshold]
        assert point.escalated == len(below) / len(values)
        assert point.accuracy == accuracy_above(values, point.threshold)


@given(answers)
def test_equal_scores_are_escalated_together(values: list[JudgedAnswer]) -> None:
    curve = cascade_curve(values)
    assert len(curve.points) == len({answer.score for answer in values}) + 1
    shares = [point.escalated for point in curve.points]
    assert shares == sorted(set(shares))


@given(answers, st.integers(0, 99))
def test_the_order_of_the_answers_does_not_matter(values: list[JudgedAnswer], seed: int) -> None:
    shuffled = random.Random(seed).sample(values, len(values))
    assert cascade_curve(shuffled) == cascade_curve(values)


@given(answers)
def test_only_the_order_of_the_scores_matters(values: list[JudgedAnswer]) -> None:
    scaled = [JudgedAnswer(3 * a.score - 7, a.cheap_right, a.strong_right) for a in values]
    assert points(cascade_curve(scaled)) == points(cascade_curve(values))


# --- the area -------------------------------------------------------------------------------------


def test_a_perfect_judge_escalates_what_is_wrong_first() -> None:
    """Half is wrong, the strong expert is always right: 1/2 to 1, and 1 from there on."""
    perfect = told(*[(1.0, True, True)] * 4, *[(0.0, False, True)] * 4)
    assert points(cascade_curve(perfect)) == [(0, 0.5), (0.5, 1.0), (1, 1.0)]
    assert area_of(perfect) == 0.875


@given(answers)
def test_no_judge_is_better_than_one_that_knows_who_is_right(values: list[JudgedAnswer]) -> None:
    knows = [
        JudgedAnswer(a.cheap_right - a.strong_right, a.cheap_right, a.strong_right) for a in values
    ]
    misled = [JudgedAnswer(-a.score, a.cheap_right, a.strong_right) for a in knows]
    assert area_of(misled) - 1e-9 <= area_of(values) <= area_of(knows) + 1e-9


@given(answers)
def test_a_judge_that_always_says_the_same_is_as_good_as_chance(
    values: list[JudgedAnswer],
) -> None:
    constant = [JudgedAnswer(0.5, a.cheap_right, a.strong_right) for a in values]
    curve = cascade_curve(constant)
    assert curve.area == pytest.approx(curve.random_area)


@given(answers)
def test_the_reverse_of_a_judge_is_as_bad_as_the_judge_is_good(values: list[JudgedAnswer]) -> None:
    reverse = [JudgedAnswer(-a.score, a.cheap_right, a.strong_right) for a in values]
    chance = cascade_curve(values).random_area
    assert area_of(reverse) - chance == pytest.approx(chance - area_of(values), abs=1e-9)


def test_a_judge_that_knows_nothing_is_as_good_as_chance_on_average() -> None:
    rng = random.Random(0)
    areas = []
    for _ in range(300):
        values = told(*((rng.random(), place < 20, place < 32) for place in range(40)))
        areas.append(area_of(values) - cascade_curve(values).random_area)
    assert sum(areas) / len(areas) == pytest.approx(0, abs=0.005)


@given(answers)
def test_an_area_is_an_accuracy(values: list[JudgedAnswer]) -> None:
    curve = cascade_curve(values)
    accuracies = [point.accuracy for point in curve.points]
    assert min(accuracies) - 1e-9 <= curve.area <= max(accuracies) + 1e-9
    assert 0 <= curve.random_area <= 1


@given(answers)
def test_experts_that_are_equally_good_need_no_judge(values: list[JudgedAnswer]) -> None:
    same = [JudgedAnswer(a.score, a.cheap_right, a.cheap_right) for a in values]
    curve = cascade_curve(same)
    assert curve.area == pytest.approx(curve.random_area)


def test_no_answers_have_no_curve() -> None:
    with pytest.raises(ValueError, match="needs answers"):
        cascade_curve([])


def test_the_summary_counts_every_answer() -> None:
    """Three answers, two of which are of one score."""
    summary = cascade_curve(
        told((0.1, False, True), (0.1, True, True), (0.7, True, False))
    ).summary()
    assert summary == {
        "n": 3,
        "accuracy_cheap": 0.6667,
        "accuracy_strong": 0.6667,
        "area": 0.8333,
        "random_area": 0.6667,
    }


# --- who is right ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "wanted", "match", "right"),
    [
        ("Yes", "yes", "exact", True),
        (" Yes.\n", "yes", "exact", True),
        ("card  arrival", "Card arrival.", "exact", True),
        ("STRASSE", "straße", "exact", True),
        ("Yes, it does.", "Yes", "exact", False),
        ("", "yes", "exact", False),
        ("Yes..", "Yes", "exact", False),
        ("I say yes, of course", "Yes.", "contains", True),
        ("The card\narrival.", "card arrival", "contains", True),
        ("No", "Yes", "contains", False),
        ("so 3 + 5 = 8", "#### 8", "number", True),
        ("8 apples, not 9", "8", "number", False),
        ("$1,234.50", "1234.5", "number", True),
        ("The answer is 8.", "8.0", "number", True),
        ("-4", "4", "number", False),
        ("It is 1,000,000.", "1000000", "number", True),
        ("eight", "8", "number", False),
        ("8", "eight", "number", False),
        ("", "", "number", False),
    ],
)
def test_an_answer_is_the_reference_in_one_of_three_ways(
    said: str, wanted: str, match: Match, right: bool
) -> None:
    assert is_right(said, wanted, match) is right


@given(st.text(min_size=1).filter(str.strip))
def test_every_text_is_itself(text: str) -> None:
    assert is_right(text, text, "exact")
    assert is_right(f"well, {text} ", text, "contains")


@given(st.integers(-(10**9), 10**9), st.integers(0, 99))
def test_every_number_is_itself_however_it_is_written(whole: int, hundredths: int) -> None:
    plain, grouped = f"{whole}.{hundredths:02}", f"{whole:,}.{hundredths:02}"
    assert is_right(f"2 and 2 make {grouped}.", plain, "number")


@given(st.text(), st.text(), st.sampled_from(["exact", "contains", "number"]))
def test_any_texts_can_be_compared(said: str, wanted: str, match: Match) -> None:
    assert is_right(said, wanted, match) in (True, False)


# --- the report -----------------------------------------------------------------------------------

MIXED = told((0.9, True, True), (0.1, False, True), (0.6, True, False), (0.3, False, True))


def test_the_report_holds_the_numbers(tmp_path: Path) -> None:
    curve = cascade_curve(MIXED)
    file = write_cascade_report(tmp_path / "new" / "folder", curve, "Cascade <both>", {})
    page = file.read_text(encoding="utf-8")
    assert file == tmp_path / "new" / "folder" / "cascade.html"
    assert "Cascade &lt;both&gt;" in page
    for name, value in curve.summary().items():
        assert f"<b>{value}</b>{name.replace('_', ' ')}" in page
    assert page.count("<tr><td>") == len(curve.points)
    assert "<td>0.6</td><td>0.500</td><td>1.000</td>" in page
    assert "dollars" not in page


def test_the_report_needs_nothing_else(tmp_path: Path) -> None:
    page = write_cascade_report(tmp_path, cascade_curve(MIXED), "Cascade", {}).read_text()
    assert not any(word in page for word in ("<script", "<link", "http:", "https:", "src="))


def test_the_report_tells_what_each_threshold_costs(tmp_path: Path) -> None:
    """Everybody asks the cheap expert; half of them ask the strong one after that."""
    prices = {"cheap": 0.5, "strong": 3.0}
    page = write_cascade_report(tmp_path, cascade_curve(MIXED), "Cascade", prices).read_text()
    assert "dollars for 1,000" in page
    assert "<td>0.500</td><td>1.000</td><td>2.0000</td>" in page
    assert "<td>0.000</td><td>0.500</td><td>0.5000</td>" in page
