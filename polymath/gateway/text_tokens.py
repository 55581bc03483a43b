"""Scored tokens in the older format of the completions API: four lists side by side."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["TextTokens"]


class TextTokens:
    """The tokens of one choice, which may come in pieces.

    A token that is no text of its own is written as OpenAI did, `bytes:\\xf0\\x9f`.

    Args:
        top: how many of the likeliest tokens are listed beside the chosen one; with 0 none are.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def add(self, scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The next tokens, from the chat API's `logprobs.content`; offsets are those in the text
        that was generated."""
        return {
            "tokens": [_name(token) for token in scored],
            "token_logprobs": [token.get("logprob") for token in scored],
            "top_logprobs": [self._likeliest(token) for token in scored] if self._top else None,
            "text_offset": [self._offset(token) for token in scored],
        }

    def _likeliest(self, token: Mapping[str, Any]) -> dict[str, Any]:
        given = token.get("top_logprobs")
        listed = given[: self._top] if isinstance(given, list) else []
        top = [*(other for other in listed if isinstance(other, Mapping)), token]
        return {_name(other): other.get("logprob") for other in top}

    def _offset(self, token: Mapping[str, Any]) -> int:
        before = self._characters
        self._characters += len(self._decoder.decode(_bytes(token)))
        return before


def _bytes(token: Mapping[str, Any]) -> bytes:
    try:
        return bytes(token["bytes"])
    except (KeyError, TypeError, ValueError):  # not every upstream gives them
        return str(token.get("token", "")).encode()


def _name(token: Mapping[str, Any]) -> str:
    piece = _bytes(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
