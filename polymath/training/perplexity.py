"""Perplexity of answers: how well a model, with or without an adapter, expects what was said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymath.training.examples import Example, answer_losses, collate, length_batches

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Perplexity", "measure_perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-likelihood per answer token (`loss`, nats) over `tokens` answer tokens."""

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def measure_perplexity(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_tokens: int = 2048,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Perplexity:
    """Perplexity over the answer tokens of the examples, weighted by token.

    Args:
        batch_tokens: padded tokens in one forward pass.
        advance: called with the number of examples of each finished batch.
    """
    import torch

    total, tokens = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for batch in length_batches(examples, batch_tokens):
            losses = answer_losses(model, collate([examples[index] for index in batch], pad_id))
            total += losses.double().sum().item()
            tokens += len(losses)
            advance(len(batch))
    return Perplexity(total / tokens, tokens)
