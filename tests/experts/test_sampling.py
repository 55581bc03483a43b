"""One token from one distribution: greedy, seeded, truncated, biased and penalised."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymath.experts import Sampler, SamplingParams

VOCABULARY = 8
DRAWS = 4000
TOLERANCE = 0.03

seeds = st.integers(0, 2**63 - 1)
scores = st.permutations(range(VOCABULARY)).map(
    lambda order: torch.tensor(order, dtype=torch.float32).log_softmax(-1)
)
penalties = st.integers(-128, 128).map(lambda steps: steps / 64)


def sampler(**values: Any) -> Sampler:
    return Sampler(SamplingParams(**{"max_tokens": 1, **values}))


def sequence(log_probs: Tensor, length: int = 40, **values: Any) -> list[int]:
    drawn = sampler(**values)
    return [drawn.sample(log_probs) for _ in range(length)]


def distribution() -> Tensor:
    return torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -4.0]).log_softmax(-1)


def frequencies(log_probs: Tensor, **values: Any) -> Tensor:
    counts = Counter(sequence(log_probs, DRAWS, seed=0, **values))
    return torch.tensor([counts[token] / DRAWS for token in range(len(log_probs))])


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().sum() / 2 < TOLERANCE


def renormalised(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum()


@given(scores, seeds)
@settings(deadline=None)
def test_temperature_zero_is_the_likeliest_token(log_probs: Tensor, seed: int) -> None:
    assert sampler(temperature=0.0, seed=seed).sample(log_probs) == log_probs.argmax()


@given(scores, seeds)
@settings(deadline=None)
def test_temperature_zero_is_its_limit(log_probs: Tensor, seed: int) -> None:
    zero = sequence(log_probs, 4, temperature=0.0, presence_penalty=1.5, seed=seed)
    assert sequence(log_probs, 4, temperature=1e-6, presence_penalty=1.5, seed=seed) == zero


@pytest.mark.parametrize("temperature", [1e-4, 2e-5])
def test_a_temperature_near_zero_is_greedy_without_overflow(temperature: float) -> None:
    log_probs = torch.tensor([0.0, 1e3, -1e3]).log_softmax(-1)
    assert sampler(temperature=temperature, seed=0).sample(log_probs) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1},
        {"min_p": 1.0},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": 1e-9},
        {"top_p": 0.0, "min_p": 1.0, "top_k": 1},
    ],
    ids=str,
)
@given(log_probs=scores, seed=seeds)
@settings(deadline=None, max_examples=30)
def test_keeping_one_token_is_greedy_whatever_the_seed(
    values: dict[str, Any], log_probs: Tensor, seed: int
) -> None:
    drawn = sampler(temperature=2.0, seed=seed, **values)
    assert drawn.sample(log_probs) == log_probs.argmax()


@given(scores, seeds)
@settings(deadline=None, max_examples=20)
def test_the_same_seed_draws_the_same_tokens(log_probs: Tensor, seed: int) -> None:
    assert sequence(log_probs, seed=seed) == sequence(log_probs, seed=seed)


@given(scores, seeds)
@settings(deadline=None, max_examples=20)
def test_another_seed_draws_other_tokens(log_probs: Tensor, seed: int) -> None:
    assert sequence(log_probs, seed=seed) != sequence(log_probs, seed=seed ^ 1)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_seed_that_a_request_may_give_works(seed: int) -> None:
    assert sequence(distribution(), seed=seed) == sequence(distribution(), seed=seed)


def test_no_seed_draws_afresh() -> None:
    assert sequence(distribution()) != sequence(distribution())


def test_two_samplers_do_not_disturb_each_other() -> None:
    alone = sequence(distribution(), 20, seed=1)
    one, other = sampler(seed=1), sampler(seed=2)
    among = []
    for _ in range(20):
        among.append(one.sample(distribution()))
        other.sample(distribution())
    assert among == alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    found = frequencies(distribution(), temperature=temperature)
    assert_close(found, torch.softmax(distribution() / temperature, -1))


@pytest.mark.parametrize("top_k", [2, 5, VOCABULARY, 100])
def test_top_k_draws_from_the_k_likeliest(top_k: int) -> None:
    expected = distribution().exp()
    expected[top_k:] = 0
    assert_close(frequencies(distribution(), top_k=top_k), renormalised(expected))


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.6, 2), (0.8, 3), (0.9, 4), (0.999, 8)])
def test_top_p_draws_from_the_smallest_nucleus(top_p: float, kept: int) -> None:
    expected = distribution().exp()
    assert expected[: kept - 1].sum() < top_p <= expected[:kept].sum() + 1e-6
    expected[kept:] = 0
    assert_close(frequencies(distribution(), top_p=top_p), renormalised(expected))


@pytest.mark.parametrize(("min_p", "kept"), [(0.1, 5), (0.5, 2), (0.7, 1)])
def test_min_p_is_relative_to_the_likeliest(min_p: float, kept: int) -> None:
    expected = distribution().exp()
    assert (expected >= min_p * expected[0]).sum() == kept
    expected[kept:] = 0
    assert_close(frequencies(distribution(), min_p=min_p), renormalised(expected))


@given(log_probs=scores, seed=seeds, top_p=st.floats(0, 1), min_p=st.floats(0, 1))
@settings(deadline=None)
def test_any_truncation_leaves_a_token_to_draw(
    log_probs: Tensor, seed: int, top_p: float, min_p: float
) -> None:
    token = sampler(seed=seed, top_p=top_p, min_p=min_p, top_k=3).sample(log_probs)
    assert log_probs[token] >= log_probs.topk(3).values[-1]


def test_a_bias_of_minus_100_bans_a_token() -> None:
    assert 0 not in sequence(distribution(), 1000, logit_bias={0: -100.0}, seed=0)
    assert 0 not in sequence(distribution(), 5, logit_bias={0: -100.0}, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_bias_of_100_forces_a_token(temperature: float) -> None:
    values = {"logit_bias": {7: 100.0}, "temperature": temperature, "seed": 0}
    assert set(sequence(distribution(), 200, **values)) == {7}


def test_a_bias_is_added_to_the_logits() -> None:
    biased = distribution()
    biased[5] += 2.5
    found = frequencies(distribution(), logit_bias={5: 2.5})
    assert_close(found, torch.softmax(biased, -1))


@given(
    start=st.lists(st.integers(-128, 128).map(lambda n: n / 64), min_size=4, max_size=4),
    frequency=penalties,
    presence=penalties,
    bias=st.dictionaries(st.integers(0, 3), penalties),
)
@settings(deadline=None)
def test_penalties_are_the_formula_of_openai(
    start: list[float], frequency: float, presence: float, bias: dict[int, float]
) -> None:
    """mu[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty, in exact sixty-fourths."""
    drawn = sampler(
        temperature=0.0, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    counts = [0] * len(start)
    for _ in range(12):
        expected = [
            score + bias.get(j, 0.0) - counts[j] * frequency - (counts[j] > 0) * presence
            for j, score in enumerate(start)
        ]
        token = drawn.sample(torch.tensor(start))
        assert expected[token] == max(expected)
        counts[token] += 1


def test_a_presence_penalty_counts_once() -> None:
    log_probs = torch.tensor([1.0, 0.0])
    assert sequence(log_probs, 4, temperature=0.0, presence_penalty=0.75) == [0, 0, 0, 0]
    assert sequence(log_probs, 4, temperature=0.0, presence_penalty=1.25) == [0, 1, 0, 0]


def test_a_frequency_penalty_grows_with_every_use() -> None:
    log_probs = torch.tensor([1.0, 0.0])
    assert sequence(log_probs, 6, temperature=0.0, frequency_penalty=0.4) == [0, 0, 0, 1, 0, 1]


def test_penalties_change_what_is_drawn_and_not_only_what_is_greedy() -> None:
    plain = Counter(sequence(distribution(), 200, seed=3))
    penalised = Counter(sequence(distribution(), 200, seed=3, frequency_penalty=2.0))
    assert max(penalised.values()) < max(plain.values())
    assert set(penalised) == set(range(VOCABULARY))


def test_the_distribution_given_is_left_alone() -> None:
    log_probs = distribution()
    sequence(log_probs, 5, seed=0, logit_bias={1: 5.0}, presence_penalty=1.0, top_p=0.5, min_p=0.1)
    assert torch.equal(log_probs, distribution())


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    log_probs = torch.tensor([0.0, float("-inf"), 0.0]).log_softmax(-1)
    assert 1 not in sequence(log_probs, 500, seed=0, temperature=2.0)
