"""What is said of clusters: sizes, purity, typical prompts, and maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from polymath.training import centroids_of
from polymath.training.cluster_report import cluster_findings, write_cluster_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMBERS = np.array([0, 1, 0, 1, 0, 0, 2])
TEXTS = ["a", "<b>bold</b>", "c" * 500, "d", "e", "f", "g"]
LABELS = ["x", "y", "x", "y", "x", "z", "z"]


@pytest.fixture
def vectors() -> NDArray[np.float32]:
    """The first of each cluster is the nearest to its axis."""
    lean = np.arange(len(MEMBERS))[:, None] * 0.1
    towards = np.eye(8)[MEMBERS] + lean * np.eye(8)[3 + np.arange(len(MEMBERS)) % 5]
    directions: NDArray[np.float64] = towards / np.linalg.norm(towards, axis=1, keepdims=True)
    return directions.astype(np.float32)


@pytest.fixture
def findings(vectors: NDArray[np.float32]) -> dict[str, Any]:
    centroids = np.eye(8, dtype=np.float32)[:3]
    return cluster_findings(TEXTS, vectors, vectors[:, ::-1], MEMBERS, centroids, LABELS)


def test_clusters_have_their_sizes_and_labels(findings: dict[str, Any]) -> None:
    assert findings["rows"] == len(TEXTS)
    assert [cluster["size"] for cluster in findings["clusters"]] == [4, 2, 1]
    labels = [cluster["labels"] for cluster in findings["clusters"]]
    assert labels == [{"x": 3, "z": 1}, {"y": 2}, {"z": 1}]


def test_the_most_typical_prompts_come_first_as_excerpts(findings: dict[str, Any]) -> None:
    typical = [cluster["typical"] for cluster in findings["clusters"]]
    assert typical == [["a", "c" * 200, "e", "f"], ["<b>bold</b>", "d"], ["g"]]


def test_similarity_is_the_mean_cosine_with_the_centroid(
    findings: dict[str, Any], vectors: NDArray[np.float32]
) -> None:
    own = vectors[np.arange(len(MEMBERS)), MEMBERS]
    expected = np.bincount(MEMBERS, own) / np.bincount(MEMBERS)
    found = [cluster["similarity"] for cluster in findings["clusters"]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "nmi"),
    [(["a", "b", "a", "b", "a", "a", "c"], 1.0), (["same"] * 7, 0.0), (None, None)],
)
def test_information_is_shared_wholly_not_at_all_or_unknown(
    vectors: NDArray[np.float32], labels: list[str] | None, nmi: float | None
) -> None:
    centroids = centroids_of(vectors, MEMBERS)
    assert cluster_findings(TEXTS, vectors, vectors, MEMBERS, centroids, labels)["nmi"] == nmi


def test_maps_are_in_the_unit_square(findings: dict[str, Any]) -> None:
    for points in findings["maps"].values():
        assert sorted(c for _, _, c in points) == sorted(MEMBERS.tolist())
        places = np.array([point[:2] for point in points])
        np.testing.assert_array_equal(places.min(axis=0), 0)
        np.testing.assert_array_equal(places.max(axis=0), 1)


def test_the_numbers_are_written_without_the_maps(findings: dict[str, Any], tmp_path: Path) -> None:
    losses = {"cluster-0": {"base model": 2.5}}
    write_cluster_report(tmp_path, findings, losses, "Clusters")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written == {**{k: v for k, v in findings.items() if k != "maps"}, "losses": losses}


def test_prompts_are_shown_as_text_not_as_html(findings: dict[str, Any], tmp_path: Path) -> None:
    write_cluster_report(tmp_path, findings, {}, "<i>title</i>")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert "<i>title" not in page
    assert page.count("<circle") == 2 * len(TEXTS)


def test_losses_are_shown_if_there_are_some(findings: dict[str, Any], tmp_path: Path) -> None:
    for losses, shown in (({}, False), ({"cluster-0": {"base model": 2.5}}, True)):
        write_cluster_report(tmp_path, findings, losses, "Clusters")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert ("held-out" in page) is shown
        assert ("2.500" in page) is shown
