"""One token from one distribution, whatever rows it was combined from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sampler", "SamplingParams"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn; the names and meanings of OpenAI, `top_k` and `min_p` of vLLM.

    Attributes:
        top_logprobs: alternatives reported with each token; None reports no log-probabilities.
        seed: the same seed draws the same answer; None draws a fresh one.
        top_k: 0 keeps all tokens.
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


class Sampler:
    """Draws the tokens of one answer and remembers them for the penalties."""

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self._params = params
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, log_probs: Tensor) -> int:
        """Draw the next token.

        Args:
            log_probs: [vocab], the combined distribution before penalties and temperature.
        """
        import torch

        scores = self._penalised(log_probs)
        if self._params.temperature < GREEDY_TEMPERATURE:
            token = int(scores.argmax())
        else:
            probabilities = self._truncated(scores / self._params.temperature)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._counts[token] += 1
        return token

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
            scores = scores.masked_fill(scores < smallest, float("-inf"))
        probabilities = torch.softmax(scores.float(), dim=-1)
        if params.min_p > 0:
            probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
        if params.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            dropped = before >= params.top_p * ordered.sum()
            dropped[0] = False  # the likeliest token stays, however small top_p is
            probabilities[order[dropped]] = 0.0
        return probabilities
