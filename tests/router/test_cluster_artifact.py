"""The folder of clusters: what is loaded is what was saved, and whatever is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from polymath.errors import RouterArtifactError
from polymath.router import ClusterArtifact, ClusterCard

FILES = ("clusters.json", "centroids.safetensors")
CLUSTERS = 3
DIMENSIONS = 5
OPTIONAL = ("format", "layers")

Array = np.ndarray[Any, Any]

LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C order": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "every second row": lambda array: np.repeat(array, 2, axis=0)[::2],
    "reversed": lambda array: array[::-1].copy()[::-1],
    "float64": lambda array: array.astype(np.float64),
}


def card(**changes: Any) -> ClusterCard:
    return ClusterCard.model_validate(
        {
            "base_model": "package:some-model",
            "base_sha256": "0123",
            "dimensions": DIMENSIONS,
            "projection_seed": 7,
            "layers": 2,
            "max_length": 128,
            "algorithm": "birch",
            "sizes": (5, 3, 4),
            "similarity": (0.5, 0.25, 0.125),
            "data_sha256": "4567",
            **changes,
        }
    )


def example(layout: str = "C order") -> ClusterArtifact:
    vectors = np.random.default_rng(0).normal(size=(CLUSTERS, DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ClusterArtifact(card(), LAYOUTS[layout](vectors))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clusters with nothing wrong with them."""
    example().save(tmp_path / "clusters")
    return tmp_path / "clusters"


def edit_card(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
    (folder / "clusters.json").write_text(json.dumps(values | changes), encoding="utf-8")


def edit_centroids(folder: Path, array: Array, name: str = "centroids") -> None:
    save_file({name: array}, folder / "centroids.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(RouterArtifactError) as failure:
        ClusterArtifact.load(folder)
    assert "\n" not in failure.value.message
    return failure.value.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, layout: str) -> None:
    saved = example(layout)
    saved.save(tmp_path)
    loaded = ClusterArtifact.load(tmp_path)
    assert loaded.card == saved.card
    assert loaded.centroids.dtype == np.float32
    np.testing.assert_array_equal(loaded.centroids, example().centroids)


def test_saving_what_was_loaded_changes_no_file(folder: Path, tmp_path: Path) -> None:
    ClusterArtifact.load(folder).save(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_layout_of_the_centroids_does_not_change_a_byte(tmp_path: Path) -> None:
    example("C order").save(tmp_path / "c")
    example("Fortran order").save(tmp_path / "fortran")
    first, second = (tmp_path / name / "centroids.safetensors" for name in ("c", "fortran"))
    assert first.read_bytes() == second.read_bytes()


def test_saving_makes_the_folders_above(tmp_path: Path) -> None:
    example().save(tmp_path / "a" / "b")
    assert ClusterArtifact.load(tmp_path / "a" / "b").card == example().card


def test_saving_leaves_what_else_is_in_the_folder_alone(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "report.html").write_text("seen")
    example().save(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES, "base", "report.html"}


def test_saving_replaces_the_clusters_that_were_there(folder: Path) -> None:
    other = replace(example(), card=card(algorithm="kmeans"), centroids=-example().centroids)
    other.save(folder)
    loaded = ClusterArtifact.load(folder)
    assert loaded.card.algorithm == "kmeans"
    np.testing.assert_array_equal(loaded.centroids, other.centroids)


def test_half_a_folder_is_never_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        example().save(folder)
    assert str(folder / "clusters.json") in refusal(folder)


def test_the_card_comes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def watched(tensors: dict[str, Array], file: Path) -> None:
        seen.append({path.name for path in folder.iterdir()})
        save_file(tensors, file)

    monkeypatch.setattr(safetensors.numpy, "save_file", watched)
    example().save(folder)
    assert seen == [{"centroids.safetensors"}]
    assert ClusterArtifact.load(folder).card == example().card


def test_a_card_without_the_optional_fields_has_their_defaults(folder: Path) -> None:
    values = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
    rest = {name: value for name, value in values.items() if name not in OPTIONAL}
    (folder / "clusters.json").write_text(json.dumps(rest), encoding="utf-8")
    loaded = ClusterArtifact.load(folder).card
    assert (loaded.format, loaded.layers) == (1, None)


@given(clusters=st.integers(1, 40))
def test_every_cluster_has_a_name_of_its_own(clusters: int) -> None:
    labels = card(sizes=(1,) * clusters).labels
    assert len(set(labels)) == clusters
    assert labels[0] == "cluster-0"
    assert labels[-1] == f"cluster-{clusters - 1}"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command_that_makes_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == (
        f"{folder / name}: missing; find clusters with `polymath train clusters`"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert str(folder / name) in refusal(folder)


def test_a_missing_folder_and_a_file_in_its_place_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"null\n", b"{}"])
def test_a_corrupt_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / name}: corrupt (")


def test_text_that_is_not_json_has_no_field_to_name(folder: Path) -> None:
    (folder / "clusters.json").write_text("{")
    assert refusal(folder).startswith(f"{folder / 'clusters.json'}: corrupt (Invalid JSON")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_named(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole)) - 1])
    assert refusal(folder).startswith(f"{folder / name}: corrupt (")


def test_centroids_of_another_name_are_refused(folder: Path) -> None:
    edit_centroids(folder, example().centroids, name="centres")
    assert refusal(folder) == f"{folder / 'centroids.safetensors'}: corrupt ('centroids')"


@pytest.mark.parametrize(
    "shape",
    [
        (CLUSTERS - 1, DIMENSIONS),
        (CLUSTERS, DIMENSIONS + 1),
        (DIMENSIONS, CLUSTERS),
        (CLUSTERS * DIMENSIONS,),
        (1, CLUSTERS, DIMENSIONS),
        (0, DIMENSIONS),
    ],
)
def test_centroids_that_do_not_fit_the_card_are_spelt_out(
    folder: Path, shape: tuple[int, ...]
) -> None:
    edit_centroids(folder, np.zeros(shape, dtype=np.float32))
    assert refusal(folder) == (
        f"{folder / 'centroids.safetensors'}: {list(shape)} does not fit 3 clusters "
        "of 5 dimensions in clusters.json"
    )


@pytest.mark.parametrize("changes", [{"sizes": [1, 2]}, {"dimensions": 6}])
def test_a_card_that_does_not_fit_the_centroids_is_refused(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_card(folder, **changes)
    assert "does not fit" in refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(folder: Path, bad: float) -> None:
    centroids = example().centroids.copy()
    centroids[1, 2] = bad
    edit_centroids(folder, centroids)
    assert refusal(folder) == f"{folder / 'centroids.safetensors'}: holds NaN or infinity"


@pytest.mark.parametrize("number", [0, 2, "new", None])
def test_another_format_is_refused(folder: Path, number: object) -> None:
    edit_card(folder, format=number)
    assert refusal(folder).startswith(f"{folder / 'clusters.json'}: corrupt (format: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizes", []),
        ("sizes", 3),
        ("dimensions", 0),
        ("layers", 0),
        ("max_length", 7),
        ("base_sha256", None),
        ("projection_seed", "none"),
        ("similarity", ["close"]),
        ("algoritm", "birch"),
    ],
)
def test_a_bad_field_of_the_card_is_named(folder: Path, field: str, value: object) -> None:
    edit_card(folder, **{field: value})
    assert refusal(folder).startswith(f"{folder / 'clusters.json'}: corrupt ({field}")


@pytest.mark.parametrize(
    "field", sorted(name for name in ClusterCard.model_fields if name not in OPTIONAL)
)
def test_a_missing_field_of_the_card_is_named(folder: Path, field: str) -> None:
    values = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
    del values[field]
    (folder / "clusters.json").write_text(json.dumps(values), encoding="utf-8")
    assert refusal(folder) == f"{folder / 'clusters.json'}: corrupt ({field}: Field required)"


def test_numbers_of_a_type_that_numpy_lacks_are_refused(folder: Path) -> None:
    """Also where a library (onnx, by ml_dtypes) has taught it."""
    import ml_dtypes

    edit_centroids(folder, example().centroids.astype(ml_dtypes.bfloat16))
    assert refusal(folder).startswith(f"{folder / 'centroids.safetensors'}: corrupt (")


def test_a_card_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(card(), "dimensions", 3)  # noqa: B010
