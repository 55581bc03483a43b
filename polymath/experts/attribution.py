"""Which row of a decode group a token came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymath.experts.group import Attribution

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attribute", "log_probabilities"]


def attribute(token: int, logits: Tensor, weights: Sequence[float]) -> Attribution:
    """The row that raised the probability of a token most.

    Args:
        logits: [rows, vocab], unnormalised.
        weights: the coefficient of each row; one without is not considered.
    """
    active = [index for index, weight in enumerate(weights) if weight]
    log_probs = log_probabilities(logits, token)
    mean = sum(log_probs[index] for index in active) / len(active)
    raised = {index: weights[index] * (log_probs[index] - mean) for index in active}
    return Attribution(max(raised, key=raised.__getitem__), tuple(weights))


def log_probabilities(logits: Tensor, token: int) -> list[float]:
    """Of a token under each row alone, in nats."""
    values: list[float] = (logits[:, token] - logits.logsumexp(-1)).tolist()
    return values
