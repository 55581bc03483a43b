"""Domains that are known by a handful of examples."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.router import SentenceEncoder, halves
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
SENTENCE_WIDTH = 384
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


def prototypes(examples: dict[str, Floats], references: Floats, trained: int = 2) -> Prototypes:
    """The references are of the trained domains in turn."""
    return Prototypes(examples, references, [f"t{i % trained}" for i in range(len(references))])


def log_odds(new: Prototypes, vectors: Floats, domain: str = "a") -> Floats:
    return np.array([math.log(new.odds(vector)[domain]) for vector in vectors], dtype=np.float32)


def some_domains(count: int, seed: int) -> dict[str, Floats]:
    return {f"d{index}": cloud(3, seed + index) for index in range(count)}


def highest_log_odds(new: Prototypes, vectors: Floats) -> Floats:
    """Of any of the new domains."""
    highest = [math.log(max(new.odds(vector).values())) for vector in vectors]
    return np.array(highest, dtype=np.float32)


NOTHING = np.empty((0, WIDTH), dtype=np.float32)

LEAST_PRECISION = WIDTH / (SHRINKAGE * LEAST_VARIANCE)
"""Of references that do not differ."""


# --- the formula ---------------------------------------------------------------------------------


@given(seed=seeds, count=st.integers(1, 6))
@settings(deadline=None)
def test_without_references_the_covariance_is_a_sphere(seed: int, count: int) -> None:
    """log odds = p (m v - m m / 2) without a rival and a threshold, the precision p times one."""
    examples, prompts = cloud(count, seed), cloud(4, seed + 1)
    mean = examples.mean(axis=0)
    found = log_odds(prototypes({"a": examples}, NOTHING), prompts)
    np.testing.assert_allclose(
        found, LEAST_PRECISION * (prompts @ mean - mean @ mean / 2), atol=ROUNDING
    )


@given(seed=seeds)
@settings(deadline=None)
def test_far_from_all_references_a_domain_is_favoured_by_so_much_and_no_more(seed: int) -> None:
    """Two unit means m and r at right angles: log odds = p (m v - r v), which is -p at r."""
    new = prototypes({"a": axis(0)[None]}, np.repeat(axis(1)[None], 40, axis=0), trained=1)
    prompts = cloud(4, seed)
    expected = LEAST_PRECISION * (prompts[:, 0] - prompts[:, 1]) + MOST_FAVOUR
    np.testing.assert_allclose(log_odds(new, prompts), expected, atol=ROUNDING)


def gaussian_log_odds(
    examples: Floats, references: Floats, prompts: Floats, trained: int
) -> Floats:
    """By the densities of scipy: the new domain against the trained ones together."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    examples, references = examples.astype(np.float64), references.astype(np.float64)
    labels, width = np.arange(len(references)) % trained, references.shape[1]
    means = np.stack([references[labels == index].mean(axis=0) for index in range(trained)])
    deviations = references - means[labels]
    covariance = deviations.T @ deviations / len(references)
    sphere = max(np.trace(covariance), LEAST_VARIANCE) / width * np.eye(width)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere
    rivals = logsumexp([multivariate_normal(m, shrunk).logpdf(prompts) for m in means], axis=0)
    result: Floats = multivariate_normal(examples.mean(axis=0), shrunk).logpdf(prompts) - rivals
    return result


@given(seed=seeds, count=st.integers(1, 6), trained=st.integers(1, 4), width=st.integers(2, 8))
@settings(max_examples=50, deadline=None)
def test_odds_are_those_of_gaussians_beyond_what_few_references_have(
    seed: int, count: int, trained: int, width: int
) -> None:
    examples, references, prompts = (
        cloud(number, seed + index, width) for index, number in enumerate((count, 60, 4))
    )
    own = gaussian_log_odds(examples, references, references, trained)
    threshold = max(float(np.quantile(own, KEPT_QUANTILE)), -MOST_FAVOUR)
    expected = gaussian_log_odds(examples, references, prompts, trained) - threshold
    found = log_odds(prototypes({"a": examples}, references, trained), prompts)
    np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=ROUNDING)


@given(seed=seeds, count=st.integers(1, 300), trained=st.integers(1, 4), domains=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_of_a_hundred_references_at_most_two_leave_their_domains(
    seed: int, count: int, trained: int, domains: int
) -> None:
    """However many domains there are to leave for."""
    references = cloud(count * trained, seed)
    new = prototypes(some_domains(domains, seed + 1), references, trained)
    left = (highest_log_odds(new, references) > ROUNDING).sum()
    assert left <= math.ceil((1 - KEPT_QUANTILE) * len(references))


@given(seed=seeds, domains=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_the_threshold_is_no_higher_than_that_takes(seed: int, domains: int) -> None:
    """Of 1,000 references the last that may leave stands just above it, and the next below."""
    references = cloud(1000, seed)
    new = prototypes(some_domains(domains, seed + 1), references)
    found = np.sort(highest_log_odds(new, references))
    leaving = round((1 - KEPT_QUANTILE) * len(references))
    assert found[-leaving - 1] <= ROUNDING
    assert found[-leaving] >= -ROUNDING


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_domains_that_would_take_too_many_references_together_are_all_held_back(seed: int) -> None:
    """By the same: so much that the references which then leave are no more than of one domain."""
    examples, references, prompts = some_domains(5, seed), cloud(60, seed + 1), cloud(4, seed + 2)
    alone = {name: prototypes({name: some}, references) for name, some in examples.items()}
    taken = np.max([log_odds(new, references, name) for name, new in alone.items()], axis=0)
    less = max(0.0, float(np.quantile(taken, KEPT_QUANTILE)))
    together = prototypes(examples, references)
    for name, new in alone.items():
        np.testing.assert_allclose(
            log_odds(together, prompts, name),
            log_odds(new, prompts, name) - less,
            atol=ROUNDING,
            rtol=ROUNDING,
        )


# --- what follows from it ------------------------------------------------------------------------


def test_examples_are_likelier_and_references_unlikelier_than_not() -> None:
    examples, references = around(axis(0), 6, 0.1, 0), around(axis(3), 300, 0.1, 1)
    new = prototypes({"a": examples}, references)
    assert log_odds(new, examples).min() > 0
    assert (log_odds(new, references) > ROUNDING).mean() <= 1 - KEPT_QUANTILE


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_examples_are_likeliest_of_their_own_domain(seed: int) -> None:
    examples = {f"d{index}": around(axis(index), 4, 0.1, seed + index) for index in range(5)}
    for references in (NOTHING, cloud(200, seed)):
        new = prototypes(examples, references)
        for domain, vectors in examples.items():
            for vector in vectors:
                odds = new.odds(vector)
                assert max(odds, key=lambda name: odds[name]) == domain


@given(seed=seeds, count=st.integers(1, 6))
@settings(deadline=None)
def test_the_order_of_examples_and_of_references_does_not_matter(seed: int, count: int) -> None:
    examples, references, prompts = cloud(count, seed), cloud(30, seed + 1), cloud(3, seed + 2)
    domains = [f"t{index % 3}" for index in range(30)]
    order = np.random.default_rng(seed).permutation(30)
    forwards = Prototypes({"a": examples}, references, domains)
    shuffled = Prototypes({"a": examples[::-1]}, references[order], [domains[i] for i in order])
    np.testing.assert_allclose(
        log_odds(forwards, prompts), log_odds(shuffled, prompts), atol=ROUNDING, rtol=ROUNDING
    )


@given(seed=seeds, times=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_references_that_are_all_repeated_say_no_more(seed: int, times: int) -> None:
    """Of 1,001 references the quantile is one of them itself; else it lies between two of them, and
    where between depends a little on how many there are."""
    examples, references, prompts = cloud(3, seed), cloud(1001, seed + 1), cloud(3, seed + 2)
    domains = [f"t{index % 2}" for index in range(1001)]
    once = Prototypes({"a": examples}, references, domains)
    often = Prototypes({"a": examples}, np.tile(references, (times, 1)), domains * times)
    np.testing.assert_allclose(
        log_odds(often, prompts), log_odds(once, prompts), atol=ROUNDING, rtol=ROUNDING
    )


def test_one_example_that_is_repeated_is_one_example() -> None:
    references, prompt = cloud(20, 0), cloud(1, 1)[0]
    once, thrice = (
        prototypes({"a": np.repeat(axis(0)[None], times, axis=0)}, references).odds(prompt)
        for times in (1, 3)
    )
    assert once == pytest.approx(thrice, rel=ROUNDING)


def test_the_names_of_the_trained_domains_do_not_matter() -> None:
    """Not even that a new domain has the name of a trained one."""
    references, prompt = cloud(30, 0), cloud(1, 1)[0]
    named, other = (
        Prototypes({"a": cloud(3, 2)}, references, names * 15).odds(prompt)
        for names in (["a", "b"], ["law", "coding"])
    )
    assert named == other


@given(seed=seeds)
@settings(deadline=None)
def test_without_references_other_new_domains_do_not_change_the_odds_of_a_domain(
    seed: int,
) -> None:
    first, second, prompts = (cloud(number, seed + number) for number in (3, 4, 5))
    alone = log_odds(prototypes({"a": first}, NOTHING), prompts)
    beside = log_odds(prototypes({"b": second, "a": first}, NOTHING), prompts)
    np.testing.assert_allclose(beside, alone, atol=ROUNDING, rtol=ROUNDING)


@given(
    seed=seeds,
    examples=st.integers(1, 4),
    references=st.integers(0, 20),
    trained=st.integers(1, 4),
    width=st.integers(2, 9),
)
@settings(deadline=None)
def test_odds_are_finite_and_never_negative_whatever_the_vectors(
    seed: int, examples: int, references: int, trained: int, width: int
) -> None:
    vectors, known = cloud(examples, seed, width), cloud(references, seed + 1, width)
    new = prototypes({"a": vectors}, known, trained)
    for vector in (*vectors, *known, *-known, *cloud(4, seed + 2, width)):
        assert 0 <= new.odds(vector)["a"] < math.inf


@pytest.mark.filterwarnings("error")
def test_examples_that_cancel_out_are_no_division_by_zero() -> None:
    new = prototypes({"a": np.stack([axis(0), -axis(0)])}, cloud(10, 0))
    assert 0 < new.odds(axis(0))["a"] < math.inf


@pytest.mark.parametrize("references", [NOTHING, cloud(4, 0)])
def test_a_domain_without_examples_is_refused_by_name(references: Floats) -> None:
    with pytest.raises(ValueError, match="domain 'b' has no examples"):
        prototypes({"a": cloud(2, 1), "b": NOTHING}, references)


def test_domains_keep_their_order() -> None:
    examples = {name: cloud(2, index) for index, name in enumerate("zax")}
    assert prototypes(examples, NOTHING).domains == ("z", "a", "x")


# --- many domains --------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, CONSIDERED - 1, CONSIDERED, CONSIDERED + 1, 50])
def test_only_the_likeliest_domains_are_shown(domains: int) -> None:
    examples = {str(index): cloud(1, index) for index in range(domains)}
    references, prompt = cloud(50, 1_000), cloud(1, 2_000)[0]
    shown = prototypes(examples, references).odds(prompt)
    alone = {name: prototypes({name: some}, references) for name, some in examples.items()}
    each = {name: new.odds(prompt)[name] for name, new in alone.items()}
    best = sorted(each, key=lambda name: each[name], reverse=True)[:CONSIDERED]
    taken = np.max([log_odds(new, references, name) for name, new in alone.items()], axis=0)
    less = max(1.0, math.exp(np.quantile(taken, KEPT_QUANTILE)))
    assert shown == pytest.approx({name: each[name] / less for name in best}, rel=ROUNDING)


@pytest.mark.parametrize("block", [1, 7, 49, 50])
def test_how_many_domains_are_compared_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    examples, references, prompt = some_domains(50, 0), cloud(50, 1_000), cloud(1, 2_000)[0]
    at_once = prototypes(examples, references).odds(prompt)
    monkeypatch.setattr("polymath.router.prototypes.BLOCK", block)
    assert prototypes(examples, references).odds(prompt) == pytest.approx(at_once, rel=ROUNDING)


def test_a_shortlist_in_few_dimensions_misses_nothing_that_lies_in_them() -> None:
    """In fewer dimensions than the shortlist keeps, all domains are compared exactly."""
    examples = {str(index): row[None] for index, row in enumerate(cloud(MANY, 0))}
    references = cloud(50, 1)
    many, full = prototypes(examples, references), in_full(examples, references)
    for prompt in cloud(20, 2):
        assert many.odds(prompt) == pytest.approx(full.odds(prompt), rel=ROUNDING)


def in_full(examples: dict[str, Floats], references: Floats) -> Prototypes:
    """The same without a shortlist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polymath.router.prototypes.MANY", len(examples) + 1)
        return prototypes(examples, references)


@pytest.fixture(scope="module")
def clustered() -> dict[str, Floats]:
    """Ten thousand domains as they come: a hundred fields of a hundred each."""
    fields = cloud(100, 0, SENTENCE_WIDTH)
    return {
        f"{field}.{index}": row[None]
        for field, center in enumerate(fields)
        for index, row in enumerate(around(center, MANY_DOMAINS // 100, 0.04, field))
    }


@pytest.fixture(scope="module")
def spread_references() -> Floats:
    return cloud(500, 1, SENTENCE_WIDTH)


@pytest.fixture(scope="module")
def ten_thousand(clustered: dict[str, Floats], spread_references: Floats) -> Prototypes:
    return prototypes(clustered, spread_references)


def test_ten_thousand_domains_are_told_apart(
    ten_thousand: Prototypes, clustered: dict[str, Floats]
) -> None:
    assert len(ten_thousand.domains) == MANY_DOMAINS
    for index, (name, vectors) in enumerate([*clustered.items()][::487]):
        odds = ten_thousand.odds(around(vectors[0], 1, 0.02, index)[0])
        assert max(odds, key=lambda name: odds[name]) == name
        assert len(odds) == CONSIDERED


def test_the_shortlist_of_ten_thousand_has_the_best(
    ten_thousand: Prototypes, clustered: dict[str, Floats], spread_references: Floats
) -> None:
    """Also of prompts half way between two domains, where the next best are as near."""
    full, names = in_full(clustered, spread_references), list(clustered)
    first, second = np.random.default_rng(0).integers(0, MANY_DOMAINS, (2, 30))
    for one, other in zip(first, second, strict=True):
        middle = unit(clustered[names[one]][0] + clustered[names[other]][0])
        found, expected = ten_thousand.odds(middle), full.odds(middle)
        best = max(expected, key=lambda name: expected[name])
        assert max(found, key=lambda name: found[name]) == best
        assert found[best] == pytest.approx(expected[best], rel=0.01)


def test_ten_thousand_domains_are_compared_in_a_moment(ten_thousand: Prototypes) -> None:
    started = time.perf_counter()
    for prompt in cloud(20, 2, SENTENCE_WIDTH):
        ten_thousand.odds(prompt)
    assert (time.perf_counter() - started) / 20 < 0.05


@pytest.mark.parametrize("domain", SPOKEN)
def test_a_prompt_like_the_examples_is_of_their_domain(
    minilm: SentenceEncoder, domain: str
) -> None:
    """By the inner halves."""
    asked = {"cooking": "How do I fry an egg?", "chess": "Which opening should white play?"}
    examples = {name: halves(minilm.encode(texts))[1] for name, texts in SPOKEN.items()}
    _, references = halves(minilm.encode(list(FOREIGN)))
    new = Prototypes(examples, references, list(FOREIGN.values()))
    odds = new.odds(halves(minilm.encode([asked[domain]]))[1][0])
    assert max(odds, key=lambda name: odds[name]) == domain


def test_of_two_certain_domains_the_likelier_is_told() -> None:
    """Log odds of some hundreds would not be floats; they keep their order."""
    width = SENTENCE_WIDTH
    new = prototypes({"a": axis(0, width)[None], "b": axis(1, width)[None]}, cloud(500, 0, width))
    leaning = unit(axis(0, width) + np.float32(0.6) * axis(1, width))
    odds = new.odds(leaning)
    assert odds["a"] > odds["b"]
