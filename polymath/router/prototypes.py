"""Domains known by a handful of example prompts, without training: linear discriminant analysis.

Every domain is taken to be a Gaussian around the mean of its vectors, all with one covariance. The
trained router's reference prompts give it, shrunk towards a sphere as they are few (Fisher 1936;
Ledoit and Wolf 2004 on shrinking). What a new domain has to beat is all trained domains together,
by more than nearly all of their reference prompts would; and however many new domains there are,
nearly all reference prompts beat each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["Prototypes"]

SHRINKAGE = 0.75
"""Share of the sphere in the covariance."""

KEPT_QUANTILE = 0.983
"""So many of the reference prompts stay with their own domains."""

MOST_FAVOUR = 10.0
"""Log-odds by which a new domain is favoured at most where it lies far from all references."""

LEAST_VARIANCE = 0.25
"""Of the vectors of a domain, summed over the dimensions; a few references would show too little.
Domains of the demo router have 0.4 to 0.5."""

CONSIDERED = 8
"""Domains that a prompt may be of; the others are too far to matter."""

BLOCK = 1024

MANY = 2048
"""From so many domains on, all are compared in few dimensions and only a shortlist in full."""

COARSE_DIMENSIONS = 64
SHORTLIST = 256

MOST_LOG_ODDS = 300.0
"""More is certain anyway, and would not be a float."""


class Prototypes:
    """Compares a vector with any number of domains.

    Args:
        examples: domain -> unit vectors of its examples, [examples, dimensions].
        references: unit vectors of prompts of the trained domains, [references, dimensions].
        domains: the domain of each reference.
    Raises:
        ValueError: a domain has no examples.
    """

    def __init__(
        self, examples: Mapping[str, Floats], references: Floats, domains: Sequence[str]
    ) -> None:
        import numpy as np

        if empty := [domain for domain, vectors in examples.items() if len(vectors) == 0]:
            raise ValueError(f"domain {empty[0]!r} has no examples")
        self.domains = tuple(examples)
        means = np.stack([vectors.mean(axis=0) for vectors in examples.values()])
        trained = _means(references, domains)
        precision = _precision(references, domains, trained)
        self._trained = _Discriminant(np.stack([*trained.values()]) if trained else None, precision)
        self._new = _Discriminant(means, precision)
        self._new.bias -= self._thresholds(references)
        self._principal = _principal(self._new.weight) if len(means) >= MANY else None

    def odds(self, vector: Floats) -> dict[str, float]:
        """How much likelier than all trained domains together each of the nearest domains is.

        Args:
            vector: [dimensions], unit length.
        """
        near = self._shortlist(vector)
        scores = self._new.weight[near] @ vector + self._new.bias[near]
        best = _largest(scores, CONSIDERED)
        rival = float(self._trained.together(vector[None])[0])
        excess = max(0.0, float(scores.max()) - rival - MOST_LOG_ODDS)  # the order must stay
        return {
            self.domains[near[place]]: math.exp(float(scores[place]) - rival - excess)
            for place in best.tolist()
        }

    def _thresholds(self, references: Floats) -> Floats:
        """For each new domain the log-odds that few references exceed, within bounds, [domains]."""
        import numpy as np

        count = len(self._new.weight)
        if len(references) == 0:
            return np.zeros(count, dtype=np.float32)
        rival = self._trained.together(references)
        thresholds = np.empty(count, dtype=np.float32)
        excess = np.full(len(references), -np.inf, dtype=np.float32)
        for start in range(0, count, BLOCK):
            odds = self._new.scores(references, start, start + BLOCK) - rival
            some = np.maximum(np.quantile(odds, KEPT_QUANTILE, axis=1), -MOST_FAVOUR)
            thresholds[start : start + BLOCK] = some
            excess = np.maximum(excess, (odds - some[:, None]).max(axis=0))
        thresholds += max(0.0, float(np.quantile(excess, KEPT_QUANTILE)))
        return thresholds

    def _shortlist(self, vector: Floats) -> NDArray[np.intp]:
        import numpy as np

        if self._principal is None:
            return np.arange(len(self._new.weight))
        basis, coarse = self._principal
        return _largest(coarse @ (vector @ basis) + self._new.bias, SHORTLIST)


class _Discriminant:
    """Log-likelihoods of Gaussians of one covariance, up to what they share: `weight v + bias`.

    Attributes:
        weight: [domains, dimensions]; bias: [domains].
    """

    def __init__(self, means: Floats | None, precision: Floats) -> None:
        import numpy as np

        if means is None:
            means = np.empty((0, len(precision)), dtype=np.float32)
        self.weight: Floats = (means @ precision).astype(np.float32)
        self.bias: Floats = (-0.5 * (self.weight * means).sum(axis=1)).astype(np.float32)

    def scores(self, vectors: Floats, start: int, stop: int) -> Floats:
        """Of some of the domains, [domains, vectors]."""
        some = slice(start, stop)
        result: Floats = self.weight[some] @ vectors.T + self.bias[some, None]
        return result

    def together(self, vectors: Floats) -> Floats:
        """Log of the sum of all likelihoods, [vectors]; 0 if there are no domains."""
        import numpy as np

        if len(self.weight) == 0:
            return np.zeros(len(vectors), dtype=np.float32)
        result: Floats = np.logaddexp.reduce(self.scores(vectors, 0, len(self.weight)), axis=0)
        return result


def _means(references: Floats, domains: Sequence[str]) -> dict[str, Floats]:
    import numpy as np

    labels = np.array(domains)
    means: dict[str, Floats] = {
        name: references[labels == name].mean(axis=0) for name in dict.fromkeys(domains)
    }
    return means


def _precision(references: Floats, domains: Sequence[str], means: Mapping[str, Floats]) -> Floats:
    """Inverse of the shrunk covariance of the references around the means of their domains."""
    import numpy as np

    dimensions = references.shape[1]
    covariance = np.zeros((dimensions, dimensions))
    if len(references):
        deviations = references - np.stack([means[name] for name in domains])
        covariance = deviations.T @ deviations / len(references)
    spread = max(float(np.trace(covariance)), LEAST_VARIANCE) / dimensions
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * spread * np.eye(dimensions)
    inverse: Floats = np.linalg.inv(shrunk).astype(np.float32)
    return inverse


def _principal(rows: Floats) -> tuple[Floats, Floats]:
    """The directions in which the rows differ most, and the rows in them."""
    import numpy as np

    _, directions = np.linalg.eigh(rows.T @ rows)
    basis: Floats = np.ascontiguousarray(directions[:, -COARSE_DIMENSIONS:])
    coarse: Floats = np.ascontiguousarray(rows @ basis)
    return basis, coarse


def _largest(scores: Floats, most: int) -> NDArray[np.intp]:
    """Where the largest scores stand, in no order."""
    import numpy as np

    if len(scores) <= most:
        return np.arange(len(scores))
    nearest: NDArray[np.intp] = np.argpartition(scores, -most)[-most:]
    return nearest
