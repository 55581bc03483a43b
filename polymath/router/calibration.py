"""Logits to probabilities that can be believed: temperature scaling (Guo et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["calibrated"]


def calibrated(logits: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Softmax of the logits by the temperature over the last axis, in float64."""
    import numpy as np

    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    exponentials = np.exp(scaled)
    result: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result
