"""One token from one distribution, whatever rows it was combined from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polymath.experts.grammar import Grammar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sampler", "SamplingParams", "certainty"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn; the names and meanings of OpenAI, `top_k` and `min_p` of vLLM.

    Attributes:
        top_logprobs: alternatives reported with each token; None reports no log-probabilities.
        seed: the same seed draws the same answer; None draws a fresh one.
        top_k: 0 keeps all tokens.
        ignore_eos: go on past the end token, for benchmarks.
        grammar: what the answer must match, if anything.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None


class Sampler:
    """Draws the tokens of one answer and remembers them for penalties and grammar."""

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self._params = params
        self._counts: Counter[int] = Counter()
        self._matcher = params.grammar.start() if params.grammar else None
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, log_probs: Tensor) -> int:
        """Draw the next token.

        Args:
            log_probs: [vocab], the combined distribution before penalties and temperature.
        Raises:
            InvalidRequest: the grammar allows no token.
        """
        if self.greedy:
            token = int(self._allowed(log_probs).argmax())
        else:
            token = self.draw(self.probabilities(log_probs))
        self.take(token)
        return token

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self._params.temperature < GREEDY_TEMPERATURE

    def probabilities(self, log_probs: Tensor) -> Tensor:
        """What the next token is drawn from, [vocab]; not normalised, unless greedy.

        Raises:
            InvalidRequest: the grammar allows no token.
        """
        scores = self._allowed(log_probs)
        if self.greedy:
            return certainty(scores)
        return self._truncated(scores / self._params.temperature)

    def take(self, token: int) -> None:
        """Remember a token of the answer, for penalties and grammar."""
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.take(token)

    def uniform(self) -> float:
        """A number from 0 to 1 of the answer's own random numbers."""
        import torch

        return float(torch.rand(1, generator=self._generator, dtype=torch.float64))

    def draw(self, probabilities: Tensor) -> int:
        """Inverse transform sampling: where a uniform number falls in the cumulated weights.

        Args:
            probabilities: [vocab], need not be normalised.
        """
        import torch

        cumulated = probabilities.double().cumsum(-1)
        point = self.uniform() * cumulated[-1:]
        drawn = torch.searchsorted(cumulated, point, right=True)
        return min(int(drawn), int(probabilities.nonzero()[-1]))  # rounding may fall off the end

    def _allowed(self, log_probs: Tensor) -> Tensor:
        """Scores after penalties and bias, of the tokens that the grammar allows."""
        scores = self._penalised(log_probs)
        if self._matcher is not None:
            scores = scores.masked_fill(~self._matcher.allowed(len(scores)), -math.inf)
        return scores

    def _penalised(self, log_probs: Tensor) -> Tensor:
        """OpenAI's penalties on the tokens drawn so far, then the bias."""
        import torch

        params = self._params
        change = dict(params.logit_bias)
        if params.frequency_penalty or params.presence_penalty:
            for token, count in self._counts.items():
                penalty = params.frequency_penalty * count + params.presence_penalty
                change[token] = change.get(token, 0.0) - penalty
        if not change:
            return log_probs
        scores = log_probs.clone()
        scores[list(change)] += torch.tensor(list(change.values()), dtype=scores.dtype)
        return scores

    def _truncated(self, scores: Tensor) -> Tensor:
        """Probabilities after top-k, then min-p and top-p, not renormalised; [vocab]."""
        import torch

        params = self._params
        if 0 < params.top_k < len(scores):
            smallest = scores.topk(params.top_k).values[-1]
            scores = scores.masked_fill(scores < smallest, -math.inf)
        probabilities = torch.softmax(scores.float(), dim=-1)
        if params.min_p > 0:
            probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
        return _nucleus(probabilities, params.top_p) if params.top_p < 1 else probabilities


def certainty(scores: Tensor) -> Tensor:
    """The distribution that has the likeliest token alone, [vocab]."""
    certain = scores.new_zeros(len(scores))
    certain[scores.argmax()] = 1.0
    return certain


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach `top_p` of the mass; the others become 0.

    Tokens below a fair share of the rest, `(1 - top_p) / vocab`, cannot be among them: all of these
    together have less than the rest. So only the few above it are sorted.
    """
    import torch

    total = probabilities.sum()
    fair = min((1 - top_p) / len(probabilities) * total, probabilities.max())
    candidates = (probabilities >= fair).nonzero().flatten()
    values, order = probabilities[candidates].sort(descending=True)
    before = values.cumsum(-1) - values
    kept = before < top_p * total
    kept[0] = True  # the likeliest token stays, however small top_p is
    nucleus = torch.zeros_like(probabilities)
    nucleus[candidates[order[kept]]] = values[kept]
    return nucleus
