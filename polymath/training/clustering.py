"""Groups of unit vectors: BIRCH, as ELREA does it, and K-means to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["Algorithm", "centroids_of", "cluster"]

Algorithm = Literal["birch", "kmeans", "spherical"]

BIRCH_THRESHOLD = 0.5
"""Radius of the smallest subclusters (scikit-learn's default)."""

LEAST_THRESHOLD = 1e-3
"""Vectors that are nearer to each other than this are the same."""

ROUNDS = 50
STARTS = 4


def cluster(vectors: Vectors, clusters: int, algorithm: Algorithm, seed: int) -> NDArray[np.int64]:
    """The cluster of each vector, [rows]; 0 is the largest cluster.

    Args:
        vectors: [rows, dimensions], unit length.
        clusters: how many there shall be; fewer if there are fewer different vectors.
    """
    import numpy as np

    clusters = min(clusters, len(np.unique(vectors, axis=0)))
    if clusters == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    found = ALGORITHMS[algorithm](vectors, clusters, seed)
    _, places, sizes = np.unique(found, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    result: NDArray[np.int64] = rank[places].astype(np.int64)
    return result


def centroids_of(vectors: Vectors, members: NDArray[np.int64]) -> Vectors:
    """Mean directions of the clusters, [clusters, dimensions], unit length."""
    import numpy as np

    means = np.stack([vectors[members == c].mean(axis=0) for c in range(int(members.max()) + 1)])
    directions: Vectors = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return directions


def _birch(vectors: Vectors, clusters: int, seed: int) -> Any:
    """BIRCH (Zhang et al. 1996): a tree of subclusters in one pass, then Ward's on those.

    The radius is halved until there are enough of them, as gradients may have much in common.
    """
    from sklearn.cluster import Birch

    threshold = BIRCH_THRESHOLD
    while threshold > LEAST_THRESHOLD:
        tree = Birch(threshold=threshold, n_clusters=None).fit(vectors)
        if len(tree.subcluster_centers_) >= clusters:
            return tree.set_params(n_clusters=clusters).fit_predict(vectors)
        threshold /= 2
    return tree.labels_


def _kmeans(vectors: Vectors, clusters: int, seed: int) -> Any:
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=STARTS, random_state=seed).fit_predict(vectors)


def _spherical(vectors: Vectors, clusters: int, seed: int) -> Any:
    """K-means by cosine (Dhillon and Modha 2001), from the best of some random starts."""
    import numpy as np
    from sklearn.cluster import kmeans_plusplus

    best, best_score = None, -np.inf
    for start in range(STARTS):
        centres, _ = kmeans_plusplus(vectors, clusters, random_state=seed * STARTS + start)
        for _ in range(ROUNDS):
            cosines = vectors @ centres.T
            members = cosines.argmax(axis=1)
            for c in np.unique(members):
                total = vectors[members == c].sum(axis=0)
                centres[c] = total / max(float(np.linalg.norm(total)), 1e-12)
        score = float(cosines.max(axis=1).sum())
        if score > best_score:
            best, best_score = members, score
    return best


ALGORITHMS = {"birch": _birch, "kmeans": _kmeans, "spherical": _spherical}
