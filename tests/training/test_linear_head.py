"""Heads on vectors that are known: against scikit-learn, and their calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polymath.router import RouterHead, calibrated
from polymath.training import linear_head
from polymath.training.linear_head import (
    FOLDS,
    find_centres,
    fit_head,
    fit_temperature,
    out_of_fold_logits,
)

DIMENSIONS = 6
Rows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]


def clouds(classes: int, count: int = 20, noise: float = 0.1, seed: int = 0) -> Rows:
    """Unit vectors around one axis a class, their targets, and weights of one."""
    random = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), count)
    vectors = np.eye(DIMENSIONS)[targets] + noise * random.normal(size=(len(targets), DIMENSIONS))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), targets, np.ones(len(targets))


def sampled(logits: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    """Targets drawn with the probabilities of the logits: by definition calibrated."""
    random = np.random.default_rng(seed)
    return np.array([random.choice(len(row), p=row) for row in calibrated(logits, 1.0)])


@pytest.fixture(scope="module")
def honest() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    logits = np.random.default_rng(1).normal(scale=2.0, size=(4000, 4))
    return logits, sampled(logits)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_head_gives_the_probabilities_of_logistic_regression(classes: int) -> None:
    """Two classes come from scikit-learn as one row; their softmax must be its sigmoid."""
    from sklearn.linear_model import LogisticRegression

    vectors, targets, weights = clouds(classes, noise=0.6)
    reference: Any = LogisticRegression(C=3.0, max_iter=1000).fit(vectors, targets)
    ours = calibrated(fit_head(vectors, targets, weights, 3.0).logits(vectors), 1.0)
    np.testing.assert_allclose(ours, reference.predict_proba(vectors), atol=1e-5)


def test_a_row_of_weight_two_is_the_row_twice() -> None:
    vectors, targets, weights = clouds(3, noise=0.6)
    weights[:10] = 2
    some = np.concatenate([np.arange(len(targets)), np.arange(10)])
    weighed = fit_head(vectors, targets, weights, 1.0)
    repeated = fit_head(vectors[some], targets[some], np.ones(len(some)), 1.0)
    np.testing.assert_allclose(weighed.weight, repeated.weight, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_separable_classes_are_separated(classes: int) -> None:
    vectors, targets, weights = clouds(classes)
    head = fit_head(vectors, targets, weights, 1.0)
    assert head.weight.shape == (classes, DIMENSIONS)
    assert head.bias.shape == (classes,)
    assert (head.logits(vectors).argmax(1) == targets).all()


def test_a_head_is_in_float32() -> None:
    vectors, targets, weights = clouds(3)
    head = fit_head(vectors, targets, weights, 1.0)
    assert {head.weight.dtype, head.bias.dtype, head.logits(vectors).dtype} == {np.dtype("f4")}


def test_less_regularisation_gives_larger_weights() -> None:
    vectors, targets, weights = clouds(3, noise=0.6)
    norms = [np.linalg.norm(fit_head(vectors, targets, weights, c).weight) for c in (0.1, 1, 10)]
    assert norms == sorted(norms)


def test_logits_of_a_hand_computed_example() -> None:
    head = RouterHead(np.array([[1, 2], [0, -1]], np.float32), np.array([0.5, 1], np.float32))
    logits = head.logits(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_array_equal(logits, [[11.5, -3], [0.5, 1]])


def test_out_of_fold_logits_come_from_heads_that_have_not_seen_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head of this test knows its training rows by heart and says so."""
    vectors, targets, weights = clouds(3, count=10)

    class Memory:
        def __init__(self, seen: NDArray[np.float32]) -> None:
            self.seen = {row.tobytes() for row in seen}

        def logits(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
            known = [row.tobytes() in self.seen for row in rows]
            return np.repeat(np.array(known, np.float32)[:, None], 3, axis=1)

    monkeypatch.setattr(linear_head, "fit_head", lambda seen, *_: Memory(seen))
    logits = out_of_fold_logits(vectors, targets, weights, 1.0, False, seed=0)
    np.testing.assert_array_equal(logits, np.zeros((30, 3)))


def test_out_of_fold_logits_of_every_row_are_finite_and_mostly_right() -> None:
    vectors, targets, weights = clouds(4, noise=0.3)
    logits = out_of_fold_logits(vectors, targets, weights, 1.0, False, seed=0)
    assert logits.shape == (80, 4)
    assert np.isfinite(logits).all()
    assert (logits.argmax(1) == targets).mean() > 0.9


def test_random_labels_are_not_known_out_of_fold() -> None:
    vectors, targets, weights = clouds(3, count=60)
    shuffled = np.random.default_rng(0).permutation(targets)
    logits = out_of_fold_logits(vectors, shuffled, weights, 10.0, False, seed=0)
    assert (logits.argmax(1) == shuffled).mean() < 0.5


@pytest.mark.parametrize(("rarest", "folds"), [(2, 2), (4, 4), (9, FOLDS)])
def test_there_are_no_more_folds_than_rows_of_a_class(
    monkeypatch: pytest.MonkeyPatch, rarest: int, folds: int
) -> None:
    vectors, targets, weights = clouds(3)
    kept = np.concatenate([np.flatnonzero(targets < 2), np.flatnonzero(targets == 2)[:rarest]])
    fitted: list[int] = []

    def counted(*values: Any) -> RouterHead:
        fitted.append(len(values[0]))
        return fit_head(*values)

    monkeypatch.setattr(linear_head, "fit_head", counted)
    out_of_fold_logits(vectors[kept], targets[kept], weights[kept], 1.0, False, seed=0)
    assert len(fitted) == folds


def test_the_seed_chooses_the_folds() -> None:
    vectors, targets, weights = clouds(3, noise=0.6)
    first, again, other = (
        out_of_fold_logits(vectors, targets, weights, 1.0, False, seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_honest_logits_have_a_temperature_of_one(
    honest: tuple[NDArray[np.float64], NDArray[np.int64]],
) -> None:
    assert fit_temperature(*honest) == pytest.approx(1.0, rel=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.2, 0.5, 3.0, 10.0])
def test_scaled_logits_have_the_scale_as_their_temperature(
    honest: tuple[NDArray[np.float64], NDArray[np.int64]], scale: float
) -> None:
    logits, targets = honest
    unscaled = fit_temperature(logits, targets)  # type: ignore[arg-type]
    found = fit_temperature(scale * logits, targets)  # type: ignore[arg-type]
    assert found == pytest.approx(scale * unscaled, rel=1e-3)


def test_no_other_temperature_has_less_loss(
    honest: tuple[NDArray[np.float64], NDArray[np.int64]],
) -> None:
    logits, targets = 2.5 * honest[0], honest[1]

    def loss(temperature: float) -> float:
        shares = calibrated(logits, temperature)[np.arange(len(targets)), targets]
        return -float(np.log(shares).mean())

    best = fit_temperature(logits, targets)  # type: ignore[arg-type]
    assert loss(best) <= min(loss(0.95 * best), loss(1.05 * best))


@pytest.mark.parametrize(("right", "bound"), [(True, 0.06), (False, 19.0)])
def test_a_temperature_stays_within_bounds(right: bool, bound: float) -> None:
    """Logits that are always right want a temperature of 0; always wrong, an infinite one."""
    targets = np.tile(np.arange(3), 20)
    logits = 0.05 * np.eye(3, dtype=np.float32)[targets if right else (targets + 1) % 3]
    found = fit_temperature(logits, targets)
    assert found <= bound if right else found >= bound


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0, 1e4))
def test_any_logits_have_a_positive_and_finite_temperature(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(12, 3))).astype(np.float32)
    assert 0 < fit_temperature(logits, random.integers(0, 3, 12)) < 404


def test_centres_are_of_unit_length_and_of_their_class() -> None:
    vectors, targets, _ = clouds(3, count=40, noise=0.05)
    centres, owners = find_centres(vectors, targets, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    nearest = targets[(centres @ vectors.T).argmax(axis=1)]
    np.testing.assert_array_equal(nearest, owners)


def test_there_are_no_more_centres_than_different_prompts() -> None:
    vectors, targets, _ = clouds(2, count=5)
    centres, owners = find_centres(
        np.concatenate([vectors, vectors]), np.concatenate([targets, targets]), seed=0
    )
    assert len(centres) == 10
    assert np.bincount(owners).tolist() == [5, 5]


def test_centres_are_told_apart_out_of_fold_too() -> None:
    vectors, targets, weights = clouds(4, noise=0.3)
    logits = out_of_fold_logits(vectors, targets, weights, 1.0, True, seed=0)
    assert (logits.argmax(1) == targets).mean() > 0.9
