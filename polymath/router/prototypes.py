"""Domains known by a handful of example prompts, without training (prototypes, Snell et al. 2017).

A domain's prototype is the mean of its examples' vectors. Whether a prompt belongs to it is judged
against two measured similarities: that of the examples to the prototype of the others, and that of
the trained router's reference prompts, nearly all of which belong elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["Prototypes"]

FOREIGN_QUANTILE = 0.99
"""So many of the reference prompts are taken to be of other domains."""

LEAST_GAP = 0.05
"""Of the two similarities; examples that differ wildly would make the border too sharp."""

LOG_ODDS = 4.0
"""At the two similarities the odds are e^-4 and e^4."""

CONSIDERED = 8
"""Domains that a prompt may be of; the others are too far to matter."""

BLOCK = 1024

MANY = 2048
"""From so many domains on, all are compared in few dimensions and only a shortlist in full."""

COARSE_DIMENSIONS = 64
SHORTLIST = 256


class Prototypes:
    """Compares a vector with the prototypes of any number of domains.

    Args:
        examples: domain -> unit vectors of its examples, [examples, dimensions].
        references: unit vectors of prompts of the trained domains, [references, dimensions].
    """

    def __init__(self, examples: Mapping[str, Floats], references: Floats) -> None:
        import numpy as np

        self.domains = tuple(examples)
        self._means = np.stack([_unit(vectors.mean(axis=0)) for vectors in examples.values()])
        own = np.array([_similarity_to_others(vectors) for vectors in examples.values()])
        foreign = _quantiles(self._means, references)
        self._middle = ((own + foreign) / 2).astype(np.float32)
        self._slope = (2 * LOG_ODDS / np.maximum(own - foreign, LEAST_GAP)).astype(np.float32)

        self._principal = _principal(self._means) if len(self._means) >= MANY else None

    def odds(self, vector: Floats) -> dict[str, float]:
        """How much likelier than all trained domains together each of the nearest domains is.

        Args:
            vector: [dimensions], unit length.
        """
        near = self._shortlist(vector)
        scores = (self._means[near] @ vector - self._middle[near]) * self._slope[near]
        best = _largest(scores, CONSIDERED)
        # math.exp is in float64: float32 ends at e^88, and wildly different examples go beyond
        return {self.domains[near[place]]: math.exp(scores[place]) for place in best.tolist()}

    def _shortlist(self, vector: Floats) -> NDArray[np.intp]:
        import numpy as np

        if self._principal is None:
            return np.arange(len(self._means))
        basis, coarse = self._principal
        scores = (coarse @ (vector @ basis) - self._middle) * self._slope
        return _largest(scores, SHORTLIST)


def _principal(means: Floats) -> tuple[Floats, Floats]:
    """The directions in which the prototypes differ most, and the prototypes in them."""
    import numpy as np

    _, directions = np.linalg.eigh(means.T @ means)
    basis = np.ascontiguousarray(directions[:, -COARSE_DIMENSIONS:])
    return basis, np.ascontiguousarray(means @ basis)


def _largest(scores: Floats, most: int) -> NDArray[np.intp]:
    """Where the largest scores stand, in no order."""
    import numpy as np

    if len(scores) <= most:
        return np.arange(len(scores))
    return np.argpartition(scores, -most)[-most:]


def _unit(vector: Floats) -> Floats:
    import numpy as np

    unit: Floats = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return unit


def _similarity_to_others(vectors: Floats) -> float:
    """Mean cosine of each example with the mean of the others; of one example alone, 1."""
    import numpy as np

    if len(vectors) == 1:
        return 1.0
    total = vectors.sum(axis=0)
    return float(np.mean([_unit(total - vector) @ vector for vector in vectors]))


def _quantiles(means: Floats, references: Floats) -> NDArray[np.float64]:
    """For each prototype the similarity that few references exceed, [domains]."""
    import numpy as np

    if len(references) == 0:
        return np.zeros(len(means))
    blocks = [
        np.quantile(means[start : start + BLOCK] @ references.T, FOREIGN_QUANTILE, axis=1)
        for start in range(0, len(means), BLOCK)
    ]
    return np.concatenate(blocks)
