"""The chunks of a streamed answer as the whole answer that they make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Folding"]

TEXTS = ("content", "refusal", "reasoning_content")
CHOICE = frozenset({"index", "delta", "logprobs", "finish_reason"})
COMMON = ("id", "created", "model", "system_fingerprint", "polymath")


class Folding:
    """Takes in `chat.completion.chunk` objects one by one.

    Attributes:
        pieces: chunks that had a piece of an answer.
        known: what is common to all chunks, and the usage as far as it was told.
    """

    def __init__(self) -> None:
        self.pieces = 0
        self.known: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._faithful = True

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in the next chunk."""
        for name in COMMON:
            if name in chunk:
                self.known.setdefault(name, chunk[name])
        if isinstance(chunk.get("usage"), dict):
            self.known["usage"] = chunk["usage"]
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self.pieces += any(value for name, value in delta.items() if name != "role")
            self._add_choice(choice)

    def whole(self) -> dict[str, Any] | None:
        """The `chat.completion` object; None if there was something that cannot be put together."""
        if not self._faithful or not self._choices:
            return None
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self.known, "object": "chat.completion", "choices": choices}

    def _add_choice(self, piece: Mapping[str, Any]) -> None:
        index = piece.get("index", 0)
        choice = self._choices.setdefault(
            index,
            {
                "index": index,
                "message": {"role": "assistant", "content": None, "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            },
        )
        if any(value for name, value in piece.items() if name not in CHOICE):
            self._faithful = False
        choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
        for name, value in (piece.get("delta") or {}).items():
            self._add_delta(choice["message"], name, value)
        if (scored := piece.get("logprobs")) is not None:
            content = (choice["logprobs"] or {"content": []})["content"]
            choice["logprobs"] = {
                "content": [*content, *(scored.get("content") or ())],
                "refusal": None,
            }

    def _add_delta(self, message: dict[str, Any], name: str, value: Any) -> None:
        if value is None or name == "role":
            return
        if name in TEXTS and isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        else:
            self._faithful = False
