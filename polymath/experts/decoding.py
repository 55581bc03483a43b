"""One decode group in progress: rows that are fed, then a token a step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from polymath.experts.answer_writer import AnswerWriter
from polymath.experts.attribution import attribute, log_probabilities
from polymath.experts.combiner import CombinerState
from polymath.experts.group import Chunk, DecodeGroup
from polymath.experts.sampling import Sampler
from polymath.experts.sequence import Sequence
from polymath.experts.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Decoding"]


class Decoding:
    """A group with its rows, sampler and text.

    Args:
        group: what to decode; its rows share a vocabulary.
        rows: its rows in progress, in the same order.
        eos_ids: tokens that end the answer.
        deliver: told of every chunk, and of the exception that ends the group.
    """

    def __init__(
        self,
        group: DecodeGroup,
        rows: list[Sequence],
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        deliver: Callable[[Chunk | Exception], None],
    ) -> None:
        self.rows = rows
        self.deliver = deliver
        self.cancelled = False
        self.finished = False
        self._group = group
        self._sampler = Sampler(group.sampling)
        self._writer = AnswerWriter(group.sampling, vocabulary, eos_ids)
        combiner = group.combiner
        self._constant_weights = None if combiner.follows_text else combiner.weights(self._state())

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done."""
        return self.finished or self.cancelled

    @property
    def longest(self) -> int:
        """Tokens of cache that the rows may need together."""
        return sum(row.longest for row in self.rows)

    @property
    def ready(self) -> bool:
        """Whether there is something to compute."""
        return True

    def hungry(self) -> list[Sequence]:
        """Rows whose logits the next step needs and that have tokens to be fed first."""
        weights = self._weights()
        return [
            row for row, weight in zip(self.rows, weights, strict=True) if weight and row.pending
        ]

    def step(self) -> Chunk:
        """Combine and sample; to be called when nobody is hungry."""
        logits = self._logits()
        log_probs, _ = self._group.combiner(logits, self._state())
        token = self._sampler.sample(log_probs)
        attribution = attribute(token, logits, self._weights()) if self._group.attribution else None
        chunk = self._writer.write(token, log_probs, attribution)
        self._append(token, logits)
        self.finished = chunk.finish_reason is not None
        return chunk

    def cancel(self) -> None:
        """Nobody wants the answer any more; from any thread."""
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        """End the group with an error."""
        self.finished = True
        self.deliver(error)

    def _weights(self) -> Seq[float]:
        """Of every row in the next step."""
        if self._constant_weights is not None:
            return self._constant_weights
        return self._group.combiner.weights(self._state())

    def _state(self) -> CombinerState:
        """Likelihoods are 0 where the combiner does not follow the text."""
        import torch

        return CombinerState(
            log_likelihood=torch.tensor([row.log_likelihood for row in self.rows]),
            scored=torch.tensor([row.scored for row in self.rows]),
            answer_tokens=self._writer.tokens,
        )

    def _logits(self) -> Tensor:
        """[rows, vocab]; zeros for rows that have tokens pending."""
        import torch

        if len(self.rows) == 1 and self.rows[0].logits is not None:
            return self.rows[0].logits[None]
        fed = next(row.logits for row in self.rows if row.logits is not None and not row.pending)
        return torch.stack(
            [
                row.logits if row.logits is not None and not row.pending else torch.zeros_like(fed)
                for row in self.rows
            ]
        )

    def _append(self, token: int, logits: Tensor) -> None:
        counted = self._group.combiner.follows_text
        log_probs = log_probabilities(logits, token) if counted else [0.0] * len(self.rows)
        for row, log_prob in zip(self.rows, log_probs, strict=True):
            if not row.pending:
                row.score(log_prob)
            row.tokens.append(token)
