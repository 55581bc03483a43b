"""What the engine asks of a base model's decoder, however it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from polymath.experts.kv_slots import CacheShape, KvSlots
from polymath.experts.lora_weights import LoraWeights, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Batch", "Network"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that stand side by side in the cache and take the same number of tokens.

    Attributes:
        tokens: [rows][count]; where there are several rows, count is 1.
        past: tokens of each row that are cached already.
        first_slot: slot of the first row; the others follow.
        adapters: of each row; None is the bare base model.
        every: logits at every position, not only at the last.
    """

    tokens: Sequence[Sequence[int]]
    past: Sequence[int]
    first_slot: int
    adapters: Sequence[LoraWeights | None]
    every: bool = False


class Network(Protocol):
    """A decoder with low-rank updates."""

    sites: tuple[Site, ...]
    """Where adapters may change it."""
    cache_shape: CacheShape
    dtype: torch.dtype
    """Of the low-rank factors."""

    def forward(self, batch: Batch, slots: KvSlots) -> Tensor:
        """Take the tokens of a batch, and cache their keys and values.

        Returns:
            Logits [rows, positions, vocab], float32 on the CPU; positions is 1 unless `every`.
        """
        ...
