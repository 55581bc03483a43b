"""Logits of several rows to one next-token distribution, step by step.

Two rules cover the field: weigh the logits (one expert, ELREA's ensembles, proxy-tuning), or weigh
the probabilities (a mixture, CombLM with a constant, DEMix and c-BTM). The weights are constant or,
in DEMix, follow the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Combiner",
    "CombinerState",
    "Mixture",
    "Posterior",
    "ProxyTuning",
    "Select",
    "WeightedLogits",
    "posterior_weights",
]

UNDERFLOW = 1e-30
"""Probabilities below this are computed from logarithms."""


@dataclass(frozen=True, slots=True)
class CombinerState:
    """What there is to know of a group before a step.

    Attributes:
        log_likelihood: [rows], nats of the answer so far under each row, over the tokens that
            `scored` counts; a row that was left out lags behind.
        scored: [rows], tokens of the answer whose likelihood is known.
        answer_tokens: tokens of the answer so far.
    """

    log_likelihood: Tensor
    scored: Tensor
    answer_tokens: int


class Combiner(Protocol):
    """How the rows of a decode group become one distribution.

    Attributes:
        follows_text: whether the weights depend on how likely each row found the answer so far;
            only then is that counted.
    """

    follows_text: ClassVar[bool]

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        """Combine one step.

        Args:
            logits: [rows, vocab], unnormalised; zeros where a row has no weight.
        Returns:
            Log-probabilities [vocab], and the state.
        """
        ...

    def weights(self, state: CombinerState) -> Sequence[float]:
        """The coefficient of each row in the next step; a row without one is not computed."""
        ...


@dataclass(frozen=True, slots=True)
class Select:
    """The distribution of one row alone."""

    follows_text: ClassVar[bool] = False
    row: int = 0

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        return logits[self.row].log_softmax(-1), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        return [float(index == self.row) for index in range(len(state.scored))]


@dataclass(frozen=True, slots=True)
class WeightedLogits:
    """softmax(sum_j c_j s_j): an ensemble of low-rank experts (ELREA, Li et al. 2025, eq. 8).

    Args:
        coefficients: one a row; they may be negative, and need not sum to 1.
    """

    follows_text: ClassVar[bool] = False
    coefficients: tuple[float, ...]

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        rows = _nonzero(self.coefficients)
        combined = logits.new_tensor(self.coefficients)[rows] @ logits[rows]
        return combined.log_softmax(-1), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        return self.coefficients


@dataclass(frozen=True, slots=True)
class ProxyTuning:
    """softmax(s_M + alpha (s_M+ - s_M-)) over the rows M, M+, M- (Liu et al. 2024, eq. 1)."""

    follows_text: ClassVar[bool] = False
    alpha: float = 1.0

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        steered = logits[0] + self.alpha * (logits[1] - logits[2]) if self.alpha else logits[0]
        return steered.log_softmax(-1), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        return (1.0, self.alpha, -self.alpha)


@dataclass(frozen=True, slots=True)
class Mixture:
    """sum_j w_j p_j. With two rows, CombLM with a constant lambda (Ormazabal et al. 2023).

    Args:
        shares: one a row, non-negative; they are normalised.
    """

    follows_text: ClassVar[bool] = False
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_shares("shares", self.shares)

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        return _mixed(logits, self.weights(state)), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        total = sum(self.shares)
        return [share / total for share in self.shares]


@dataclass(frozen=True, slots=True)
class Posterior:
    """sum_j P(j | x_<t) p_j, the weights updated with each token (DEMix, Gururangan et al. 2022;
    sparsified to the best few as in c-BTM, Gururangan et al. 2023).

    A row whose weight is below the floor, or that is not among the best, is left out: it is not
    computed. Its posterior is then an estimate, as if it went on predicting as well as it has so
    far; when the estimate makes it count again, it catches up and the estimate becomes exact.

    Args:
        prior: one a row, from the router; normalised.
        top_k: at most so many rows count; None is all.
        floor: the least posterior weight that counts.
    """

    follows_text: ClassVar[bool] = True
    prior: tuple[float, ...]
    top_k: int | None = None
    floor: float = 0.01

    def __post_init__(self) -> None:
        _check_shares("prior", self.prior)

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        return _mixed(logits, self.weights(state)), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        log_prior = state.log_likelihood.new_tensor(self.prior).log()
        weights = posterior_weights(log_prior, _expected_likelihood(state))
        kept = weights >= self.floor
        best = weights.topk(min(self.top_k or len(weights), len(weights))).indices
        among = kept.new_zeros(len(kept))
        among[best] = True
        kept &= among
        kept[best[0]] = True
        weights = weights * kept
        normalised: list[float] = (weights / weights.sum()).tolist()
        return normalised


def posterior_weights(log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """Posterior over experts given the tokens so far (DEMix, Gururangan et al. 2022, eq. 4).

    Args:
        log_prior: [experts], nats; need not be normalised.
        log_likelihood: [experts], nats, summed over the tokens seen.
    Returns:
        [experts], non-negative, sums to 1.
    Raises:
        ValueError: the shapes differ, or an entry is NaN.
    """
    if log_prior.shape != log_likelihood.shape:
        shapes = f"{list(log_prior.shape)} and {list(log_likelihood.shape)}"
        raise ValueError(f"prior and likelihood differ in shape: {shapes}")
    scores = log_prior + log_likelihood
    if scores.isnan().any():
        raise ValueError(f"a prior or likelihood is not a number: {scores.tolist()}")
    return scores.softmax(-1)


def _expected_likelihood(state: CombinerState) -> Tensor:
    """Log-likelihoods of the whole answer, where rows that lag are expected to go on as before."""
    missed = state.answer_tokens - state.scored
    own_mean = state.log_likelihood / state.scored.clamp(min=1)
    full = missed == 0
    others = own_mean[full].mean() if bool(full.any()) else own_mean.mean()
    mean = own_mean.where(state.scored > 0, others)
    return state.log_likelihood + (missed * mean).where(missed > 0, 0.0)  # not 0 times -inf


def _mixed(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """log sum_j w_j p_j over the rows of positive weight, [vocab]."""
    rows = _nonzero(weights)
    if len(rows) == 1:
        return logits[rows[0]].log_softmax(-1)
    shares = logits.new_tensor([weights[row] for row in rows])
    mixture = shares @ logits[rows].softmax(-1)
    log_probs = mixture.log()
    vanished = (mixture < UNDERFLOW).nonzero().flatten()
    if len(vanished):  # too unlikely for a float32, yet a grammar may leave nothing else
        normalisers = logits[rows].logsumexp(-1, keepdim=True) - shares.log()[:, None]
        log_probs[vanished] = (logits[rows][:, vanished] - normalisers).logsumexp(0)
    return log_probs


def _nonzero(values: Sequence[float]) -> list[int]:
    return [index for index, value in enumerate(values) if value]


def _check_shares(name: str, shares: Sequence[float]) -> None:
    if min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(f"{name} must be non-negative and not all zero, found {shares}")
