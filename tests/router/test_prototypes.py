"""Domains that are known by a handful of examples."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.router import SentenceEncoder
from polymath.router.prototypes import CONSIDERED, LEAST_GAP, LOG_ODDS, MANY, Prototypes
from tests.router.conftest import Floats

WIDTH = 8
MANY_DOMAINS = 10_000
ROUNDING = 1e-4

SPOKEN = {
    "cooking": [
        "How long do I boil an egg?",
        "My dough does not rise. What did I do wrong?",
        "What can I cook with leeks and potatoes?",
    ],
    "chess": [
        "Is the Sicilian Defence good for beginners?",
        "How does castling work if the rook was attacked?",
        "Mate in two: white to move.",
    ],
}

seeds = st.integers(0, 2**32 - 1)


def unit(vectors: Floats) -> Floats:
    rows: Floats = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return rows


def around(center: Floats, count: int, spread: float, seed: int) -> Floats:
    noise = np.random.default_rng(seed).normal(size=(count, center.shape[-1]))
    return unit((center + spread * noise).astype(np.float32))


def cloud(count: int, seed: int, width: int = WIDTH) -> Floats:
    return around(np.zeros(width, dtype=np.float32), count, 1.0, seed)


def axis(index: int, width: int = WIDTH) -> Floats:
    row: Floats = np.eye(width, dtype=np.float32)[index]
    return row


NOTHING = np.empty((0, WIDTH), dtype=np.float32)


def test_at_the_two_measured_similarities_the_odds_are_the_two_borders() -> None:
    """One example has a similarity of 1 to itself; a lone reference at right angles has one of 0:
    the odds are e^4 at the one and e^-4 at the other, and even half way."""
    domain = Prototypes({"a": axis(0)[None]}, axis(1)[None])
    half_way = np.float32(0.5) * axis(0) + np.float32(math.sqrt(0.75)) * axis(2)
    assert domain.odds(axis(0))["a"] == pytest.approx(math.exp(LOG_ODDS))
    assert domain.odds(axis(1))["a"] == pytest.approx(math.exp(-LOG_ODDS))
    assert domain.odds(half_way)["a"] == pytest.approx(1.0)


@given(angle=st.floats(0.1, 1.5))
def test_an_example_is_compared_with_the_others_not_with_itself(angle: float) -> None:
    """Two examples at an angle have its cosine, and each lies at half the angle to their mean."""
    other = np.float32(math.cos(angle)) * axis(0) + np.float32(math.sin(angle)) * axis(2)
    domain = Prototypes({"a": np.stack([axis(0), other])}, axis(1)[None])
    own = math.cos(angle)
    expected = (math.cos(angle / 2) - own / 2) * 2 * LOG_ODDS / max(own, LEAST_GAP)
    assert math.log(domain.odds(axis(0))["a"]) == pytest.approx(expected, rel=1e-3)


@given(seed=seeds, similarity=st.floats(-1, 1))
def test_odds_depend_on_the_similarity_alone(seed: int, similarity: float) -> None:
    domain = Prototypes({"a": axis(0)[None]}, axis(1)[None])
    aside = cloud(1, seed)[0]
    aside[0] = 0
    vector = np.float32(similarity) * axis(0) + np.float32(math.sqrt(1 - similarity**2)) * unit(
        aside
    )
    expected = 2 * LOG_ODDS * (similarity - 0.5)
    assert math.log(domain.odds(vector)["a"]) == pytest.approx(expected, abs=ROUNDING)


@given(seed=seeds)
def test_more_similar_is_never_less_likely(seed: int) -> None:
    examples, references, prompts = around(axis(0), 4, 0.2, seed), cloud(50, seed), cloud(20, seed)
    domain = Prototypes({"a": examples}, references)
    similarities = prompts @ unit(examples.mean(axis=0))
    odds = [domain.odds(prompt)["a"] for prompt in prompts[similarities.argsort()]]
    assert all(left <= right * (1 + ROUNDING) for left, right in itertools.pairwise(odds))


@given(seed=seeds)
@settings(max_examples=30)
def test_examples_are_likeliest_of_their_own_domain(seed: int) -> None:
    examples = {f"d{index}": around(axis(index), 4, 0.15, seed + index) for index in range(5)}
    prototypes = Prototypes(examples, cloud(200, seed))
    for domain, vectors in examples.items():
        for vector in vectors:
            odds = prototypes.odds(vector)
            assert max(odds, key=lambda name: odds[name]) == domain


def test_examples_are_likelier_and_references_unlikelier_than_not() -> None:
    examples, references = around(axis(0), 6, 0.1, 0), around(axis(3), 300, 0.1, 1)
    prototypes = Prototypes({"a": examples}, references)
    assert min(prototypes.odds(vector)["a"] for vector in examples) > 1
    assert max(prototypes.odds(vector)["a"] for vector in references) < 1


@given(seed=seeds, count=st.integers(1, 6))
def test_the_order_of_the_examples_does_not_matter(seed: int, count: int) -> None:
    examples, references = around(axis(0), count, 0.3, seed), cloud(20, seed)
    prompt = cloud(1, seed + 1)[0]
    there, back = (
        Prototypes({"a": vectors}, references).odds(prompt)["a"]
        for vectors in (examples, examples[::-1])
    )
    assert there == pytest.approx(back, rel=ROUNDING)


@given(seed=seeds)
def test_another_domain_does_not_change_the_odds_of_the_first(seed: int) -> None:
    first, second, references = around(axis(0), 3, 0.2, seed), cloud(3, seed), cloud(20, seed)
    prompt = cloud(1, seed + 1)[0]
    alone = Prototypes({"a": first}, references).odds(prompt)["a"]
    beside = Prototypes({"b": second, "a": first}, references).odds(prompt)["a"]
    assert alone == pytest.approx(beside, rel=ROUNDING)


def test_one_example_that_is_repeated_is_one_example() -> None:
    references, prompt = cloud(20, 0), cloud(1, 1)[0]
    once, thrice = (
        Prototypes({"a": np.repeat(axis(0)[None], times, axis=0)}, references).odds(prompt)
        for times in (1, 3)
    )
    assert once == pytest.approx(thrice, rel=ROUNDING)


def test_without_references_the_foreign_similarity_is_zero() -> None:
    assert Prototypes({"a": axis(0)[None]}, NOTHING).odds(axis(0)) == pytest.approx(
        Prototypes({"a": axis(0)[None]}, axis(1)[None]).odds(axis(0))
    )


@given(
    seed=seeds, examples=st.integers(1, 4), references=st.integers(0, 5), width=st.integers(2, 9)
)
def test_odds_are_finite_and_positive_whatever_the_examples(
    seed: int, examples: int, references: int, width: int
) -> None:
    vectors = cloud(examples, seed, width)
    prototypes = Prototypes({"a": vectors}, cloud(references, seed + 1, width))
    for vector in (*vectors, *cloud(4, seed + 2, width), unit(vectors.mean(axis=0))):
        odds = prototypes.odds(vector)["a"]
        assert math.isfinite(odds)
        assert odds > 0


@pytest.mark.filterwarnings("error")
def test_examples_that_have_nothing_in_common_do_not_overflow() -> None:
    """The border is as sharp as it may be, and their own mean lies far beyond: e^113."""
    opposite = Prototypes({"a": np.stack([axis(0), axis(1)])}, NOTHING)
    assert math.isfinite(opposite.odds(unit(axis(0) + axis(1)))["a"])


@pytest.mark.filterwarnings("error")
def test_examples_that_cancel_out_are_no_division_by_zero() -> None:
    prototypes = Prototypes({"a": np.stack([axis(0), -axis(0)])}, cloud(10, 0))
    assert math.isfinite(prototypes.odds(axis(0))["a"])


def test_domains_keep_their_order() -> None:
    examples = {name: cloud(2, index) for index, name in enumerate("zax")}
    assert Prototypes(examples, NOTHING).domains == ("z", "a", "x")


@pytest.mark.parametrize("domains", [1, CONSIDERED - 1, CONSIDERED, CONSIDERED + 1, 50])
def test_the_likeliest_domains_are_shown(domains: int) -> None:
    examples = {str(index): cloud(1, index) for index in range(domains)}
    references, prompt = cloud(50, 1_000), cloud(1, 2_000)[0]
    shown = Prototypes(examples, references).odds(prompt)
    each = {
        name: Prototypes({name: vectors}, references).odds(prompt)[name]
        for name, vectors in examples.items()
    }
    best = sorted(each, key=lambda name: each[name], reverse=True)[:CONSIDERED]
    assert shown == pytest.approx({name: each[name] for name in best}, rel=ROUNDING)


def test_ten_thousand_domains_are_told_apart() -> None:
    width = 384
    centers = cloud(MANY_DOMAINS, 0, width)
    examples = {f"d{index}": center[None] for index, center in enumerate(centers)}
    prototypes = Prototypes(examples, cloud(500, 1, width))
    assert len(prototypes.domains) == MANY_DOMAINS
    for index in range(0, MANY_DOMAINS, 487):
        odds = prototypes.odds(around(centers[index], 1, 0.02, index)[0])
        assert max(odds, key=lambda name: odds[name]) == f"d{index}"
        assert len(odds) == CONSIDERED


def test_ten_thousand_domains_are_compared_in_a_moment() -> None:
    width = 384
    examples = {f"d{index}": row[None] for index, row in enumerate(cloud(MANY_DOMAINS, 0, width))}
    prototypes = Prototypes(examples, cloud(500, 1, width))
    started = time.perf_counter()
    for prompt in cloud(20, 2, width):
        prototypes.odds(prompt)
    assert (time.perf_counter() - started) / 20 < 0.05


def test_a_shortlist_in_few_dimensions_misses_nothing_that_lies_in_them() -> None:
    """In fewer dimensions than the shortlist keeps, all prototypes are compared exactly."""
    centers = cloud(MANY, 0, WIDTH)
    examples = {str(index): center[None] for index, center in enumerate(centers)}
    references = cloud(50, 1)
    many, prompt = Prototypes(examples, references), cloud(1, 2)[0]
    nearest = {str(index) for index in np.argsort(-(centers @ prompt))[:3]}
    few = Prototypes({name: examples[name] for name in nearest}, references).odds(prompt)
    shown = many.odds(prompt)
    assert shown | few == pytest.approx(shown, rel=1e-3)


@pytest.mark.parametrize("domain", SPOKEN)
def test_a_prompt_like_the_examples_is_of_their_domain(
    minilm: SentenceEncoder, domain: str
) -> None:
    asked = {"cooking": "How do I fry an egg?", "chess": "Which opening should white play?"}
    foreign = minilm.encode(
        ["Write a Python function.", "What is a tort?", "Integrate x squared.", "My knee hurts."]
    )
    examples = {name: minilm.encode(texts) for name, texts in SPOKEN.items()}
    odds = Prototypes(examples, foreign).odds(minilm.encode([asked[domain]])[0])
    assert max(odds, key=lambda name: odds[name]) == domain
