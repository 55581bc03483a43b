"""Token ids as the bytes that they stand for.

A token is a piece of bytes, not of text: one character may be spread over several tokens. Two
families of tokenizers are known: byte-level BPE (GPT-2, Radford et al. 2019), which writes every
byte as a printable character, and SentencePiece, which writes a space as U+2581 and rare bytes as
`<0xAB>`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Vocabulary", "read_vocabulary"]

SENTENCEPIECE_SPACE = "\u2581"
SENTENCEPIECE_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Vocabulary:
    """The tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, bytes] = {
            index: b"" if token.special else token.content.encode()
            for index, token in tokenizer.added_tokens_decoder.items()
        }
        vocabulary = tokenizer.get_vocab()
        self._byte_level = _is_byte_level(tokenizer)
        self._pieces: dict[int, str] = {index: token for token, index in vocabulary.items()}

    def __len__(self) -> int:
        return len(self._pieces)

    def __eq__(self, other: object) -> bool:
        """Whether every id stands for the same token."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._pieces == other._pieces and self._added == other._added

    __hash__ = object.__hash__

    @property
    def starts_with_space(self) -> bool:
        """Whether an answer's first token carries a space that does not belong to its text."""
        return not self._byte_level

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token; empty for control tokens and for ids that have no token."""
        if token_id in self._added:
            return self._added[token_id]
        piece = self._pieces.get(token_id, "")
        if self._byte_level:
            return _byte_level_bytes(piece)
        if match := SENTENCEPIECE_BYTE.match(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(SENTENCEPIECE_SPACE, " ").encode()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer in a Hugging Face folder."""
    from transformers import AutoTokenizer

    return Vocabulary(AutoTokenizer.from_pretrained(folder))


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's decoder turns GPT-2's characters back into bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    return b"".join(alphabet.get(character, character.encode()) for character in piece)


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
