"""Requests through the official client, and what comes back."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionTokenLogprob,
)

__all__ = [
    "DEFAULTS",
    "HELLO",
    "ask",
    "polymath_fields",
    "refusal",
    "scored_tokens",
    "stream",
    "streamed_polymath_fields",
    "streamed_text",
    "text",
    "user",
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


HELLO = [user("Tell me about the moon.")]
DEFAULTS: dict[str, Any] = {
    "model": "smollm2",
    "messages": HELLO,
    "max_tokens": 8,
    "temperature": 0,
}


def ask(client: OpenAI, **given: Any) -> ChatCompletion:
    completion = client.chat.completions.create(**{**DEFAULTS, **given})
    assert isinstance(completion, ChatCompletion)
    return completion


def stream(client: OpenAI, **given: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(stream=True, **{**DEFAULTS, **given}))


def text(completion: ChatCompletion, index: int = 0) -> str:
    return completion.choices[index].message.content or ""


def streamed_text(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def scored_tokens(completion: ChatCompletion, index: int = 0) -> list[ChatCompletionTokenLogprob]:
    logprobs = completion.choices[index].logprobs
    assert logprobs is not None
    return logprobs.content or []


def polymath_fields(completion: ChatCompletion, index: int = 0) -> dict[str, Any]:
    """What a choice carries that OpenAI has no word for; empty if it carries nothing."""
    return dict((completion.choices[index].model_extra or {}).get("polymath", {}))


def streamed_polymath_fields(chunks: list[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """The same of all chunks of a choice, their lists joined."""
    joined: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                for name, values in (choice.model_extra or {}).get("polymath", {}).items():
                    joined.setdefault(name, []).extend(values)
    return joined


def refusal(client: OpenAI, **given: Any) -> openai.APIStatusError:
    """The error of a request, whose body has the four fields of OpenAI's."""
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **given)
    body = caught.value.response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return caught.value
