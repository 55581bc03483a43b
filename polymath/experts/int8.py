"""Weights in 8 bits, with a scale and a zero point for each block."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["BLOCK", "quantise"]

BLOCK = 64
"""Weights that share a scale and a zero point."""


def quantise(weight: Floats) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Round a matrix to 8 bits, `w = scale * (q - zero)`, in blocks along its input.

    Args:
        weight: [out, in]; `in` is a multiple of BLOCK.
    Returns:
        q [out, blocks, BLOCK], scale [out, blocks], zero [out, blocks].
    """
    import numpy as np

    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    low = np.minimum(blocks.min(-1), 0)
    high = np.maximum(blocks.max(-1), 0)
    scale = ((high - low) / 255).astype(np.float32)
    scale[scale == 0] = 1.0
    zero = np.rint(-low / scale)
    codes = np.rint(blocks / scale[..., None]) + zero[..., None]
    return codes.clip(0, 255).astype(np.uint8), scale, zero.astype(np.uint8)
