"""Tokens of one answer as the chunks that its reader gets: text, scores, and why it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymath.experts.answer_text import AnswerText
from polymath.experts.group import Attribution, Chunk, FinishReason, ScoredToken
from polymath.experts.sampling import SamplingParams
from polymath.experts.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AnswerWriter"]


class AnswerWriter:
    """Writes one answer.

    Args:
        eos_ids: tokens that end it.

    Attributes:
        tokens: written so far.
    """

    def __init__(
        self, sampling: SamplingParams, vocabulary: Vocabulary, eos_ids: frozenset[int]
    ) -> None:
        self.tokens = 0
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._text = AnswerText(sampling.stop, strip_space=vocabulary.starts_with_space)

    def write(self, token: int, log_probs: Tensor, attribution: Attribution | None = None) -> Chunk:
        """Add a token.

        Args:
            log_probs: [vocab], the distribution that it comes from.
        """
        self.tokens += 1
        if token in self._eos_ids and not self._sampling.ignore_eos:
            return Chunk(self._text.finish(), None, "stop")
        piece = self._vocabulary.piece(token)
        scored = ScoredToken(
            token, piece, float(log_probs[token]), self._likeliest(log_probs), attribution
        )
        text = self._text.push(piece)
        reason: FinishReason | None = None
        if self.tokens >= self._sampling.max_tokens:
            text, reason = text + self._text.finish(), "length"
        return Chunk(text, scored, "stop" if self._text.stopped else reason)

    def _likeliest(self, log_probs: Tensor) -> tuple[ScoredToken, ...]:
        if not self._sampling.top_logprobs:
            return ()
        values, ids = log_probs.topk(self._sampling.top_logprobs)
        return tuple(
            ScoredToken(index, self._vocabulary.piece(index), value)
            for index, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
