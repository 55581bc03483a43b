"""Keys and values of the rows in progress, in memory that a batch can read without copying.

Every layer has one tensor [slots, heads, capacity, head_dim]. A row owns a slot; rows of one batch
stand side by side from the first slot on, so that the batch is a view. Where rows leave or change
places, their tokens are copied; where the tensors are too small, they double.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CacheShape", "KvSlots", "SlotRow"]

FIRST_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token of one row takes: `layers` times a key and a value of [heads, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class SlotRow(Protocol):
    """A row that owns a slot."""

    cached: int
    """Tokens whose keys and values are there."""


class KvSlots:
    """The cache of one network.

    Args:
        max_tokens: the longest row, in tokens.

    Attributes:
        keys, values: one tensor [slots, heads, capacity, head_dim] for each layer.
        version: changes when the tensors are replaced by larger ones.
    """

    def __init__(self, shape: CacheShape, max_tokens: int) -> None:
        self.version = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._shape = shape
        self._max_tokens = max_tokens
        self._rows: list[SlotRow] = []
        self._slots = self._capacity = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self._capacity

    def rows(self, count: int) -> list[SlotRow]:
        """The rows of the first slots."""
        return self._rows[:count]

    def holds(self, row: SlotRow) -> bool:
        """Whether a row has a slot."""
        return any(other is row for other in self._rows)

    def slot(self, row: SlotRow) -> int:
        """Where a row is now."""
        return next(index for index, other in enumerate(self._rows) if other is row)

    def join(self, row: SlotRow, tokens: int) -> None:
        """Give a row a slot with room for so many tokens."""
        self._grow(len(self._rows) + 1, tokens)
        self._rows.append(row)

    def leave(self, row: SlotRow) -> None:
        """Free a row's slot; the last row moves into it."""
        slot = self.slot(row)
        last = self._rows.pop()
        if last is not row:
            self._rows[slot] = last
            for tensor in (*self.keys, *self.values):
                tensor[slot, :, : last.cached] = tensor[len(self._rows), :, : last.cached]

    def arrange(self, rows: Sequence[SlotRow]) -> None:
        """Move rows so that these stand in the first slots, in any order."""
        wanted = {id(row) for row in rows}
        outside = [
            slot for slot in range(len(rows), len(self._rows)) if id(self._rows[slot]) in wanted
        ]
        for slot in range(len(rows)):
            if id(self._rows[slot]) not in wanted:
                self._swap(slot, outside.pop())

    def read(self, row: SlotRow) -> Tensor:
        """A copy of a row's keys and values, [layers, 2, heads, tokens, head_dim]."""
        import torch

        slot, tokens = self.slot(row), row.cached
        pairs = zip(self.keys, self.values, strict=True)
        return torch.stack(
            [torch.stack([k[slot, :, :tokens], v[slot, :, :tokens]]) for k, v in pairs]
        )

    def write(self, row: SlotRow, saved: Tensor) -> None:
        """Put keys and values that `read` gave at the beginning of a row."""
        slot, tokens = self.slot(row), saved.shape[3]
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            key[slot, :, :tokens] = saved[layer, 0]
            value[slot, :, :tokens] = saved[layer, 1]

    def _swap(self, one: int, other: int) -> None:
        rows = self._rows
        tokens = max(rows[one].cached, rows[other].cached)
        for tensor in (*self.keys, *self.values):
            moved = tensor[one, :, :tokens].clone()
            tensor[one, :, :tokens] = tensor[other, :, :tokens]
            tensor[other, :, :tokens] = moved
        rows[one], rows[other] = rows[other], rows[one]

    def _grow(self, slots: int, tokens: int) -> None:
        if slots <= self._slots and tokens <= self._capacity:
            return
        self._slots = _doubled(max(self._slots, 1), slots)
        longest = _doubled(max(self._capacity, FIRST_CAPACITY), tokens)
        self._capacity = max(tokens, self._capacity, min(longest, self._max_tokens))
        self.keys = [self._larger(index, self.keys) for index in range(self._shape.layers)]
        self.values = [self._larger(index, self.values) for index in range(self._shape.layers)]
        self.version += 1

    def _larger(self, layer: int, old: list[Tensor]) -> Tensor:
        shape = self._shape
        size = (self._slots, shape.heads, self._capacity, shape.head_dim)
        new = _zeros(size, shape)
        for slot, row in enumerate(self._rows):
            new[slot, :, : row.cached] = old[layer][slot, :, : row.cached]
        return new


def _zeros(size: tuple[int, ...], shape: CacheShape) -> Tensor:
    """Zeros, since a masked position may be read; where possible in pages not touched yet."""
    import numpy as np
    import torch

    if shape.device.type == "cpu" and shape.dtype == torch.float32:
        return torch.from_numpy(np.zeros(size, dtype=np.float32))
    return torch.zeros(size, dtype=shape.dtype, device=shape.device)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
