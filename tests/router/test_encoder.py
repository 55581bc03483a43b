"""Texts to vectors of two halves: the same alone and in company, for any text whatever."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.errors import ModelSourceError
from polymath.router import MAX_TOKENS, SentenceEncoder, halves, head_and_tail, open_tokenizer
from tests.router.conftest import TINY_TOKENS, TINY_WIDTH, Floats, lengths

MINILM_WIDTH = 384
"""Of a half."""

TOLERANCE = 1e-6

CLS, SEP = 101, 102
"""all-MiniLM-L6-v2's."""

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
    "one character": "x",
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

ALL_TEXTS = [*TEXTS.values(), *ODD_TEXTS.values()]

id_rows = st.lists(st.integers(0, 30_000), max_size=40)
mixed_rows = st.lists(
    st.one_of(
        st.sampled_from([[], [2, 3], [2, 40, 3]]),  # so that lengths repeat
        st.lists(st.integers(0, 100), max_size=TINY_TOKENS),
    ),
    max_size=8,
)
any_text = st.text(st.characters(exclude_categories=()))


@given(ids=id_rows)
def test_what_is_short_enough_is_kept_whole(ids: list[int]) -> None:
    assert head_and_tail(ids, len(ids)) == ids
    assert head_and_tail(ids, len(ids) + 1) == ids


def test_of_what_is_too_long_three_quarters_are_the_start_and_one_is_the_end() -> None:
    assert head_and_tail(list(range(100)), 8) == [0, 1, 2, 3, 4, 5, 98, 99]


@given(ids=id_rows, most=st.integers(1, 50))
def test_head_and_tail_are_a_start_and_an_end(ids: list[int], most: int) -> None:
    kept = head_and_tail(ids, most)
    assert len(kept) == min(len(ids), most)
    head = len(kept) - most // 4 if len(ids) > most else len(ids)
    assert kept[:head] == ids[:head]
    assert kept[head:] == (ids[-(most // 4) :] if head < len(kept) else [])


def test_token_ids_are_those_of_the_tokenizer(minilm: SentenceEncoder, minilm_folder: Path) -> None:
    text = "What is the law?"
    assert minilm.token_ids([text]) == [open_tokenizer(minilm_folder).encode(text).ids]


def test_token_ids_begin_and_end_as_bert_was_trained(minilm: SentenceEncoder) -> None:
    for ids in minilm.token_ids(ALL_TEXTS):
        assert (ids[0], ids[-1]) == (CLS, SEP)
        assert 2 <= len(ids) <= MAX_TOKENS


def test_a_long_text_has_the_most_tokens_that_are_allowed(minilm: SentenceEncoder) -> None:
    assert [len(ids) for ids in minilm.token_ids(["word " * 20_000])] == [MAX_TOKENS]


@pytest.mark.parametrize("most", [8, 9, 64])
def test_fewer_tokens_can_be_asked_for(tiny_folder: Path, most: int) -> None:
    ids = SentenceEncoder(tiny_folder, max_tokens=most).token_ids(["what is the law of " * 50])
    assert len(ids[0]) == most


def test_the_end_of_a_long_text_is_read(minilm: SentenceEncoder) -> None:
    """The question often stands behind the quotation."""
    long = "the plaintiff appeals " * 2_000
    (plain, asking), (start, end) = (
        minilm.token_ids([long + "to the court", long + "to the moon"]),
        minilm.token_ids(["", " to the moon"]),
    )
    assert plain != asking
    assert asking[-len(end) + 1 :] == end[1:]
    assert start == [CLS, SEP]


def test_the_middle_of_a_long_text_is_not_read(minilm: SentenceEncoder) -> None:
    side = "the plaintiff appeals " * 400
    (one, other) = minilm.encode([side + "to the moon " + side, side + "in vain " + side])
    np.testing.assert_array_equal(one, other)


def test_encode_is_encode_ids_of_token_ids(tiny: SentenceEncoder) -> None:
    np.testing.assert_array_equal(
        tiny.encode(ALL_TEXTS), tiny.encode_ids(tiny.token_ids(ALL_TEXTS))
    )


@pytest.mark.parametrize("text", ALL_TEXTS, ids=[*TEXTS, *ODD_TEXTS])
def test_a_text_has_the_same_vector_alone_and_with_itself(
    minilm: SentenceEncoder, text: str
) -> None:
    """The rows of a batch do not see each other."""
    alone = minilm.encode([text])
    np.testing.assert_allclose(minilm.encode([text] * 3), alone.repeat(3, axis=0), atol=TOLERANCE)


def test_a_batch_gives_each_text_what_it_gets_alone(tiny: SentenceEncoder) -> None:
    alone = np.concatenate([tiny.encode([text]) for text in ALL_TEXTS])
    np.testing.assert_allclose(tiny.encode(ALL_TEXTS), alone, atol=TOLERANCE)


def test_a_batch_of_a_deep_encoder_gives_each_text_what_it_gets_alone(
    minilm: SentenceEncoder,
) -> None:
    alone = np.concatenate([minilm.encode([text]) for text in ALL_TEXTS])
    np.testing.assert_allclose(minilm.encode(ALL_TEXTS), alone, atol=TOLERANCE)


@given(order=st.permutations(ALL_TEXTS))
@settings(max_examples=10)
def test_the_order_of_a_batch_is_the_order_of_its_vectors(
    tiny: SentenceEncoder, order: list[str]
) -> None:
    vectors = dict(zip(ALL_TEXTS, tiny.encode(ALL_TEXTS), strict=True))
    expected = np.stack([vectors[text] for text in order])
    np.testing.assert_allclose(tiny.encode(order), expected, atol=TOLERANCE)


def test_encoding_twice_gives_the_same_bits(minilm: SentenceEncoder) -> None:
    np.testing.assert_array_equal(minilm.encode(ALL_TEXTS), minilm.encode(ALL_TEXTS))


def test_the_number_of_threads_changes_nothing(tiny: SentenceEncoder, tiny_folder: Path) -> None:
    threaded = SentenceEncoder(tiny_folder, threads=2, max_tokens=TINY_TOKENS)
    np.testing.assert_allclose(threaded.encode(ALL_TEXTS), tiny.encode(ALL_TEXTS), atol=TOLERANCE)


@given(rows=mixed_rows)
@settings(max_examples=60)
def test_rows_of_any_lengths_have_the_vectors_that_they_have_alone(
    tiny: SentenceEncoder, rows: list[list[int]]
) -> None:
    """In their own order; those of no tokens at all are zero, never old memory."""
    vectors = tiny.encode_ids(rows)
    assert vectors.shape == (len(rows), tiny.dimensions)
    for row, vector in zip(rows, vectors, strict=True):
        np.testing.assert_allclose(vector, tiny.encode_ids([row])[0], atol=TOLERANCE)
        np.testing.assert_allclose(lengths(vector[None]), float(bool(row)), atol=1e-5)


def test_rows_of_one_length_run_together(
    tiny: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands between them, and nothing is padded."""
    session, batches = tiny._session, []

    class Watched:
        get_outputs = session.get_outputs

        def run(self, names: None, inputs: Mapping[str, Any]) -> list[Floats]:
            batches.append({name: ids.tolist() for name, ids in inputs.items()})
            vectors: list[Floats] = session.run(names, inputs)
            return vectors

    monkeypatch.setattr(tiny, "_session", Watched())
    tiny.encode_ids([[2, 3], [2, 10, 3], [], [2, 4], [2, 11, 3], [5]])
    batches.sort(key=lambda inputs: len(inputs["input_ids"][0]))
    assert batches == [
        {"input_ids": [[5]]},
        {"input_ids": [[2, 3], [2, 4]]},
        {"input_ids": [[2, 10, 3], [2, 11, 3]]},
    ]


def test_vectors_are_float32_rows_of_two_halves_of_unit_length(minilm: SentenceEncoder) -> None:
    vectors = minilm.encode(ALL_TEXTS)
    assert vectors.shape == (len(ALL_TEXTS), 2 * MINILM_WIDTH)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(lengths(vectors), 1.0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (2, 3, 6)])
def test_halves_are_those_of_the_last_axis(shape: tuple[int, ...]) -> None:
    vectors = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    first, second = halves(vectors)
    assert first.shape == second.shape == (*shape[:-1], 3)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=-1), vectors)


def test_the_halves_of_a_text_differ(minilm: SentenceEncoder) -> None:
    first, second = halves(minilm.encode(ALL_TEXTS))
    assert (first * second).sum(axis=1).max() < 0.99


def test_dimensions_are_those_of_the_vectors(
    tiny: SentenceEncoder, minilm: SentenceEncoder
) -> None:
    assert (tiny.dimensions, minilm.dimensions) == (2 * TINY_WIDTH, 2 * MINILM_WIDTH)


def test_texts_of_one_meaning_are_nearer_than_others(minilm: SentenceEncoder) -> None:
    """By either half."""
    texts = ["How do I sort a list in Python?", "sorting Python lists", "My knee hurts when I run."]
    for question, same, other in halves(minilm.encode(texts)):
        assert question @ same > question @ other + 0.3


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_any_text_has_a_vector(minilm: SentenceEncoder, text: str) -> None:
    vector = minilm.encode([text])
    assert vector.shape == (1, 2 * MINILM_WIDTH)
    assert np.isfinite(vector).all()


@given(texts=st.lists(any_text, min_size=1, max_size=4))
@settings(max_examples=60)
def test_any_characters_have_halves_of_unit_length(tiny: SentenceEncoder, texts: list[str]) -> None:
    np.testing.assert_allclose(lengths(tiny.encode(texts)), 1.0, atol=1e-5)


def test_a_lone_surrogate_is_read_as_a_question_mark(tiny: SentenceEncoder) -> None:
    assert tiny.token_ids(["what \ud83d is"]) == tiny.token_ids(["what ? is"])


def test_no_texts_have_no_vectors(tiny: SentenceEncoder) -> None:
    vectors = tiny.encode([])
    assert vectors.shape == (0, 2 * TINY_WIDTH)
    assert vectors.dtype == np.float32


def test_texts_of_no_tokens_at_all_are_zero(tiny: SentenceEncoder) -> None:
    """Of a tokenizer without [CLS] and [SEP]: alone as in company."""
    np.testing.assert_array_equal(tiny.encode_ids([[], []]), np.zeros((2, 2 * TINY_WIDTH)))
    np.testing.assert_array_equal(tiny.encode_ids([[2, 3], []])[1], np.zeros(2 * TINY_WIDTH))


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = open_tokenizer(tiny_folder)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened, original = open_tokenizer(tmp_path), open_tokenizer(tiny_folder)
    text = "what is the law of the list"
    assert opened.encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"{}"])
def test_a_missing_or_corrupt_file_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "encoder"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelSourceError) as failure:
        SentenceEncoder(folder)
    assert failure.value.message.startswith(f"{folder}: {name}")


def test_a_cut_off_graph_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "encoder"))
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelSourceError, match=r"model\.onnx"):
        SentenceEncoder(folder)


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError) as failure:
        SentenceEncoder(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in failure.value.message
