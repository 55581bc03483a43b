"""The router folder: what is loaded is what was saved, and whatever is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

from polymath.errors import RouterArtifactError
from polymath.router import MAX_TOKENS, Reference, RouterArtifact, RouterCard

OURS = ("router.json", "head.safetensors", "references.jsonl")
ENCODER = ("model.onnx", "tokenizer.json")
FILES = (*OURS, *ENCODER)
LABELS = ("coding", "law", "math")
DIMENSIONS = 5
REFERENCES = 4
FLOAT16_ERROR = 2.0**-11
"""Half a unit in the last place of float16, relative."""

LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "C order": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "every second row": lambda array: np.repeat(array, 2, axis=0)[::2],
    "reversed": lambda array: array[::-1].copy()[::-1],
    "float64": lambda array: array.astype(np.float64),
}


def example(layout: str = "C order", out_of_scope: float | None = None) -> RouterArtifact:
    random = np.random.default_rng(0)
    rows = len(LABELS) + (out_of_scope is not None)
    vectors = random.normal(size=(REFERENCES, DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lay = LAYOUTS[layout]
    return RouterArtifact(
        card=RouterCard(
            encoder="package:some-encoder",
            labels=LABELS,
            temperature=0.7,
            out_of_scope=out_of_scope,
            data_sha256="0123",
            rows={"squad": 3, "naïve": 1},
            metrics={"accuracy": 0.9},
            left_out={"squad": 0.75},
            recipe={"epochs": 2, "encoder": "package:some-encoder"},
            licence="CC BY 4.0 “quoted”",
        ),
        weight=lay(random.normal(size=(rows, DIMENSIONS)).astype(np.float32)),
        bias=lay(random.normal(size=rows).astype(np.float32)),
        vectors=lay(vectors),
        references=tuple(
            Reference(id=f"squad/train#{index}", text=f"Frage {index}: wäre 你好?", domain="law")
            for index in range(REFERENCES)
        ),
    )


def with_centres(**changes: Any) -> RouterArtifact:
    """Two centres of each label."""
    plain = example()
    centres = np.random.default_rng(1).normal(size=(6, DIMENSIONS)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    given: dict[str, Any] = {"centres": centres, "owners": np.repeat(np.arange(3), 2)} | changes
    return replace(plain, **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A router folder with nothing wrong with it, but for an encoder that nobody opens here."""
    return write(example(), tmp_path / "router")


def write(artifact: RouterArtifact, folder: Path) -> Path:
    artifact.save(folder)
    for name in ENCODER:
        (folder / name).write_bytes(b"not opened")
    return folder


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    (folder / "router.json").write_text(json.dumps(card | changes), encoding="utf-8")


def edit_head(folder: Path, **changes: np.ndarray[Any, Any] | None) -> None:
    tensors = load_file(folder / "head.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "head.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_that_is_loaded_is_the_head_that_was_saved(tmp_path: Path, layout: str) -> None:
    """numpy's safetensors writes memory as it lies: a Fortran-ordered head came back transposed."""
    saved = example(layout)
    write(saved, tmp_path)
    loaded = RouterArtifact.load(tmp_path)
    np.testing.assert_array_equal(loaded.weight, saved.weight.astype(np.float32))
    np.testing.assert_array_equal(loaded.bias, saved.bias.astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_come_back_as_float16_kept_them(tmp_path: Path, layout: str) -> None:
    saved = example(layout)
    write(saved, tmp_path)
    loaded = RouterArtifact.load(tmp_path)
    np.testing.assert_array_equal(loaded.vectors, saved.vectors.astype(np.float16))
    np.testing.assert_allclose(loaded.vectors, saved.vectors, rtol=FLOAT16_ERROR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_float32_once_loaded(tmp_path: Path, layout: str) -> None:
    write(example(layout), tmp_path)
    loaded = RouterArtifact.load(tmp_path)
    assert {loaded.weight.dtype, loaded.bias.dtype, loaded.vectors.dtype} == {np.dtype("float32")}


def test_the_layout_of_the_arrays_does_not_change_a_byte_of_the_file(tmp_path: Path) -> None:
    example("C order").save(tmp_path / "c")
    example("Fortran order").save(tmp_path / "fortran")
    first, second = (tmp_path / name / "head.safetensors" for name in ("c", "fortran"))
    assert first.read_bytes() == second.read_bytes()


def test_card_and_references_come_back_equal(folder: Path) -> None:
    loaded = RouterArtifact.load(folder)
    assert loaded.card == example().card
    assert loaded.references == example().references


def test_saving_what_was_loaded_changes_no_file(folder: Path, tmp_path: Path) -> None:
    RouterArtifact.load(folder).save(tmp_path / "again")
    for name in OURS:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_writes_all_but_the_encoder(tmp_path: Path) -> None:
    example().save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(OURS)


def test_saving_leaves_the_encoder_that_is_there_alone(folder: Path) -> None:
    example().save(folder)
    assert {file.name for file in folder.iterdir()} == set(FILES)
    assert all((folder / name).read_bytes() == b"not opened" for name in ENCODER)


@pytest.mark.parametrize("out_of_scope", [0.01, 0.5, 1.0])
def test_a_head_may_have_one_more_row_for_prompts_of_no_domain(
    tmp_path: Path, out_of_scope: float
) -> None:
    saved = example(out_of_scope=out_of_scope)
    loaded = RouterArtifact.load(write(saved, tmp_path))
    assert loaded.card.out_of_scope == out_of_scope
    assert loaded.weight.shape == (len(LABELS) + 1, DIMENSIONS)
    np.testing.assert_array_equal(loaded.weight, saved.weight)
    np.testing.assert_array_equal(loaded.bias, saved.bias)


@pytest.mark.parametrize(("rows", "limit"), [(0, 0.5), (1, None), (2, 0.5)])
def test_the_row_of_no_domain_and_its_probability_come_together(
    folder: Path, rows: int, limit: float | None
) -> None:
    edit_card(folder, out_of_scope=limit)
    count = len(LABELS) + rows
    edit_head(
        folder,
        weight=np.zeros((count, DIMENSIONS), dtype=np.float32),
        bias=np.zeros(count, dtype=np.float32),
    )
    with pytest.raises(RouterArtifactError, match=rf"does not fit.*weight \[{count}, 5\]"):
        RouterArtifact.load(folder)


def test_a_card_without_the_optional_fields_has_their_defaults(folder: Path) -> None:
    optional = ("finetuned", "max_tokens", "out_of_scope", "left_out", "recipe", "licence")
    card = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    rest = {name: value for name, value in card.items() if name not in optional}
    (folder / "router.json").write_text(json.dumps(rest), encoding="utf-8")
    loaded = RouterArtifact.load(folder).card
    assert (loaded.finetuned, loaded.max_tokens, loaded.out_of_scope) == (False, MAX_TOKENS, None)
    assert (loaded.left_out, loaded.recipe, loaded.licence) == ({}, {}, "")


def test_the_card_is_readable_text_with_its_format(folder: Path) -> None:
    text = (folder / "router.json").read_text(encoding="utf-8")
    assert json.loads(text)["format"] == 3
    assert "naïve" in text


def test_dimensions_are_those_of_the_vectors() -> None:
    assert example().dimensions == DIMENSIONS


@pytest.mark.parametrize(
    "text", ["", " ", 'a "quoted" \\ text', "two\nlines", "\r\n\t\x00\x0b\x0c\x1c", "👩‍👩‍👧 مرحبا"]
)
def test_a_reference_keeps_its_text(tmp_path: Path, text: str) -> None:
    references = (*example().references[:-1], Reference(id="1", text=text, domain="law"))
    write(replace(example(), references=references), tmp_path)
    assert RouterArtifact.load(tmp_path).references == references


def test_a_router_needs_no_references(tmp_path: Path) -> None:
    bare = replace(example(), references=(), vectors=np.empty((0, DIMENSIONS), dtype=np.float32))
    write(bare, tmp_path)
    assert RouterArtifact.load(tmp_path).references == ()


def test_saving_makes_the_folders_above(tmp_path: Path) -> None:
    write(example(), tmp_path / "a" / "b")
    assert RouterArtifact.load(tmp_path / "a" / "b").card == example().card


def test_saving_replaces_the_router_that_was_there(folder: Path) -> None:
    other = replace(example(), bias=np.zeros(len(LABELS), dtype=np.float32))
    other.save(folder)
    np.testing.assert_array_equal(RouterArtifact.load(folder).bias, other.bias)


def test_half_a_router_is_never_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        example().save(folder)
    with pytest.raises(RouterArtifactError, match=r"router\.json"):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command_that_makes_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RouterArtifactError, match="polymath train router") as failure:
        RouterArtifact.load(folder)
    assert str(folder / name) in failure.value.message


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(RouterArtifactError) as failure:
        RouterArtifact.load(folder)
    assert str(folder / name) in failure.value.message


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "router").touch()
    with pytest.raises(RouterArtifactError) as failure:
        RouterArtifact.load(tmp_path / "router")
    assert str(tmp_path / "router") in failure.value.message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RouterArtifactError) as failure:
        RouterArtifact.load(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in failure.value.message


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b"null\n"])
def test_a_corrupt_file_is_named_by_its_folder(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RouterArtifactError, match="corrupt router folder") as failure:
        RouterArtifact.load(folder)
    assert str(folder) in failure.value.message


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_off_head_is_named_by_its_folder(folder: Path, share: float) -> None:
    whole = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RouterArtifactError, match="corrupt router folder") as failure:
        RouterArtifact.load(folder)
    assert str(folder) in failure.value.message


@pytest.mark.parametrize("tensor", ["weight", "bias", "vectors"])
def test_a_missing_tensor_is_named(folder: Path, tensor: str) -> None:
    edit_head(folder, **{tensor: None})
    with pytest.raises(RouterArtifactError, match=tensor) as failure:
        RouterArtifact.load(folder)
    assert str(folder) in failure.value.message


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("weight", (2, DIMENSIONS)),
        ("weight", (3, DIMENSIONS + 1)),
        ("weight", (3 * DIMENSIONS,)),
        ("weight", (3, DIMENSIONS, 1)),
        ("bias", (2,)),
        ("bias", (3, 1)),
        ("vectors", (REFERENCES, DIMENSIONS - 1)),
        ("vectors", (REFERENCES + 1, DIMENSIONS)),
        ("vectors", (REFERENCES * DIMENSIONS,)),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_spelt_out(
    folder: Path, tensor: str, shape: tuple[int, ...]
) -> None:
    edit_head(folder, **{tensor: np.zeros(shape, dtype=np.float32)})
    with pytest.raises(RouterArtifactError, match="does not fit") as failure:
        RouterArtifact.load(folder)
    assert f"{tensor} {list(shape)}" in failure.value.message
    assert str(folder) in failure.value.message


def test_a_reference_too_many_does_not_fit(folder: Path) -> None:
    with (folder / "references.jsonl").open("a", encoding="utf-8") as file:
        file.write(example().references[0].model_dump_json() + "\n")
    with pytest.raises(RouterArtifactError, match=f"{REFERENCES + 1} references"):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("number", [0, 1, 2, 4, "new"])
def test_a_folder_of_another_format_is_refused(folder: Path, number: object) -> None:
    edit_card(folder, format=number)
    with pytest.raises(RouterArtifactError, match="format") as failure:
        RouterArtifact.load(folder)
    assert str(folder) in failure.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ["law"]),
        ("labels", "law"),
        ("temperature", 0),
        ("temperature", -1),
        ("temprature", 1),
        ("rows", {"squad": "many"}),
        ("encoder", None),
        ("max_tokens", 7),
        ("out_of_scope", 0),
        ("out_of_scope", 1.1),
    ],
)
def test_a_card_with_a_bad_field_is_refused_by_name(
    folder: Path, field: str, value: object
) -> None:
    edit_card(folder, **{field: value})
    with pytest.raises(RouterArtifactError, match=field):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_of_unicode_stay_in_a_reference(tmp_path: Path, separator: str) -> None:
    odd = Reference(id="1", text=f"a{separator}b", domain="law")
    references = (*example().references[:-1], odd)
    write(replace(example(), references=references), tmp_path)
    assert RouterArtifact.load(tmp_path).references == references


@pytest.mark.parametrize("name", ["weight", "bias", "vectors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, name: str, bad: float) -> None:
    array = np.full_like(getattr(example(), name), bad)
    write(replace(example(), **{name: array}), tmp_path)
    with pytest.raises(RouterArtifactError, match=f"{name} holds NaN or infinity"):
        RouterArtifact.load(tmp_path)


def test_labels_that_repeat_are_refused_by_name(tmp_path: Path) -> None:
    write(example(), tmp_path)
    card = json.loads((tmp_path / "router.json").read_text(encoding="utf-8"))
    card["labels"] = ["law", "law", "math"]
    (tmp_path / "router.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(RouterArtifactError, match=r"labels: .*law given more than once"):
        RouterArtifact.load(tmp_path)


def test_numbers_of_a_type_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    write(example(), tmp_path)
    head = {name: torch.tensor(getattr(example(), name)) for name in ("weight", "bias", "vectors")}
    head["weight"] = head["weight"].bfloat16()
    save_torch(head, tmp_path / "head.safetensors")
    with pytest.raises(RouterArtifactError, match="corrupt router folder"):
        RouterArtifact.load(tmp_path)


def test_centres_are_kept_in_int8(tmp_path: Path) -> None:
    artifact = with_centres()
    loaded = RouterArtifact.load(write(artifact, tmp_path / "router"))
    assert artifact.centres is not None
    assert loaded.centres is not None
    assert artifact.owners is not None
    assert loaded.owners is not None
    largest = np.abs(artifact.centres).max()
    np.testing.assert_allclose(loaded.centres, artifact.centres, atol=largest / 254 * 1.01)
    np.testing.assert_array_equal(loaded.owners, artifact.owners)
    vectors = artifact.vectors
    np.testing.assert_allclose(loaded.head.logits(vectors), artifact.head.logits(vectors), atol=0.5)


def test_a_folder_without_centres_has_a_linear_head(folder: Path) -> None:
    loaded = RouterArtifact.load(folder)
    assert loaded.centres is None
    assert loaded.owners is None
    assert loaded.head.centres is None


@pytest.mark.parametrize(
    "changes",
    [
        {"owners": np.array([0, 1, 2])},
        {"owners": np.array([0, 0, 1, 1, 2, 3])},
        {"owners": np.array([0, 0, 1, 1, 2, -1])},
        {"centres": np.ones((6, DIMENSIONS + 1), dtype=np.float32)},
        {
            "centres": np.empty((0, DIMENSIONS), dtype=np.float32),
            "owners": np.empty(0, dtype=np.int64),
        },
    ],
    ids=["too few", "no such label", "negative", "too wide", "none"],
)
def test_centres_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write(with_centres(**changes), tmp_path / "router")
    with pytest.raises(RouterArtifactError, match=str(folder)):
        RouterArtifact.load(folder)


@pytest.mark.parametrize("name", ["centres.scale", "owners"])
def test_half_the_centres_is_corrupt(tmp_path: Path, name: str) -> None:
    folder = write(with_centres(), tmp_path / "router")
    tensors = load_file(folder / "head.safetensors")
    del tensors[name]
    save_file(tensors, folder / "head.safetensors")
    with pytest.raises(RouterArtifactError, match=f"{folder}: corrupt"):
        RouterArtifact.load(folder)
