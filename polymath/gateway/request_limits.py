"""What a request may be: sizes beyond these are refused before anybody works on them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.errors import InvalidRequest, RequestTooLarge
from polymath.proxy import Body, text_of

__all__ = ["RequestLimits", "check_depth", "check_request", "estimated_tokens"]

CHARACTERS_PER_TOKEN = 4
"""Of English, by OpenAI's rule of thumb."""
BRACKETS = (b"[", b"{")


class RequestLimits(BaseModel):
    """The largest request that is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_messages: int = Field(default=1000, ge=1, description="Turns of a conversation.")
    max_characters: int = Field(
        default=1_000_000, ge=1, description="Characters of all turns together."
    )
    max_tokens: int = Field(
        default=131_072, ge=1, description="The longest answer that may be asked for."
    )
    max_choices: int = Field(default=128, ge=1, description="The largest `n`.")
    max_top_logprobs: int = Field(default=20, ge=0, description="The largest `top_logprobs`.")
    max_depth: int = Field(default=64, ge=4, description="Nesting of the JSON body.")
    max_header_bytes: int = Field(
        default=32_768, ge=1024, description="All headers together; more are refused with 431."
    )
    receive_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that a client may take to send its headers, and again its body.",
    )
    timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds for an answer; a request may ask for less with `timeout`.",
    )
    max_in_flight: int = Field(
        default=1000,
        ge=1,
        description="Requests that one process answers at a time; more are refused with 429.",
    )


def check_depth(body: bytes, value: Any, most: int) -> None:
    """Refuse a body that is nested deeper than `most`.

    Raises:
        json.JSONDecodeError: it is; the framework makes an error of the client of it.
    """
    if sum(body.count(bracket) for bracket in BRACKETS) <= most:
        return
    level = [value]
    for _ in range(most):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _in(outer)]
        if not level:
            return
    if any(isinstance(value, dict | list) for value in level):
        raise json.JSONDecodeError(f"nested deeper than {most} levels", "", 0)


def check_request(body: Body, limits: RequestLimits) -> None:
    """Refuse a chat request that is too large.

    Raises:
        RequestTooLarge, InvalidRequest: the message names the field and the limit.
    """
    messages = body["messages"]
    if len(messages) > limits.max_messages:
        raise InvalidRequest(
            f"Invalid 'messages': array too long. Expected an array with maximum length "
            f"{limits.max_messages}, but got an array with length {len(messages)} instead.",
            param="messages",
        )
    characters = prompt_characters(body)
    if characters > limits.max_characters:
        raise RequestTooLarge(
            f"messages: {characters} characters are more than the {limits.max_characters} that "
            "are served here.",
            param="messages",
        )
    for name, most in (
        ("max_tokens", limits.max_tokens),
        ("max_completion_tokens", limits.max_tokens),
        ("n", limits.max_choices),
        ("top_logprobs", limits.max_top_logprobs),
    ):
        value = body.get(name)
        if isinstance(value, int) and value > most:
            raise InvalidRequest(f"{name}: {value} is more than {most}.", param=name)


def estimated_tokens(body: Body, default: int) -> int:
    """What a request may use, before anything is known of tokenizers.

    Args:
        default: tokens of an answer, where the request gives no limit.
    """
    wanted = [body.get("max_completion_tokens"), body.get("max_tokens"), default]
    limit = next(value for value in wanted if isinstance(value, int))
    choices = body.get("n")
    prompt = -(-prompt_characters(body) // CHARACTERS_PER_TOKEN)
    return prompt + max(limit, 0) * (choices if isinstance(choices, int) and choices > 0 else 1)


def prompt_characters(body: Body) -> int:
    """Characters of all texts of a conversation."""
    return sum(len(text_of(message.get("content"))) for message in body["messages"])


def _in(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
