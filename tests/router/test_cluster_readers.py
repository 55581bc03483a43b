"""The clusters of a conversation, by its gradient or by its words."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.errors import ModelSourceError, RouterArtifactError
from polymath.router import (
    ClusterArtifact,
    ClusterCard,
    Message,
    RouterArtifact,
    RouterCard,
    SentenceEncoder,
    calibrated,
    cluster_weights,
    distilled_reader,
    gradient_reader,
    halves,
)
from tests.router.conftest import TINY_TOKENS, TINY_WIDTH, Floats

CLUSTERS = 3
NAMES = tuple(f"cluster-{index}" for index in range(CLUSTERS))
DIMENSIONS = 8
TEMPERATURE = 0.5
FLOAT32_ERROR = 1e-5
TEXTS = ("what is the law", "sort a list", "", "proof 12345", "\ud800", "word " * 500)


def units(rows: int, dimensions: int) -> Floats:
    vectors = np.random.default_rng(rows).normal(size=(rows, dimensions)).astype(np.float32)
    result: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result


def said(*turns: str) -> list[Message]:
    return [{"role": "user", "content": turn} for turn in turns]


@pytest.fixture(scope="module")
def clusters() -> ClusterArtifact:
    card = ClusterCard(
        base_model="fake",
        base_sha256="",
        dimensions=DIMENSIONS,
        projection_seed=0,
        max_length=128,
        algorithm="birch",
        sizes=(1,) * CLUSTERS,
        similarity=(1.0,) * CLUSTERS,
        data_sha256="",
    )
    return ClusterArtifact(card, units(CLUSTERS, DIMENSIONS))


@pytest.fixture(scope="module")
def distilled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router folder with a random head over a real, if tiny, encoder."""
    folder = tmp_path_factory.mktemp("distilled") / "router"
    shutil.copytree(tiny_folder, folder)
    RouterArtifact(
        card=RouterCard(
            encoder="tiny",
            max_tokens=TINY_TOKENS,
            labels=NAMES,
            temperature=TEMPERATURE,
            data_sha256="",
            rows={},
            metrics={},
        ),
        weight=3 * units(CLUSTERS, TINY_WIDTH),
        bias=np.array([0.5, 0.0, -0.5], dtype=np.float32),
        vectors=np.empty((0, TINY_WIDTH), dtype=np.float32),
    ).save(folder)
    return folder


@given(values=st.lists(st.floats(-1, 1, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS))
def test_the_gradient_is_weighed_against_the_centroids(
    clusters: ClusterArtifact, values: list[float]
) -> None:
    features = np.array(values, dtype=np.float32)
    read = gradient_reader(clusters, lambda messages: features, TEMPERATURE)
    expected = cluster_weights(features[None], clusters.centroids, TEMPERATURE)[0]
    np.testing.assert_array_equal(read(said("text")), expected)


@pytest.mark.parametrize("cluster", range(CLUSTERS))
def test_a_gradient_along_a_centroid_is_of_that_cluster(
    clusters: ClusterArtifact, cluster: int
) -> None:
    read = gradient_reader(clusters, lambda messages: clusters.centroids[cluster], 1e-6)
    np.testing.assert_array_equal(read(said("text")), np.eye(CLUSTERS)[cluster])


def test_a_gradient_of_nothing_is_of_all_clusters(clusters: ClusterArtifact) -> None:
    read = gradient_reader(clusters, lambda messages: np.zeros(DIMENSIONS, np.float32), 1.0)
    np.testing.assert_array_equal(read([]), np.full(CLUSTERS, 1 / CLUSTERS))


def test_the_gradient_is_that_of_the_whole_conversation(clusters: ClusterArtifact) -> None:
    read: list[Sequence[Message]] = []

    def features(messages: Sequence[Message]) -> Floats:
        read.append(messages)
        return np.zeros(DIMENSIONS, dtype=np.float32)

    turns: list[Message] = [{"role": "system", "content": "Be brief."}, *said("one", "two")]
    gradient_reader(clusters, features, 1.0)(turns)
    assert read == [turns]


@pytest.mark.parametrize("text", TEXTS)
def test_what_the_words_say_is_the_calibrated_head(
    distilled: Path, tiny: SentenceEncoder, text: str
) -> None:
    """By the definition, from the folder's own encoder and head."""
    artifact = RouterArtifact.load(distilled)
    read, _ = halves(tiny.encode([text]))
    expected = calibrated(read @ artifact.weight.T + artifact.bias, TEMPERATURE)[0]
    found = distilled_reader(distilled, 1, NAMES)(said(text))
    np.testing.assert_allclose(found, expected, rtol=FLOAT32_ERROR)
    assert found.sum() == pytest.approx(1.0)


def test_words_tell_prompts_apart(distilled: Path) -> None:
    read = distilled_reader(distilled, 1, NAMES)
    assert np.abs(read(said(TEXTS[0])) - read(said(TEXTS[1]))).max() > 1e-3


def test_the_words_are_those_of_the_last_user_turn(distilled: Path) -> None:
    read = distilled_reader(distilled, 1, NAMES)
    turns: list[Message] = [
        {"role": "system", "content": "sort"},
        *said("proof", "what is the law"),
        {"role": "assistant", "content": "sort"},
    ]
    np.testing.assert_array_equal(read(turns), read(said("what is the law")))


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "sort"}]])
def test_without_a_user_turn_the_words_are_none(distilled: Path, messages: list[Message]) -> None:
    read = distilled_reader(distilled, 1, NAMES)
    np.testing.assert_array_equal(read(messages), read(said("")))


def test_texts_are_cut_to_what_the_card_says(distilled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(distilled, tmp_path / "short"))
    artifact = RouterArtifact.load(folder)
    replace(artifact, card=artifact.card.model_copy(update={"max_tokens": 16})).save(folder)
    read, side = distilled_reader(folder, 1, NAMES), "sort a list " * 20
    first, second = (read(said(f"{side}{word} {side}")) for word in ("law", "stock"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "error"), [("router.json", RouterArtifactError), ("tokenizer.json", ModelSourceError)]
)
def test_a_corrupt_file_is_named(
    distilled: Path, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    folder = Path(shutil.copytree(distilled, tmp_path / "broken"))
    (folder / name).write_bytes(b"{")
    with pytest.raises(error, match=str(folder)):
        distilled_reader(folder, 1, NAMES)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RouterArtifactError, match=str(tmp_path / "distilled")):
        distilled_reader(tmp_path / "distilled", 1, NAMES)
