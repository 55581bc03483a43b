"""Numbers of a classifier, against hand-computed ones, scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training.metrics import (
    CALIBRATION_BINS,
    CalibrationBin,
    DomainScore,
    McNemar,
    accuracy,
    calibration_bins,
    domain_scores,
    expected_calibration_error,
    mcnemar,
    percentile,
)

domains = st.sampled_from(["law", "math", "coding", "none"])
labelled = st.lists(st.tuples(domains, domains), min_size=1)
judged = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1)
both = st.lists(st.tuples(st.booleans(), st.booleans()))
values = st.lists(st.floats(-1e6, 1e6), min_size=1)


@pytest.mark.parametrize(
    ("correct", "expected"),
    [([], 0.0), ([True], 1.0), ([False], 0.0), ([True, True, False, True], 0.75)],
)
def test_accuracy_is_the_share_of_hits(correct: list[bool], expected: float) -> None:
    assert accuracy(correct) == expected


def test_domain_scores_of_a_hand_computed_example() -> None:
    truth = ["law", "law", "law", "law", "math", "math"]
    guesses = ["law", "law", "law", "math", "math", "none"]
    assert domain_scores(truth, guesses) == {
        "law": DomainScore(n=4, accuracy=0.75, precision=1.0, f1=6 / 7),
        "math": DomainScore(n=2, accuracy=0.5, precision=0.5, f1=0.5),
    }


def test_a_domain_that_is_never_guessed_scores_zero() -> None:
    assert domain_scores(["law"], ["math"]) == {"law": DomainScore(1, 0.0, 0.0, 0.0)}


def test_nothing_has_no_domains() -> None:
    assert domain_scores([], []) == {}


@settings(deadline=None)
@given(pairs=labelled)
def test_domain_scores_are_those_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    truth, guesses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = domain_scores(truth, guesses)
    expected = precision_recall_fscore_support(truth, guesses, labels=list(scores), zero_division=0)
    ours = [[s.precision, s.accuracy, s.f1, s.n] for s in scores.values()]
    theirs = [list(column) for column in zip(*expected, strict=True)]
    assert ours == [pytest.approx(row) for row in theirs]


@settings(deadline=None)
@given(pairs=labelled)
def test_domain_scores_are_shares(pairs: list[tuple[str, str]]) -> None:
    for score in domain_scores(*zip(*pairs, strict=True)).values():
        assert all(0 <= share <= 1 for share in (score.accuracy, score.precision, score.f1))


@settings(deadline=None)
@given(truth=st.lists(domains, min_size=1))
def test_perfect_guesses_score_one_everywhere(truth: list[str]) -> None:
    for score in domain_scores(truth, truth).values():
        assert (score.accuracy, score.precision, score.f1) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "metric",
    [
        lambda: domain_scores(["a"], []),
        lambda: expected_calibration_error([0.5], []),
        lambda: calibration_bins([], [True]),
        lambda: mcnemar([True], []),
    ],
)
def test_lists_of_different_lengths_are_an_error(metric: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        metric()


def test_calibration_bins_of_a_hand_computed_example() -> None:
    """Bins are a fifteenth wide: [0.6, 0.67) is the tenth, [0.87, 0.93) the fourteenth."""
    assert calibration_bins([0.9, 0.6, 0.65, 0.9], [True, True, False, True]) == {
        9: CalibrationBin(n=2, confidence=0.625, accuracy=0.5),
        13: CalibrationBin(n=2, confidence=0.9, accuracy=1.0),
    }


@pytest.mark.parametrize(
    ("confidence", "position"), [(0.0, 0), (0.0666, 0), (0.067, 1), (0.9334, 14), (1.0, 14)]
)
def test_a_confidence_has_its_bin(confidence: float, position: int) -> None:
    assert list(calibration_bins([confidence], [True])) == [position]


def test_nothing_has_no_bins() -> None:
    assert calibration_bins([], []) == {}


@settings(deadline=None)
@given(pairs=judged)
def test_bins_come_in_order_and_hold_every_prediction_once(pairs: list[tuple[float, bool]]) -> None:
    bins = calibration_bins(*zip(*pairs, strict=True))
    assert list(bins) == sorted(bins)
    assert sum(part.n for part in bins.values()) == len(pairs)
    hits = sum(part.n * part.accuracy for part in bins.values())
    assert hits == pytest.approx(sum(right for _, right in pairs))


@settings(deadline=None)
@given(pairs=judged)
def test_the_mean_confidence_of_a_bin_lies_in_it(pairs: list[tuple[float, bool]]) -> None:
    for index, part in calibration_bins(*zip(*pairs, strict=True)).items():
        assert index - 1e-9 <= part.confidence * CALIBRATION_BINS <= index + 1 + 1e-9


def test_perfect_calibration_has_no_error() -> None:
    confidence = [0.75] * 4 + [0.5] * 2 + [1.0, 0.0]
    correct = [True, True, True, False, True, False, True, False]
    assert expected_calibration_error(confidence, correct) == 0.0


def test_calibration_error_of_a_hand_computed_example() -> None:
    """Bins [0.6, 0.67) and [0.87, 0.93): gaps of |1.25 - 1| and |1.8 - 1| over four answers."""
    error = expected_calibration_error([0.6, 0.65, 0.9, 0.9], [True, False, True, False])
    assert error == pytest.approx((0.25 + 0.8) / 4)


def test_gaps_of_different_bins_do_not_cancel() -> None:
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1.0


def test_gaps_within_one_bin_do_cancel() -> None:
    assert expected_calibration_error([0.5, 0.5], [False, True]) == 0.0


def test_nothing_is_perfectly_calibrated() -> None:
    assert expected_calibration_error([], []) == 0.0


@settings(deadline=None)
@given(pairs=judged)
def test_calibration_error_is_at_least_the_overall_gap_and_at_most_one(
    pairs: list[tuple[float, bool]],
) -> None:
    confidence, correct = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    overall = abs(sum(confidence) / len(pairs) - accuracy(correct))
    assert overall - 1e-9 <= expected_calibration_error(confidence, correct) <= 1 + 1e-9


@settings(deadline=None)
@given(pairs=judged)
def test_calibration_error_does_not_depend_on_the_order(pairs: list[tuple[float, bool]]) -> None:
    forwards = expected_calibration_error(*zip(*pairs, strict=True))
    backwards = expected_calibration_error(*zip(*pairs[::-1], strict=True))
    assert forwards == pytest.approx(backwards)


def test_mcnemar_of_a_hand_computed_example() -> None:
    """One against five: 2 (C(6, 0) + C(6, 1)) / 2^6."""
    first = [True] + [False] * 5 + [True] * 4 + [False] * 3
    second = [False] + [True] * 5 + [True] * 4 + [False] * 3
    assert mcnemar(first, second) == McNemar(only_first=1, only_second=5, p_value=14 / 64)


@pytest.mark.parametrize("correct", [[], [True], [False], [True, False, True]])
def test_equal_answers_differ_by_chance(correct: list[bool]) -> None:
    assert mcnemar(correct, correct) == McNemar(0, 0, 1.0)


@settings(deadline=None)
@given(pairs=both)
def test_mcnemar_is_the_binomial_test_of_scipy(pairs: list[tuple[bool, bool]]) -> None:
    from scipy.stats import binomtest

    test = mcnemar([one for one, _ in pairs], [other for _, other in pairs])
    n = test.only_first + test.only_second
    expected = binomtest(test.only_first, n).pvalue if n else 1.0
    assert test.p_value == pytest.approx(expected)


@settings(deadline=None)
@given(pairs=both)
def test_mcnemar_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    there, back = mcnemar(first, second), mcnemar(second, first)
    assert there == McNemar(back.only_second, back.only_first, back.p_value)


@settings(deadline=None)
@given(pairs=both, agreed=st.lists(st.booleans()))
def test_prompts_on_which_both_agree_change_nothing(
    pairs: list[tuple[bool, bool]], agreed: list[bool]
) -> None:
    more = [*pairs, *((right, right) for right in agreed)]
    columns = [[pair[side] for pair in pairs] for side in (0, 1)]
    longer = [[pair[side] for pair in more] for side in (0, 1)]
    assert mcnemar(*longer) == mcnemar(*columns)


def test_a_clear_difference_is_significant_however_many_prompts_there_are() -> None:
    """2^2000 is far beyond a float, the p-value is not."""
    assert mcnemar([True] * 2000, [False] * 2000) == McNemar(2000, 0, 0.0)
    assert mcnemar([True, False] * 1000, [False, True] * 1000) == McNemar(1000, 1000, 1.0)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100)]
)
def test_percentiles_of_one_to_a_hundred_are_themselves(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


@settings(deadline=None)
@given(numbers=values, share=st.floats(0, 1))
def test_a_percentile_is_one_of_the_values(numbers: list[float], share: float) -> None:
    assert percentile(numbers, share) in numbers


@settings(deadline=None)
@given(numbers=values, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_share_never_has_a_smaller_percentile(
    numbers: list[float], shares: tuple[float, float]
) -> None:
    assert percentile(numbers, min(shares)) <= percentile(numbers, max(shares))


@settings(deadline=None)
@given(numbers=values)
def test_the_extreme_percentiles_are_the_extremes(numbers: list[float]) -> None:
    assert percentile(numbers, 0) == min(numbers)
    assert percentile(numbers, 1) == max(numbers)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(3, 0.5, 2), (5, 0.5, 3), (9, 0.5, 5), (11, 0.95, 11), (100, 0.07, 7)],
)
def test_a_percentile_is_of_the_nearest_rank(count: int, share: float, expected: int) -> None:
    assert percentile(list(range(1, count + 1)), share) == expected
