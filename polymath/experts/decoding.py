"""One decode group in progress: prefill once, then a token a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polymath.experts.answer_text import AnswerText
from polymath.experts.group import Chunk, DecodeGroup, FinishReason, ScoredToken
from polymath.experts.lora_model import LoraModel
from polymath.experts.sampling import Sampler

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

__all__ = ["Decoding"]


class Decoding:
    """A group with its caches, sampler and text.

    Args:
        group: what to decode; its rows share a vocabulary.
        models: base models by name.
        deliver: told of every chunk, and of the exception that ends the group.
    """

    def __init__(
        self,
        group: DecodeGroup,
        models: Mapping[str, LoraModel],
        deliver: Callable[[Chunk | Exception], None],
    ) -> None:
        self.deliver = deliver
        self.cancelled = False
        self.finished = False
        self._group = group
        self._models = [models[row.base_model] for row in group.rows]
        self._sampler = Sampler(group.sampling)
        vocabulary = self._models[0].vocabulary
        self._text = AnswerText(group.sampling.stop, strip_space=vocabulary.starts_with_space)
        self._caches: list[Cache | None] = [None] * len(group.rows)
        self._state: Any = None
        self._last_token: int | None = None
        self._count = 0

    def step(self) -> None:
        """Feed the last token to every row, combine, sample, deliver one chunk."""
        log_probs, self._state = self._group.combiner(self._logits(), self._state)
        token = self._sampler.sample(log_probs)
        self._last_token = token
        self._count += 1
        chunk = self._chunk(token, log_probs)
        self.finished = chunk.finish_reason is not None
        self.deliver(chunk)

    def _logits(self) -> Tensor:
        """[rows, vocab]"""
        import torch

        logits = []
        for index, (row, model) in enumerate(zip(self._group.rows, self._models, strict=True)):
            tokens = row.prompt if self._last_token is None else (self._last_token,)
            row_logits, self._caches[index] = model.forward(
                row.adapter, tokens, self._caches[index]
            )
            logits.append(row_logits)
        return torch.stack(logits)

    def _chunk(self, token: int, log_probs: Tensor) -> Chunk:
        if token in self._models[0].eos_ids:
            return Chunk(self._text.finish(), None, "stop")
        scored = self._score(token, log_probs)
        text = self._text.push(scored.piece)
        reason: FinishReason | None = None
        if self._count >= self._group.sampling.max_tokens:
            text, reason = text + self._text.finish(), "length"
        return Chunk(text, scored, "stop" if self._text.stopped else reason)

    def _score(self, token: int, log_probs: Tensor) -> ScoredToken:
        vocabulary = self._models[0].vocabulary
        alternatives = self._group.sampling.top_logprobs or 0
        values, ids = log_probs.topk(alternatives)
        top = tuple(
            ScoredToken(index, vocabulary.piece(index), value)
            for index, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        return ScoredToken(token, vocabulary.piece(token), float(log_probs[token]), top)
