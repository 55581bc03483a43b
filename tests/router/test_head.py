"""From vectors to logits: linear, and with centres beside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from polymath.router import RouterHead
from polymath.router.head import LEAST_SHARE, SHARPNESS

Floats = NDArray[np.float32]

LABELS = 3
DIMENSIONS = 6


def units(rows: int, seed: int = 0) -> Floats:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIMENSIONS)).astype(np.float32)
    result: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result


def linear(seed: int = 1) -> RouterHead:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(LABELS, DIMENSIONS)).astype(np.float32)
    return RouterHead(weight, random.normal(size=LABELS).astype(np.float32))


def centred(owners: list[int], centres: Floats | None = None) -> RouterHead:
    plain = linear()
    known = units(len(owners), seed=2) if centres is None else centres
    return plain.with_centres(known, np.array(owners))


def test_without_centres_it_is_linear() -> None:
    head, vectors = linear(), units(5)
    np.testing.assert_allclose(head.logits(vectors), vectors @ head.weight.T + head.bias)


def test_with_centres_it_is_what_the_definition_says() -> None:
    """Mean of exp(sharpness * cosine) over each label's centres, as shares, by plain loops."""
    owners = [0, 0, 1, 2, 2, 2]
    head, vectors = centred(owners), units(4)
    assert head.centres is not None
    for vector, found in zip(vectors, head.logits(vectors), strict=True):
        votes = np.zeros(LABELS)
        for label in range(LABELS):
            mine = [c for c, owner in zip(head.centres, owners, strict=True) if owner == label]
            votes[label] = np.mean([np.exp(SHARPNESS * float(vector @ c)) for c in mine])
        shares = votes / votes.sum()
        expected = head.weight @ vector + head.bias + np.log(shares + LEAST_SHARE)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_vector_is_a_row_of_many() -> None:
    for head in (linear(), centred([0, 1, 2, 2])):
        vectors = units(3)
        alone = np.stack([head.logits(vector) for vector in vectors])
        np.testing.assert_allclose(alone, head.logits(vectors), atol=1e-5)


def test_centres_that_agree_with_all_labels_change_nothing() -> None:
    """The same centre for each label adds the same to each logit."""
    same = units(1, seed=3).repeat(LABELS, axis=0)
    head, vectors = centred([0, 1, 2], same), units(5)
    moved = head.logits(vectors) - linear().logits(vectors)
    np.testing.assert_allclose(moved, moved[:, :1].repeat(LABELS, axis=1), atol=1e-5)


def test_many_centres_of_a_label_do_not_drown_another() -> None:
    """What counts is the mean: a centre that is given ten times says what it says once."""
    centres = units(3, seed=4)
    once = centred([0, 1, 2], centres)
    often = centred(
        [0] * 10 + [1, 2], np.concatenate([centres[:1].repeat(10, axis=0), centres[1:]])
    )
    vectors = units(5)
    np.testing.assert_allclose(once.logits(vectors), often.logits(vectors), atol=1e-4)


def test_the_order_of_the_centres_does_not_matter() -> None:
    owners, order = [0, 1, 1, 2, 0], [3, 0, 4, 2, 1]
    centres, vectors = units(5, seed=5), units(4)
    shuffled = centred([owners[index] for index in order], centres[order])
    np.testing.assert_allclose(
        centred(owners, centres).logits(vectors), shuffled.logits(vectors), atol=1e-4
    )


def test_a_label_without_centres_is_not_ruled_out() -> None:
    logits = centred([0, 0, 1]).logits(units(6))
    assert np.isfinite(logits).all()


@given(scale=st.floats(0, 1e6, width=32))
def test_any_vector_gives_finite_logits(scale: float) -> None:
    vectors = np.float32(scale) * units(2)
    assert np.isfinite(centred([0, 1, 2]).logits(vectors)).all()


@pytest.mark.parametrize("label", range(LABELS))
def test_near_a_centre_its_label_gains(label: int) -> None:
    centres = units(LABELS, seed=6)
    head, vector = centred(list(range(LABELS)), centres), centres[label]
    gain = head.logits(vector) - linear().logits(vector)
    assert gain.argmax() == label
