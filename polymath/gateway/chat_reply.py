"""What is read from chat answers and their chunks, where an upstream may have put anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polymath.proxy import text_of

__all__ = ["COUNTS", "choices_of", "said_text", "scored_tokens", "usage_of"]

COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


def choices_of(reply: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The choices that something is said of, each with its index."""
    choices = reply.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, Mapping):
            index = choice.get("index")
            yield (index if isinstance(index, int) else 0), choice


def said_text(choice: Mapping[str, Any], part: str) -> str:
    """The text of a choice; what a model says to refuse is text, too.

    Args:
        part: `message`, or `delta` in a chunk.
    """
    said = choice.get(part)
    if not isinstance(said, Mapping):
        return ""
    return text_of(said.get("content")) or text_of(said.get("refusal"))


def scored_tokens(choice: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """The tokens of a choice with their log-probabilities; None if there are none."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list):
        return None
    return [token for token in content if isinstance(token, Mapping)]


def usage_of(reply: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The tokens that an answer took, if it says so."""
    usage = reply.get("usage")
    if isinstance(usage, Mapping) and all(isinstance(usage.get(name), int) for name in COUNTS):
        return usage
    return None
