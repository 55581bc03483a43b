"""Gradient features of many conversations, on disk in float16 as they come, so that a killed run
goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.experts import AdamMoments, GradientFeatures, Prompt
from polymath.training.examples import length_batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["row_gradients"]

BATCH_TOKENS = 512
"""Padded tokens of one pass."""


def row_gradients(
    features: GradientFeatures,
    prompts: Sequence[Prompt],
    moments: AdamMoments | None,
    file: Path,
    key: str,
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Unit vectors of the prompts, [prompts, dimensions].

    Args:
        file: where they are kept; `key` says of what, and what is kept of anything else is dropped.
        advance: called with (prompts done, prompts in all).
    """
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    stand = file.with_suffix(".json")
    shape = (len(prompts), features.dimensions)
    size = 2 * shape[0] * shape[1]
    done = _done(stand, key) if file.exists() and file.stat().st_size == size else 0
    mode: Any = "r+" if done else "w+"
    kept = np.memmap(file, dtype=np.float16, mode=mode, shape=shape)
    batches = list(length_batches(prompts, BATCH_TOKENS))
    for index, batch in enumerate(batches):
        if index >= done:
            kept[batch] = features.of([prompts[row] for row in batch], moments)
            kept.flush()
            stand.write_text(json.dumps({"key": key, "batches": index + 1}), encoding="utf-8")
        advance(sum(map(len, batches[: index + 1])), len(prompts))
    vectors: NDArray[np.float32] = kept.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms > 0, norms, 1)  # float16 has rounded them
    return vectors


def _done(stand: Path, key: str) -> int:
    """Batches that were finished by a run of the same key."""
    try:
        values = json.loads(stand.read_bytes())
        return int(values["batches"]) if values["key"] == key else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
