"""Many prompts through an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polymath.router import Encoder
from polymath.training.data import PromptRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["encode_prompts"]

ENCODE_BATCH = 16


def encode_prompts(
    encoder: Encoder,
    rows: Sequence[PromptRow],
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Vectors of the rows, [rows, dimensions]; batched by length.

    Args:
        advance: called with (rows done, rows in all).
    """
    import numpy as np

    order = sorted(range(len(rows)), key=lambda index: len(rows[index].text))
    blocks = []
    for start in range(0, len(order), ENCODE_BATCH):
        batch = order[start : start + ENCODE_BATCH]
        blocks.append(encoder.encode([rows[index].text for index in batch]))
        advance(start + len(batch), len(order))
    vectors = np.empty((len(rows), blocks[0].shape[1]), dtype=np.float32)
    vectors[order] = np.concatenate(blocks)
    return vectors
