"""Cosines with the clusters -> their weights -> the base and experts that answer together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from polymath.router import (
    ClusterPolicy,
    GradientRouter,
    Message,
    RouteDecision,
    cluster_weights,
)

LABELS = ("cluster-0", "cluster-1", "cluster-2", "cluster-3")
OWNERS = {"cluster-0": "lawyer", "cluster-1": "technician", "cluster-2": "technician"}
BASE = "base"
EXPERTS = {BASE, "lawyer", "technician"}
SPREAD = 0.05
"""A standard deviation of cosines that rounding leaves alone."""

FLOAT32_ERROR = 1e-5
"""Of a weight, where the cosines are of a size of 1 and float32 keeps 7 digits of them."""

Floats = NDArray[np.floating[Any]]


def cosines_of(clusters: int) -> st.SearchStrategy[Floats]:
    """Cosines that differ, of two prompts."""
    return arrays.arrays(np.float64, (2, clusters), elements=st.floats(-1, 1)).filter(
        lambda cosines: cosines.std(axis=1).min() > SPREAD
    )


cosines = st.integers(2, 6).flatmap(cosines_of)
temperatures = st.floats(0.05, 20)
shares = st.lists(st.floats(1e-6, 1), min_size=len(LABELS), max_size=len(LABELS)).map(
    lambda values: {label: value / sum(values) for label, value in zip(LABELS, values, strict=True)}
)
policies = st.builds(
    ClusterPolicy,
    st.just(BASE),
    st.dictionaries(st.sampled_from(LABELS), st.sampled_from(sorted(EXPERTS))),
    st.floats(0, 100),
    st.integers(1, 6),
)


def weights_of(cosines: Floats, temperature: float = 1.0) -> Floats:
    """The weights of prompts with these cosines: each centroid is an axis."""
    return cluster_weights(cosines, np.eye(cosines.shape[1]), temperature)


def units(random: np.random.Generator, rows: int, dimensions: int) -> NDArray[np.float32]:
    vectors = random.normal(size=(rows, dimensions)).astype(np.float32)
    result: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result


def policy(**changes: Any) -> ClusterPolicy:
    return ClusterPolicy(**{"base": BASE, "owners": OWNERS, **changes})


def router(
    weights: Sequence[float], labels: Sequence[str] = LABELS, **changes: Any
) -> GradientRouter:
    """A router that reads these weights from any conversation."""
    return GradientRouter(lambda messages: np.array(weights), labels, policy(**changes))


def ask(weights: Sequence[float], **changes: Any) -> RouteDecision:
    return router(weights, **changes).route([{"role": "user", "content": "a question"}])


# --- the weights of the clusters -----------------------------------------------------------------


def test_the_weights_are_the_softmax_of_the_standardised_cosines() -> None:
    """Cosines 0.1 and 0.3 are -1 and 1 once standardised: exp(-1) against exp(1)."""
    expected = np.exp([-1.0, 1.0]) / np.exp([-1.0, 1.0]).sum()
    np.testing.assert_allclose(weights_of(np.array([[0.1, 0.3]])), [expected], rtol=1e-12)


@given(cosines=cosines, temperature=temperatures)
def test_a_temperature_divides_the_standardised_cosines(
    cosines: Floats, temperature: float
) -> None:
    spread = cosines - cosines.mean(axis=1, keepdims=True)
    exponentials = np.exp(spread / cosines.std(axis=1, keepdims=True) / temperature)
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights_of(cosines, temperature), expected, rtol=1e-9)


@given(
    cosines=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.floats(-1, 1, width=32),
    ),
    temperature=temperatures,
)
def test_weights_are_a_distribution_whatever_the_cosines(
    cosines: Floats, temperature: float
) -> None:
    weights = weights_of(cosines, temperature)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


@given(cosines=cosines, shift=st.floats(-1, 1))
def test_adding_a_constant_to_all_cosines_changes_nothing(cosines: Floats, shift: float) -> None:
    np.testing.assert_allclose(weights_of(cosines + shift), weights_of(cosines), rtol=1e-9)


@given(cosines=cosines, scale=st.floats(0.01, 100))
def test_a_scale_of_all_cosines_changes_nothing(cosines: Floats, scale: float) -> None:
    np.testing.assert_allclose(weights_of(scale * cosines), weights_of(cosines), rtol=1e-9)


@given(seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_the_length_of_the_features_does_not_matter(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    features, centroids = units(random, 3, 16), units(random, 4, 16)
    np.testing.assert_allclose(
        cluster_weights(np.float32(scale) * features, centroids),
        cluster_weights(features, centroids),
        rtol=1e-4,
    )


@given(cosines=cosines, data=st.data())
def test_the_order_of_the_clusters_does_not_matter(cosines: Floats, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(cosines.shape[1])))
    axes = np.eye(cosines.shape[1])
    shuffled = cluster_weights(cosines, axes[order])
    np.testing.assert_allclose(shuffled, weights_of(cosines)[:, order], rtol=1e-9)


@given(cosines=cosines)
def test_a_batch_is_its_rows_one_by_one(cosines: Floats) -> None:
    alone = np.concatenate([weights_of(row[None]) for row in cosines])
    np.testing.assert_array_equal(weights_of(cosines), alone)


@given(cosines=cosines, temperature=temperatures)
def test_the_nearer_a_cluster_the_larger_its_weight(cosines: Floats, temperature: float) -> None:
    order = cosines.argsort(axis=1)
    ordered = np.take_along_axis(weights_of(cosines, temperature), order, axis=1)
    assert (np.diff(ordered, axis=1) >= 0).all()


@given(cosines=cosines, temperature=temperatures)
def test_a_higher_temperature_is_never_surer(cosines: Floats, temperature: float) -> None:
    cool, warm = weights_of(cosines, temperature), weights_of(cosines, 2 * temperature)
    assert (warm.max(axis=1) <= cool.max(axis=1) + 1e-12).all()


@given(clusters=st.integers(1, 8), cosine=st.floats(-1, 1), temperature=temperatures)
def test_equal_cosines_give_equal_weights(clusters: int, cosine: float, temperature: float) -> None:
    weights = weights_of(np.full((1, clusters), cosine), temperature)
    np.testing.assert_allclose(weights, 1 / clusters, rtol=1e-9)


@pytest.mark.parametrize("clusters", [2, 3, 5, 7, 33])
def test_a_centroid_that_stands_many_times_gives_equal_weights(clusters: int) -> None:
    """Whatever the order in which a matrix product sums: the differences are rounding alone."""
    random = np.random.default_rng(clusters)
    features, centroid = units(random, 8, 4096), units(random, 1, 4096)
    weights = cluster_weights(features, np.repeat(centroid, clusters, axis=0))
    np.testing.assert_allclose(weights, 1 / clusters, rtol=0.2)


@pytest.mark.parametrize("temperature", [1e-9, 0.1, 1.0, 1e9])
def test_features_of_zero_give_equal_weights(temperature: float) -> None:
    centroids = units(np.random.default_rng(0), 5, 16)
    weights = cluster_weights(np.zeros((2, 16), dtype=np.float32), centroids, temperature)
    np.testing.assert_array_equal(weights, np.full((2, 5), 0.2))


def test_a_prompt_of_zeros_leaves_the_others_alone() -> None:
    random = np.random.default_rng(0)
    features, centroids = units(random, 3, 16), units(random, 4, 16)
    silent = np.concatenate([features[:1], np.zeros_like(features[:1]), features[1:]])
    mixed, whole = cluster_weights(silent, centroids), cluster_weights(features, centroids)
    np.testing.assert_allclose(mixed[[0, 2, 3]], whole, atol=FLOAT32_ERROR)
    np.testing.assert_array_equal(mixed[1], [0.25] * 4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-4])
def test_without_temperature_the_nearest_cluster_has_it_all(temperature: float) -> None:
    weights = weights_of(np.array([[0.1, 0.2, -0.5], [-0.1, -0.3, -0.2]]), temperature)
    np.testing.assert_array_equal(weights, [[0, 1, 0], [1, 0, 0]])


def test_with_much_temperature_all_clusters_are_alike() -> None:
    weights = weights_of(np.array([[0.1, 0.2, -0.5]]), 1e9)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@given(cosine=st.floats(-1, 1), temperature=st.floats(1e-6, 1e6))
def test_one_cluster_has_it_all(cosine: float, temperature: float) -> None:
    np.testing.assert_array_equal(weights_of(np.array([[cosine]]), temperature), [[1.0]])


def test_no_prompts_have_no_weights() -> None:
    assert weights_of(np.empty((0, 3), dtype=np.float32)).shape == (0, 3)


def test_the_features_are_left_alone() -> None:
    random = np.random.default_rng(0)
    features, centroids = units(random, 2, 8), units(random, 3, 8)
    before = features.copy(), centroids.copy()
    cluster_weights(features, centroids)
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(centroids, before[1])


# --- who answers ---------------------------------------------------------------------------------


def test_one_sure_cluster_without_a_base_is_its_expert_alone() -> None:
    weights = dict.fromkeys(LABELS, 0.0) | {"cluster-0": 1.0}
    assert policy(base_weight=0).choose(weights) == {"lawyer": 1.0}


def test_one_sure_cluster_and_the_base_share_evenly() -> None:
    weights = dict.fromkeys(LABELS, 0.0) | {"cluster-0": 1.0}
    assert policy().choose(weights) == {BASE: 0.5, "lawyer": 0.5}


def test_experts_share_by_the_weights_of_the_best_clusters() -> None:
    """0.6 and 0.3 are two thirds and one third of the half that the base leaves."""
    weights = {"cluster-0": 0.6, "cluster-1": 0.3, "cluster-2": 0.1}
    assert policy(top_k=2).choose(weights) == pytest.approx(
        {BASE: 1 / 2, "lawyer": 1 / 3, "technician": 1 / 6}
    )


@given(policy=policies, weights=shares)
def test_weights_are_a_distribution_over_experts_the_largest_first(
    policy: ClusterPolicy, weights: dict[str, float]
) -> None:
    chosen = policy.choose(weights)
    assert sum(chosen.values()) == pytest.approx(1.0)
    assert list(chosen.values()) == sorted(chosen.values(), reverse=True)
    assert all(weight > 0 for weight in chosen.values())
    assert set(chosen) <= EXPERTS


@given(weights=shares, base_weight=st.floats(0, 1e6), top_k=st.integers(1, 6))
def test_the_share_of_the_base_is_that_of_its_weight(
    weights: dict[str, float], base_weight: float, top_k: int
) -> None:
    owners = dict.fromkeys(LABELS, "expert")
    chosen = policy(owners=owners, base_weight=base_weight, top_k=top_k).choose(weights)
    assert chosen.get(BASE, 0.0) == pytest.approx(base_weight / (1 + base_weight))


@given(weights=shares, base_weight=st.floats(0, 10), top_k=st.integers(1, 6))
def test_so_many_clusters_count_and_keep_their_proportions(
    weights: dict[str, float], base_weight: float, top_k: int
) -> None:
    own = {label: label for label in LABELS}
    chosen = policy(owners=own, base_weight=base_weight, top_k=top_k).choose(weights)
    chosen.pop(BASE, None)
    assert len(chosen) == min(top_k, len(LABELS))
    best = sorted(weights.values(), reverse=True)[: len(chosen)]
    for (_, weight), cluster in zip(chosen.items(), best, strict=True):
        assert weight * (1 + base_weight) == pytest.approx(cluster / sum(best))


@given(weights=shares, base_weight=st.floats(0, 10), top_k=st.integers(1, 6))
def test_clusters_without_an_owner_go_to_the_base(
    weights: dict[str, float], base_weight: float, top_k: int
) -> None:
    chosen = policy(owners={}, base_weight=base_weight, top_k=top_k).choose(weights)
    assert chosen == {BASE: pytest.approx(1.0)}


def test_of_two_clusters_one_without_an_owner_adds_to_the_base() -> None:
    weights = {"cluster-0": 0.5, "cluster-3": 0.5}
    assert policy(base_weight=1).choose(weights) == {BASE: 0.75, "lawyer": 0.25}
    assert policy(base_weight=0).choose(weights) == {BASE: 0.5, "lawyer": 0.5}


def test_a_base_that_owns_a_cluster_has_both_shares() -> None:
    assert policy(owners={"cluster-0": BASE}).choose({"cluster-0": 1.0}) == {BASE: 1.0}


def test_two_clusters_of_one_expert_add_up() -> None:
    """Each is behind the first cluster, together they are before it."""
    weights = {"cluster-0": 0.4, "cluster-1": 0.3, "cluster-2": 0.3}
    assert policy(base_weight=0, top_k=3).choose(weights) == pytest.approx(
        {"technician": 0.6, "lawyer": 0.4}
    )


@given(weights=shares, order=st.permutations(LABELS))
def test_the_order_of_the_labels_does_not_matter(
    weights: dict[str, float], order: list[str]
) -> None:
    shuffled: Mapping[str, float] = {label: weights[label] for label in order}
    everyone = policy(top_k=len(LABELS))
    assert everyone.choose(shuffled) == pytest.approx(everyone.choose(weights))


def test_an_owner_of_no_cluster_gets_nothing() -> None:
    owners = {**OWNERS, "coding": "coder"}
    assert policy(owners=owners).choose({"cluster-0": 1.0}) == {BASE: 0.5, "lawyer": 0.5}


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        policy().base = "other"  # type: ignore[misc]


# --- the decision --------------------------------------------------------------------------------


def test_a_decision_is_that_of_the_policy_and_says_why() -> None:
    decision = ask([0.1, 0.5, 0.15, 0.25])
    assert decision.weights == policy().choose(
        dict(zip(LABELS, (0.1, 0.5, 0.15, 0.25), strict=True))
    )
    assert (decision.source, decision.combine) == ("gradient", "logits")
    assert (decision.domain, decision.confidence) == ("cluster-1", 0.5)
    assert list(decision.why.domains.items()) == [
        ("cluster-1", 0.5),
        ("cluster-3", 0.25),
        ("cluster-2", 0.15),
        ("cluster-0", 0.1),
    ]
    assert (decision.why.nearest, decision.why.out_of_scope, decision.why.rule) == ((), None, None)


def test_clusters_that_answer_nothing_are_still_shown() -> None:
    decision = ask([0.7, 0.1, 0.1, 0.1], top_k=1)
    assert set(decision.weights) == {BASE, "lawyer"}
    assert set(decision.why.domains) == set(LABELS)


def test_of_equal_clusters_the_first_is_the_domain() -> None:
    assert ask([0.25] * 4).domain == "cluster-0"


def test_one_cluster_is_enough() -> None:
    decision = ask([1.0], labels=["cluster-0"])
    assert decision.weights == {BASE: 0.5, "lawyer": 0.5}
    assert decision.confidence == 1.0


def test_the_whole_conversation_is_read() -> None:
    read: list[Sequence[Message]] = []

    def remember(messages: Sequence[Message]) -> Floats:
        read.append(messages)
        return np.full(4, 0.25)

    turns: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    GradientRouter(remember, LABELS, policy()).route(turns, {"x-team": "arts"})
    assert read == [turns]


def test_a_decision_says_how_long_it_took() -> None:
    assert 0 < ask([0.25] * 4).latency_ms < 10_000


def test_a_decision_is_strict_json() -> None:
    decision = ask([0.1, 0.5, 0.15, 0.25])
    values = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert values["weights"] == decision.weights
    assert (values["source"], values["combine"]) == ("gradient", "logits")


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2] * 5])
def test_weights_of_other_clusters_are_an_error(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="zip"):
        ask(weights)
