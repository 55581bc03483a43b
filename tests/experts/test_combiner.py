"""Combiners: what several rows say becomes one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from polymath.experts import (
    Combiner,
    CombinerState,
    Mixture,
    Posterior,
    ProxyTuning,
    Select,
    WeightedLogits,
    posterior_weights,
)

LOGITS = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
FLOAT32 = 1e-4
"""Nats; what float32 keeps of logits that differ by up to 200."""

COMBINERS = [
    Select(1),
    WeightedLogits((0.5, -0.3, 0.8)),
    ProxyTuning(1.5),
    Mixture((1, 2, 3)),
    Posterior((0.2, 0.3, 0.5)),
]

rows_of_logits = arrays(np.float32, (3, 9), elements=st.floats(-100, 100, width=32)).map(
    torch.from_numpy
)
shares_of_rows = st.tuples(*[st.integers(0, 20)] * 3).filter(any)
priors = st.tuples(*[st.floats(0.01, 1)] * 3)
likelihoods = st.tuples(*[st.floats(-60, 0)] * 3)


def state(
    log_likelihood: Sequence[float] = (0.0, 0.0, 0.0),
    scored: Sequence[int] | None = None,
    answer_tokens: int = 8,
) -> CombinerState:
    """A group in progress; unless told otherwise, every row has scored the whole answer."""
    counts = [answer_tokens] * len(log_likelihood) if scored is None else scored
    return CombinerState(torch.tensor(log_likelihood), torch.tensor(counts), answer_tokens)


def combined(combiner: Combiner, logits: Tensor, before: CombinerState | None = None) -> Tensor:
    return combiner(logits, before or state())[0]


def mixed(logits: Tensor, shares: Sequence[float]) -> Tensor:
    """log sum_j w_j softmax_j in float64."""
    weights = torch.tensor(shares, dtype=torch.float64)
    terms = logits.double().log_softmax(-1) + (weights / weights.sum()).log()[:, None]
    return terms.logsumexp(0)


def bayes(prior: Sequence[float], log_likelihood: Sequence[float]) -> list[float]:
    best = max(log_likelihood)
    joint = [p * math.exp(nats - best) for p, nats in zip(prior, log_likelihood, strict=True)]
    return [value / sum(joint) for value in joint]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=FLOAT32)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_select_is_the_log_softmax_of_its_row(row: int) -> None:
    log_probs, _ = Select(row)(LOGITS, None)
    assert torch.equal(log_probs, LOGITS[row].log_softmax(-1))


def test_select_gives_a_distribution() -> None:
    log_probs, _ = Select(1)(LOGITS, None)
    assert log_probs.exp().sum().item() == pytest.approx(1.0)


def test_select_takes_the_first_row_unless_told_otherwise() -> None:
    assert torch.equal(Select()(LOGITS, None)[0], Select(0)(LOGITS, None)[0])


def test_select_does_not_see_the_other_rows() -> None:
    alone, _ = Select(0)(LOGITS[2:], None)
    among, _ = Select(2)(LOGITS, None)
    assert torch.equal(alone, among)


@pytest.mark.parametrize("state", [None, 3, {"step": 1}])
def test_select_hands_the_state_on(state: object) -> None:
    assert Select()(LOGITS, state)[1] is state


def test_select_leaves_the_logits_alone() -> None:
    before = LOGITS.clone()
    Select(1)(LOGITS, None)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    "combiner",
    [WeightedLogits((1, 0, 0)), Mixture((1, 0, 0)), Posterior((1, 0, 0)), ProxyTuning(0.0)],
    ids=str,
)
def test_all_weight_on_the_first_row_is_that_row_exactly(combiner: Combiner) -> None:
    assert torch.equal(combined(combiner, LOGITS), combined(Select(0), LOGITS))


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("combine", [WeightedLogits, Mixture, Posterior])
def test_all_weight_on_any_row_is_that_row_exactly(combine: type[Combiner], row: int) -> None:
    alone = tuple(float(index == row) for index in range(3))
    assert torch.equal(combined(combine(alone), LOGITS), combined(Select(row), LOGITS))


@pytest.mark.parametrize(
    "combiner",
    [WeightedLogits((0, 1, 0)), Mixture((0, 1, 1)), Posterior((0, 1, 1)), ProxyTuning(0.0)],
    ids=str,
)
def test_a_row_without_weight_is_not_looked_at(combiner: Combiner) -> None:
    unknown = LOGITS.clone()
    unused = [not weight for weight in combiner.weights(state())]
    unknown[torch.tensor(unused)] = math.nan
    assert any(unused)
    assert torch.equal(combined(combiner, unknown), combined(combiner, LOGITS))


@given(rows_of_logits, st.floats(-3, 3))
def test_proxy_tuning_with_equal_experts_is_the_large_model(logits: Tensor, alpha: float) -> None:
    """M+ == M-: s_M + alpha (s_M+ - s_M-) is s_M to the last bit."""
    logits[2] = logits[1]
    assert torch.equal(combined(ProxyTuning(alpha), logits), combined(Select(0), logits))


@given(rows_of_logits)
def test_proxy_tuning_with_equal_bases_is_the_tuned_expert(logits: Tensor) -> None:
    """M == M-, alpha = 1: s_M + (s_M+ - s_M-) is s_M+ as far as float32 keeps it."""
    logits[2] = logits[0]
    assert_close(combined(ProxyTuning(1.0), logits), combined(Select(1), logits))


@given(rows_of_logits, st.floats(-3, 3))
def test_proxy_tuning_is_the_sum_of_its_coefficients(logits: Tensor, alpha: float) -> None:
    steered = ProxyTuning(alpha)
    assert tuple(steered.weights(state())) == (1, alpha, -alpha)
    expected = torch.tensor([1, alpha, -alpha], dtype=torch.float64) @ logits.double()
    assert_close(combined(steered, logits), expected.log_softmax(-1))


@given(rows_of_logits, st.tuples(*[st.floats(-2, 2)] * 3).filter(any))
def test_weighted_logits_are_the_softmax_of_the_weighted_sum(
    logits: Tensor, coefficients: tuple[float, ...]
) -> None:
    expected = torch.tensor(coefficients, dtype=torch.float64) @ logits.double()
    assert_close(combined(WeightedLogits(coefficients), logits), expected.log_softmax(-1))


def test_weighted_logits_are_not_normalised() -> None:
    sharper = combined(WeightedLogits((2, 0, 0)), LOGITS)
    assert torch.equal(sharper, (2 * LOGITS[0]).log_softmax(-1))


@given(rows_of_logits, shares_of_rows)
def test_a_mixture_is_the_weighted_sum_of_probabilities(
    logits: Tensor, shares: tuple[int, ...]
) -> None:
    assert_close(combined(Mixture(shares), logits), mixed(logits, shares))


@given(rows_of_logits, shares_of_rows, st.integers(0, 8))
def test_a_mixture_knows_how_unlikely_a_token_is_that_underflows(
    logits: Tensor, shares: tuple[int, ...], token: int
) -> None:
    """A spread of 200 is e^-200, which float32 does not have; a grammar may leave nothing else."""
    logits[:, token] = -100
    logits[:, token - 1] = 100
    found = combined(Mixture(shares), logits)
    assert found.isfinite().all()
    assert found[token] < -190
    assert_close(found, mixed(logits, shares))


@given(rows_of_logits, shares_of_rows)
def test_a_mixture_of_equal_rows_is_that_row(logits: Tensor, shares: tuple[int, ...]) -> None:
    logits[1:] = logits[0]
    assert_close(combined(Mixture(shares), logits), combined(Select(0), logits))


@given(rows_of_logits, shares_of_rows, st.floats(0.01, 100))
def test_the_scale_of_shares_does_not_matter(
    logits: Tensor, shares: tuple[int, ...], scale: float
) -> None:
    scaled = tuple(share * scale for share in shares)
    assert_close(combined(Mixture(scaled), logits), combined(Mixture(shares), logits))


def test_a_mixture_excludes_what_every_row_excludes() -> None:
    logits = LOGITS.clone()
    logits[:, 3] = -math.inf
    log_probs = combined(Mixture((1, 1, 1)), logits)
    assert log_probs[3] == -math.inf
    assert log_probs.exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("combiner", COMBINERS, ids=str)
@given(logits=rows_of_logits, nats=likelihoods)
def test_every_combiner_gives_a_distribution(
    combiner: Combiner, logits: Tensor, nats: tuple[float, ...]
) -> None:
    log_probs = combined(combiner, logits, state(nats))
    assert log_probs.shape == logits.shape[1:]
    assert log_probs.double().exp().sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("combiner", COMBINERS, ids=str)
def test_every_combiner_hands_the_state_on_and_leaves_the_logits_alone(combiner: Combiner) -> None:
    before, kept = state(), LOGITS.clone()
    assert combiner(LOGITS, before)[1] is before
    assert torch.equal(LOGITS, kept)


@pytest.mark.parametrize("combiner", COMBINERS, ids=str)
def test_every_combiner_has_a_weight_for_each_row(combiner: Combiner) -> None:
    assert len(combiner.weights(state())) == 3


@pytest.mark.parametrize("combiner", COMBINERS, ids=str)
def test_only_the_posterior_follows_the_text(combiner: Combiner) -> None:
    assert combiner.follows_text == isinstance(combiner, Posterior)


@given(priors, likelihoods)
def test_the_posterior_is_the_rule_of_bayes(
    prior: tuple[float, ...], nats: tuple[float, ...]
) -> None:
    found = Posterior(prior, floor=0.0).weights(state(nats))
    assert found == pytest.approx(bayes(prior, nats), rel=1e-3, abs=1e-6)


@given(priors)
def test_the_posterior_before_the_first_token_is_the_prior(prior: tuple[float, ...]) -> None:
    expected = [share / sum(prior) for share in prior]
    before = state(answer_tokens=0)
    assert Posterior(prior, floor=0.0).weights(before) == pytest.approx(expected, abs=1e-6)


@given(rows_of_logits, priors, likelihoods)
def test_the_posterior_mixes_with_its_weights(
    logits: Tensor, prior: tuple[float, ...], nats: tuple[float, ...]
) -> None:
    posterior = Posterior(prior)
    weights = tuple(posterior.weights(state(nats)))
    found = combined(posterior, logits, state(nats))
    assert_close(found, combined(Mixture(weights), logits))


@given(st.floats(0.05, 0.95), st.floats(-40, 0), st.floats(-40, 0))
def test_the_row_that_found_the_answer_likelier_gains(
    share: float, nats: float, other: float
) -> None:
    assume(abs(nats - other) > 1e-3)
    weight, _ = Posterior((share, 1 - share), floor=0.0).weights(state((nats, other)))
    assert (weight > share) == (nats > other)


@given(priors, likelihoods, st.integers(1, 4) | st.none(), st.floats(0, 0.99))
def test_the_posterior_keeps_the_best_few_and_their_proportions(
    prior: tuple[float, ...], nats: tuple[float, ...], top_k: int | None, floor: float
) -> None:
    full = Posterior(prior, floor=0.0).weights(state(nats))
    found = Posterior(prior, top_k, floor).weights(state(nats))
    best = full.index(max(full))
    kept = [index for index, weight in enumerate(found) if weight]
    assert sum(found) == pytest.approx(1.0)
    assert min(found) >= 0
    assert best in kept
    assert len(kept) <= (top_k or 3)
    assert all(full[index] > floor - 1e-6 for index in kept if index != best)
    mass = sum(full[index] for index in kept)
    assert [found[index] for index in kept] == pytest.approx([full[i] / mass for i in kept])


def test_a_row_below_the_floor_is_dropped() -> None:
    prior = (0.6, 0.395, 0.005)
    assert Posterior(prior).weights(state()) == pytest.approx([0.6 / 0.995, 0.395 / 0.995, 0.0])
    assert Posterior(prior, floor=0.001).weights(state()) == pytest.approx(prior)


def test_the_best_row_stays_even_below_the_floor() -> None:
    assert Posterior((0.3, 0.4, 0.3), floor=0.9).weights(state()) == [0.0, 1.0, 0.0]


def test_top_k_keeps_the_likeliest() -> None:
    weights = Posterior((0.5, 0.2, 0.3), top_k=2).weights(state())
    assert weights == pytest.approx([0.5 / 0.8, 0.0, 0.3 / 0.8])


def test_a_top_k_above_the_number_of_rows_keeps_all() -> None:
    assert Posterior((0.5, 0.2, 0.3), top_k=9).weights(state()) == pytest.approx([0.5, 0.2, 0.3])


def test_a_dropped_row_is_expected_to_go_on_as_it_did() -> None:
    """-2 nats in 2 tokens are -10 in 10; as many as the row that has seen all of them."""
    behind = state((-10.0, -2.0), scored=(10, 2), answer_tokens=10)
    assert Posterior((0.5, 0.5)).weights(behind) == pytest.approx([0.5, 0.5])


@given(priors, likelihoods, st.tuples(*[st.integers(1, 12)] * 2))
def test_the_estimate_is_the_mean_of_a_row_times_the_length_of_the_answer(
    prior: tuple[float, ...], nats: tuple[float, ...], scored: tuple[int, int]
) -> None:
    counts = (12, *scored)
    expected = [value * 12 / count for value, count in zip(nats, counts, strict=True)]
    found = Posterior(prior, floor=0.0).weights(state(nats, counts, 12))
    assert found == pytest.approx(bayes(prior, expected), rel=2e-3, abs=1e-6)


def test_a_row_that_scored_nothing_is_expected_to_be_like_those_that_scored_all() -> None:
    behind = state((-6.0, -10.0, 0.0), scored=(10, 10, 0), answer_tokens=10)
    found = Posterior((0.2, 0.3, 0.5), floor=0.0).weights(behind)
    assert found == pytest.approx(bayes((0.2, 0.3, 0.5), (-6, -10, -8)), rel=1e-4)


def test_a_row_that_ruled_out_a_token_of_the_answer_has_no_weight() -> None:
    assert Posterior((0.5, 0.5)).weights(state((-math.inf, -2.0))) == [0.0, 1.0]


@pytest.mark.parametrize("combine", [Mixture, Posterior])
@pytest.mark.parametrize(
    "shares", [(-0.1, 1.1), (0, 0), (1, math.inf), (math.nan, 1), (1, -math.inf), ()], ids=str
)
def test_shares_that_are_none_are_refused(
    combine: type[Combiner], shares: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"non-negative and not all zero|empty"):
        combine(shares)


@given(priors, likelihoods)
def test_posterior_weights_sum_to_one(prior: tuple[float, ...], nats: tuple[float, ...]) -> None:
    weights = posterior_weights(torch.tensor(prior).log(), torch.tensor(nats))
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()
    assert weights.tolist() == pytest.approx(bayes(prior, nats), rel=1e-3, abs=1e-6)


@given(priors, likelihoods, st.floats(-50, 50))
def test_the_prior_of_posterior_weights_need_not_be_normalised(
    prior: tuple[float, ...], nats: tuple[float, ...], shift: float
) -> None:
    log_prior, seen = torch.tensor(prior).log(), torch.tensor(nats)
    shifted = posterior_weights(log_prior + shift, seen)
    assert torch.allclose(shifted, posterior_weights(log_prior, seen), atol=FLOAT32)


def test_a_prior_of_zero_is_never_overcome() -> None:
    weights = posterior_weights(torch.tensor([0.0, 1.0]).log(), torch.tensor([0.0, -1000.0]))
    assert weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("place", ["prior", "likelihood", "between"])
def test_posterior_weights_refuse_what_is_not_a_number(place: str) -> None:
    log_prior, nats = torch.zeros(3), torch.zeros(3)
    if place == "between":
        log_prior[1], nats[1] = math.inf, -math.inf
    else:
        (log_prior if place == "prior" else nats)[1] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        posterior_weights(log_prior, nats)


def test_posterior_weights_name_the_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        posterior_weights(torch.zeros(3), torch.zeros(2))
