"""One row in progress: its tokens, how far they are cached, and the logits of what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymath.experts.adapter_bank import KnownAdapter
from polymath.experts.group import Row
from polymath.experts.lora_weights import LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sequence"]


class Sequence:
    """A row of a group.

    Attributes:
        tokens: prompt and answer so far.
        cached: how many of them have been fed.
        weights: of its adapter, held until the answer ends.
        logits: of the next token, [vocab]; meaningful while nothing is pending.
        log_likelihood: nats of the first `scored` tokens of the answer under this row.
    """

    def __init__(self, row: Row, adapter: KnownAdapter | None, max_tokens: int) -> None:
        self.base_model = row.base_model
        self.adapter = adapter
        self.weights: LoraWeights | None = None
        self.tokens = list(row.prompt)
        self.prompt_tokens = len(row.prompt)
        self.longest = len(row.prompt) + max_tokens
        self.cached = 0
        self.logits: Tensor | None = None
        self.log_likelihood = 0.0
        self.scored = 0

    @property
    def pending(self) -> int:
        """Tokens not fed yet."""
        return len(self.tokens) - self.cached

    @property
    def lags(self) -> bool:
        """Whether tokens of the answer are to be fed whose likelihood is not known yet."""
        return self.prompt_tokens + self.scored < len(self.tokens)

    def take(self, count: int, logits: Tensor) -> None:
        """Note that the next `count` tokens have been fed.

        Args:
            logits: [count, vocab] if the row lags, else [1, vocab].
        """
        if self.lags:
            self._score(self.tokens[self.cached + 1 : self.cached + count + 1], logits)
        self.cached += count
        self.logits = logits[-1]

    def score(self, log_prob: float) -> None:
        """Note the likelihood of the answer's next token under this row."""
        self.log_likelihood += log_prob
        self.scored += 1

    def _score(self, following: list[int], logits: Tensor) -> None:
        """Likelihoods of the tokens after each of those fed; some of the prompt, some scored."""
        first = self.cached + 1
        unscored = self.prompt_tokens + self.scored
        for index in range(max(unscored - first, 0), len(following)):
            self.score(float(logits[index].log_softmax(-1)[following[index]]))
