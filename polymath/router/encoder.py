"""A sentence encoder on ONNX Runtime: texts to vectors (Sentence-BERT, Reimers 2019).

A vector has two halves of unit length: the last layer, which a head was trained on, and an inner
layer, which tells prompts apart more widely and measures likeness (`halves`).

An encoder folder holds `model.onnx` and `tokenizer.json`. Neither torch nor transformers is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.artifacts import open_graph
from polymath.errors import ModelSourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

__all__ = [
    "MAX_TOKENS",
    "MODEL_FILE",
    "TOKENIZER_FILE",
    "SentenceEncoder",
    "halves",
    "head_and_tail",
    "open_tokenizer",
    "token_ids",
]

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"

MAX_TOKENS = 256
"""Longest input of all-MiniLM-L6-v2 (its sentence_bert_config.json)."""

TAIL_SHARE = 4
"""A quarter of a text that is too long is taken from its end, where the question often stands."""

CHARACTERS_PER_TOKEN = 16
"""No more of a text is tokenised: word pieces are never that long in practice."""


class SentenceEncoder:
    """Texts to vectors.

    Args:
        folder: holds `model.onnx` and `tokenizer.json`.
        threads: of ONNX Runtime.
        max_tokens: of longer texts the start and the end are read.
    Attributes:
        dimensions: length of the vectors, both halves.
    Raises:
        ModelSourceError: a file is missing or corrupt.
    """

    def __init__(self, folder: Path, threads: int = 1, max_tokens: int = MAX_TOKENS) -> None:
        self._session = open_graph(
            folder / MODEL_FILE, threads, "make the router again", frugal=True
        )
        self._tokenizer = open_tokenizer(folder)
        self._max_tokens = max_tokens
        self.dimensions = sum(int(output.shape[-1]) for output in self._session.get_outputs())

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, [texts, dimensions]."""
        return self.encode_ids(self.token_ids(texts))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens`."""
        return token_ids(self._tokenizer, texts, self._max_tokens)

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors of tokenised texts, [texts, dimensions]; those of one length run together.

        (On CPU a batch is hardly faster than its rows one by one, so padding would only cost.)
        """
        import numpy as np

        alike: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(len(row), []).append(index)
        vectors = np.zeros((len(rows), self.dimensions), dtype=np.float32)
        for length, members in alike.items():
            if length:
                ids = np.array([rows[index] for index in members], dtype=np.int64)
                found = self._session.run(None, {"input_ids": ids})
                vectors[members] = np.concatenate(found, axis=1)
        return vectors


def halves(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a head reads, and what likeness is measured in; each [..., dimensions / 2]."""
    middle = vectors.shape[-1] // 2
    return vectors[..., :middle], vectors[..., middle:]


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without truncation or padding.

    Raises:
        ModelSourceError: it is missing or corrupt.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelSourceError(
            f"{folder}: {TOKENIZER_FILE} is missing or corrupt ({error}); fetch the encoder again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    """Token ids of each text, at most `most`: of longer texts the start and the end."""
    encodings = tokenizer.encode_batch_fast([_readable(text, most) for text in texts])
    return [head_and_tail(encoding.ids, most) for encoding in encodings]


def head_and_tail(ids: list[int], most: int) -> list[int]:
    """At most `most` ids: the first three quarters and the last quarter of them."""
    if len(ids) <= most:
        return ids
    tail = most // TAIL_SHARE
    return ids[: most - tail] + ids[len(ids) - tail :]


def _readable(text: str, max_tokens: int) -> str:
    """The text as the tokenizer can take it: bounded, without lone surrogates."""
    most = CHARACTERS_PER_TOKEN * max_tokens
    if len(text) > most:
        tail = most // TAIL_SHARE
        text = text[: most - tail] + text[len(text) - tail :]
    return text.encode("utf-8", "replace").decode("utf-8")
