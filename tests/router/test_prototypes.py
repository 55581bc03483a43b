"""Domains that are known by a handful of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.router import SentenceEncoder
from polymath.router.prototypes import (
    CONSIDERED,
    KEPT_QUANTILE,
    LEAST_VARIANCE,
    MANY,
    MOST_FAVOUR,
    SHRINKAGE,
    Prototypes,
)
from tests.router.conftest import Floats

WIDTH = 8
MANY_DOMAINS = 10_000
ROUNDING = 1e-3

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
FOREIGN = {
    "Write a Python function.": "coding",
    "My unit tests fail on Windows.": "coding",
    "What is a tort?": "law",
    "Can my landlord keep the deposit?": "law",
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


def two_domains(count: int) -> list[str]:
    return [("law", "coding")[index % 2] for index in range(count)]


def prototypes(
    examples: dict[str, Floats], references: Floats, domains: Sequence[str] | None = None
) -> Prototypes:
    return Prototypes(examples, references, domains or two_domains(len(references)))


NOTHING = np.empty((0, WIDTH), dtype=np.float32)


# --- the formula ---------------------------------------------------------------------------------


@given(seed=seeds, count=st.integers(1, 6))
def test_without_references_the_covariance_is_a_sphere(seed: int, count: int) -> None:
    """log odds = p (m v - m m / 2), as the precision is p times the identity."""
    examples, prompt = cloud(count, seed), cloud(1, seed + 1)[0]
    mean = examples.mean(axis=0)
    precision = WIDTH / (SHRINKAGE * LEAST_VARIANCE)
    expected = precision * (mean @ prompt - mean @ mean / 2)
    assert math.log(prototypes({"a": examples}, NOTHING).odds(prompt)["a"]) == pytest.approx(
        float(expected), abs=ROUNDING
    )


def gaussian_log_odds(examples: Floats, references: Floats, prompts: Floats) -> Floats:
    """By the densities of scipy: the new domain against the two trained ones together."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    parity = np.arange(len(references)) % 2
    means = [references[parity == index].mean(axis=0) for index in (0, 1)]
    deviations = references - np.stack(means)[parity]
    covariance = deviations.T @ deviations / len(references)
    sphere = max(np.trace(covariance), LEAST_VARIANCE) / WIDTH * np.eye(WIDTH)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere

    def density(mean: Floats) -> Floats:
        values: Floats = multivariate_normal(mean, shrunk).logpdf(prompts)
        return values

    rivals = logsumexp([density(mean) for mean in means], axis=0)
    difference: Floats = density(examples.mean(axis=0)) - rivals
    return difference


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_odds_are_those_of_gaussians_above_what_few_references_exceed(seed: int) -> None:
    examples, references, prompts = cloud(5, seed), cloud(60, seed + 1), cloud(4, seed + 2)
    threshold = np.quantile(gaussian_log_odds(examples, references, references), KEPT_QUANTILE)
    expected = gaussian_log_odds(examples, references, prompts) - max(threshold, -MOST_FAVOUR)
    new = prototypes({"a": examples}, references)
    found = [math.log(new.odds(prompt)["a"]) for prompt in prompts]
    np.testing.assert_allclose(found, expected, atol=1e-2, rtol=1e-3)


@given(seed=seeds, count=st.integers(2, 200))
@settings(deadline=None)
def test_few_references_leave_their_domains(seed: int, count: int) -> None:
    references = cloud(count, seed)
    new = prototypes({"a": cloud(5, seed + 1)}, references)
    left = sum(new.odds(vector)["a"] > 1 + ROUNDING for vector in references)
    assert left <= math.ceil((1 - KEPT_QUANTILE) * count)


# --- what follows from it ------------------------------------------------------------------------


def test_examples_are_likelier_and_references_unlikelier_than_not() -> None:
    examples, references = around(axis(0), 6, 0.1, 0), around(axis(3), 300, 0.1, 1)
    new = prototypes({"a": examples}, references)
    assert min(new.odds(vector)["a"] for vector in examples) > 1
    assert np.mean([new.odds(vector)["a"] > 1 for vector in references]) <= 0.01


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_examples_are_likeliest_of_their_own_domain(seed: int) -> None:
    examples = {f"d{index}": around(axis(index), 4, 0.1, seed + index) for index in range(5)}
    new = prototypes(examples, NOTHING)
    for domain, vectors in examples.items():
        for vector in vectors:
            odds = new.odds(vector)
            assert max(odds, key=lambda name: odds[name]) == domain


@given(seed=seeds, count=st.integers(1, 6))
@settings(deadline=None)
def test_the_order_of_the_examples_and_references_does_not_matter(seed: int, count: int) -> None:
    examples, references, prompt = cloud(count, seed), cloud(30, seed + 1), cloud(1, seed + 2)[0]
    domains = two_domains(30)
    forwards = Prototypes({"a": examples}, references, domains).odds(prompt)["a"]
    backwards = Prototypes({"a": examples[::-1]}, references[::-1], domains[::-1]).odds(prompt)
    assert math.log(forwards) == pytest.approx(math.log(backwards["a"]), abs=1e-2, rel=1e-3)


@given(seed=seeds)
@settings(deadline=None)
def test_other_new_domains_do_not_change_the_odds_of_a_domain(seed: int) -> None:
    first, second, references, prompt = (cloud(4, seed + i) for i in range(4))
    alone = prototypes({"a": first}, references).odds(prompt[0])["a"]
    beside = prototypes({"b": second, "a": first}, references).odds(prompt[0])["a"]
    assert math.log(beside) == pytest.approx(math.log(alone), abs=ROUNDING, rel=1e-3)


@given(seed=seeds, count=st.integers(1, 5), references=st.integers(0, 20))
@settings(deadline=None)
def test_any_vectors_have_finite_odds(seed: int, count: int, references: int) -> None:
    new = prototypes({"a": cloud(count, seed)}, cloud(references, seed + 1))
    for prompt in cloud(5, seed + 2):
        assert 0 <= new.odds(prompt)["a"] < math.inf


def test_alike_references_do_not_make_the_odds_infinite() -> None:
    new = prototypes({"a": axis(0)[None]}, np.repeat(axis(1)[None], 40, axis=0))
    assert 0 < new.odds(axis(0))["a"] < math.inf


def test_a_domain_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has no examples"):
        prototypes({"a": NOTHING}, cloud(4, 0))


# --- many domains --------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, CONSIDERED - 1, CONSIDERED, CONSIDERED + 1, 50])
def test_the_likeliest_domains_are_shown(domains: int) -> None:
    examples = {str(index): cloud(1, index) for index in range(domains)}
    prompt = cloud(1, 2_000)[0]
    shown = prototypes(examples, NOTHING).odds(prompt)
    each = {
        name: prototypes({name: vectors}, NOTHING).odds(prompt)[name]
        for name, vectors in examples.items()
    }
    best = sorted(each, key=lambda name: each[name], reverse=True)[:CONSIDERED]
    assert shown == pytest.approx({name: each[name] for name in best}, rel=ROUNDING)


def test_ten_thousand_domains_are_told_apart() -> None:
    width = 384
    centers = cloud(MANY_DOMAINS, 0, width)
    new = prototypes({f"d{i}": row[None] for i, row in enumerate(centers)}, cloud(500, 1, width))
    assert len(new.domains) == MANY_DOMAINS
    for index in range(0, MANY_DOMAINS, 487):
        odds = new.odds(around(centers[index], 1, 0.02, index)[0])
        assert max(odds, key=lambda name: odds[name]) == f"d{index}"
        assert len(odds) == CONSIDERED


def test_a_shortlist_in_few_dimensions_misses_nothing_that_lies_in_them() -> None:
    """In fewer dimensions than the shortlist keeps, all domains are compared exactly."""
    centers = cloud(MANY, 0, WIDTH)
    examples = {str(index): center[None] for index, center in enumerate(centers)}
    prompt = cloud(1, 2)[0]
    nearest = {str(index) for index in np.argsort(-(centers @ prompt))[:3]}
    few = prototypes({name: examples[name] for name in nearest}, NOTHING).odds(prompt)
    shown = prototypes(examples, NOTHING).odds(prompt)
    assert shown | few == pytest.approx(shown, rel=ROUNDING)


@pytest.mark.parametrize("domain", SPOKEN)
def test_a_prompt_like_the_examples_is_of_their_domain(
    minilm: SentenceEncoder, domain: str
) -> None:
    asked = {"cooking": "How do I fry an egg?", "chess": "Which opening should white play?"}
    examples = {name: minilm.encode(texts) for name, texts in SPOKEN.items()}
    new = Prototypes(examples, minilm.encode(list(FOREIGN)), list(FOREIGN.values()))
    odds = new.odds(minilm.encode([asked[domain]])[0])
    assert max(odds, key=lambda name: odds[name]) == domain
