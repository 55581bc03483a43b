"""Matrices in int8, with a scale for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["LARGEST_CODE", "rounded"]

LARGEST_CODE = 127
LEAST_LARGEST = 1e-8
"""A row of zeros must not get a scale of zero."""


def rounded(matrix: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric int8: codes of the matrix' shape, and the scale of each row, [rows]."""
    import numpy as np

    scale = np.maximum(np.abs(matrix).max(axis=1), LEAST_LARGEST) / LARGEST_CODE
    codes = np.rint(matrix / scale[:, None]).astype(np.int8)
    return codes, scale.astype(np.float32)
