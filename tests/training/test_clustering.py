"""Groups of directions: found where there are some, numbered by size, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training import centroids_of, cluster
from polymath.training.clustering import Algorithm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Members = NDArray[np.int64]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
DIMENSIONS = 32
SIZES = (20, 5, 12, 8)
UNEQUAL = (30, 20, 10, 5, 5, 5)

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def unit(vectors: NDArray[np.float64]) -> Vectors:
    directions: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return directions.astype(np.float32)


def groups_of(*sizes: int, noise: float = 0.08, seed: int = 0) -> tuple[Vectors, Members]:
    """Vectors about one axis a group, in random order, and the group of each."""
    random = np.random.default_rng(seed)
    kinds = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    spread = random.normal(scale=noise, size=(len(kinds), DIMENSIONS))
    return unit(np.eye(DIMENSIONS)[kinds] + spread), kinds


def anything(rows: int, seed: int) -> Vectors:
    return unit(np.random.default_rng(seed).normal(size=(rows, DIMENSIONS)))


def partition(members: Members) -> set[frozenset[int]]:
    """The groups as sets of rows, whatever their numbers."""
    return {frozenset(np.flatnonzero(members == c).tolist()) for c in set(members.tolist())}


@each_algorithm
@pytest.mark.parametrize("sizes", [SIZES, UNEQUAL])
@pytest.mark.parametrize("seed", range(5))
def test_groups_that_are_far_apart_are_found(
    algorithm: Algorithm, sizes: tuple[int, ...], seed: int
) -> None:
    vectors, kinds = groups_of(*sizes, seed=seed)
    assert partition(cluster(vectors, len(sizes), algorithm, seed)) == partition(kinds)


@each_algorithm
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_tight_groups_that_are_near_each_other_are_found(
    algorithm: Algorithm, noise: float
) -> None:
    """Gradients of one model have much in common: their cosines are 0.9 across the groups."""
    vectors, kinds = groups_of(12, 8, noise=noise)
    near = unit(vectors + 3 * np.ones(DIMENSIONS) / DIMENSIONS**0.5)
    assert partition(cluster(near, 2, algorithm, 0)) == partition(kinds)


@each_algorithm
def test_the_same_seed_gives_the_same_clusters(algorithm: Algorithm) -> None:
    vectors = anything(60, seed=1)
    first, second = (cluster(vectors.copy(), 5, algorithm, 7) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@each_algorithm
def test_clusters_are_numbered_by_size(algorithm: Algorithm) -> None:
    vectors, kinds = groups_of(*SIZES)
    members = cluster(vectors, len(SIZES), algorithm, 0)
    assert np.bincount(members).tolist() == sorted(SIZES, reverse=True)
    assert set(members[kinds == SIZES.index(max(SIZES))].tolist()) == {0}


@each_algorithm
def test_the_order_of_the_rows_does_not_matter(algorithm: Algorithm) -> None:
    vectors, _ = groups_of(*SIZES)
    order = np.random.default_rng(3).permutation(len(vectors))
    members = cluster(vectors, len(SIZES), algorithm, 0)
    np.testing.assert_array_equal(cluster(vectors[order], len(SIZES), algorithm, 0), members[order])


@each_algorithm
def test_the_vectors_are_left_as_they_are(algorithm: Algorithm) -> None:
    vectors = anything(30, seed=2)
    before = vectors.copy()
    cluster(vectors, 4, algorithm, 0)
    np.testing.assert_array_equal(vectors, before)


@each_algorithm
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_than_clusters_are_one_cluster_each(algorithm: Algorithm, rows: int) -> None:
    members = cluster(np.eye(DIMENSIONS, dtype=np.float32)[:rows], 5, algorithm, 0)
    assert sorted(members.tolist()) == list(range(rows))


@each_algorithm
def test_one_cluster_is_everything(algorithm: Algorithm) -> None:
    assert set(cluster(anything(20, seed=0), 1, algorithm, 0).tolist()) == {0}


@each_algorithm
@pytest.mark.filterwarnings("ignore:Number of")
@pytest.mark.parametrize("different", [1, 2, 3])
def test_there_are_no_more_clusters_than_different_vectors(
    algorithm: Algorithm, different: int
) -> None:
    kinds = np.arange(12) % different
    members = cluster(np.eye(DIMENSIONS, dtype=np.float32)[kinds], 4, algorithm, 0)
    assert int(members.max()) < different
    assert all(len(set(members[kinds == kind].tolist())) == 1 for kind in range(different))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    clusters=st.integers(1, 8),
    algorithm=st.sampled_from(ALGORITHMS),
    seed=st.integers(0, 1000),
)
def test_numbers_have_no_gaps_and_sizes_fall(
    rows: int, clusters: int, algorithm: Algorithm, seed: int
) -> None:
    members = cluster(anything(rows, seed), clusters, algorithm, seed)
    sizes = np.bincount(members).tolist()
    assert members.shape == (rows,)
    assert 1 <= len(sizes) <= min(rows, clusters)
    assert min(sizes) > 0
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_centroids_are_the_directions_of_the_means(sizes: list[int], seed: int) -> None:
    vectors, kinds = groups_of(*sizes, noise=0.3, seed=seed)
    centroids = centroids_of(vectors, kinds)
    assert centroids.shape == (len(sizes), DIMENSIONS)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    for kind, centroid in enumerate(centroids):
        mean = vectors[kinds == kind].mean(axis=0)
        assert mean @ centroid == pytest.approx(np.linalg.norm(mean), abs=1e-6)


def test_the_centroid_of_one_vector_is_that_vector() -> None:
    vectors = anything(4, seed=0)
    np.testing.assert_allclose(centroids_of(vectors, np.arange(4)), vectors, atol=1e-6)


@each_algorithm
def test_the_centroids_of_what_is_found_are_near_its_members(algorithm: Algorithm) -> None:
    vectors, _ = groups_of(*SIZES)
    members = cluster(vectors, len(SIZES), algorithm, 0)
    nearest = (vectors @ centroids_of(vectors, members).T).argmax(axis=1)
    np.testing.assert_array_equal(nearest, members)
