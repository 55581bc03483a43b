"""Routing by gradient similarity (ELREA, Li et al. 2025, section 3.3).

The prompt's gradient is compared with the centroid of each cluster; the cosines, standardised over
the clusters, give the weights by a softmax. The base adapter and the nearest clusters' experts then
answer as one, by the weighted sum of their logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymath.router.calibration import calibrated
from polymath.router.decision import Allowed, Message, RouteDecision, Why, largest_first, within

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

__all__ = ["ClusterPolicy", "ClusterReader", "GradientRouter", "cluster_weights"]

ClusterReader = Callable[[Sequence[Message]], "Floats"]
"""A conversation -> weights of the clusters, [clusters], summing to 1."""

LEAST_SPREAD = 1e-6


def cluster_weights(features: Floats, centroids: Floats, temperature: float = 1.0) -> Floats:
    """Softmax over the clusters of the standardised cosines (ELREA, eq. 7).

    Args:
        features: [prompts, dimensions], unit length, or zeros where nothing is known.
        centroids: [clusters, dimensions], unit length.
    Returns:
        [prompts, clusters], each row summing to 1.
    """
    import numpy as np

    cosines = (features @ centroids.T).astype(np.float64)
    cosines -= cosines.mean(axis=1, keepdims=True)
    cosines /= np.maximum(cosines.std(axis=1, keepdims=True), LEAST_SPREAD)
    return calibrated(cosines, temperature)


@dataclass(frozen=True, slots=True)
class ClusterPolicy:
    """Who answers, given the weights of the clusters.

    Attributes:
        base: expert of the base adapter.
        owners: cluster -> expert; the base answers for the others.
        base_weight: of the base's logits, where the clusters' experts have 1 together.
        top_k: so many clusters count.
    """

    base: str
    owners: Mapping[str, str]
    base_weight: float = 1.0
    top_k: int = 2

    def choose(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights over experts, summing to 1, the largest first."""
        best = largest_first(weights, self.top_k)
        total = sum(best.values()) * (1 + self.base_weight)
        experts = {self.base: self.base_weight / (1 + self.base_weight)}
        for cluster, weight in best.items():
            expert = self.owners.get(cluster, self.base)
            experts[expert] = experts.get(expert, 0.0) + weight / total
        return {name: weight for name, weight in largest_first(experts).items() if weight > 0}


class GradientRouter:
    """Conversation -> weights of clusters -> weights over experts that answer together.

    Args:
        read: weights of the clusters, from the prompt's gradient or from what learned to guess it.
        labels: names of the clusters.
    """

    def __init__(self, read: ClusterReader, labels: Sequence[str], policy: ClusterPolicy) -> None:
        self._read = read
        self._labels = tuple(labels)
        self._policy = policy

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The decision for the last user turn."""
        started = time.perf_counter()
        weights = dict(zip(self._labels, self._read(messages).tolist(), strict=True))
        ordered = largest_first(weights)
        domain = next(iter(ordered))
        return RouteDecision(
            weights=within(self._policy.choose(weights), allowed),
            confidence=ordered[domain],
            domain=domain,
            source="gradient",
            why=Why(domains=ordered),
            combine="logits",
            latency_ms=(time.perf_counter() - started) * 1e3,
        )
