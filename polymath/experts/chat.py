"""Conversations as tokens, through the base model's own chat template.

An expert may put a system prompt and constant example turns (URIAL, Lin et al. 2023) in front of
every conversation. Text that a user writes never becomes a control token: where it spells one
(`<|im_end|>`), it is encoded as the characters that it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polymath.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Message", "frame_conversation", "render_chat"]

Message = Mapping[str, str]
"""One turn in Hugging Face's chat format: `role` and `content`."""

# Private-use characters mark where a text stands in the rendered template.
_MARK = "\ue0f0{}\ue0f1"
_ENCODING = threading.Lock()
_MARKED = re.compile("\ue0f0([0-9]+)\ue0f1")


def frame_conversation(
    messages: Sequence[Message],
    system_prompt: str | None = None,
    few_shot: Sequence[Message] = (),
) -> list[Message]:
    """The conversation as one expert sees it: system prompt, constant examples, then the turns.

    The expert's system prompt stands before the client's own, in one system message.
    """
    given = [message["content"] for message in messages if message["role"] == "system"]
    system = "\n\n".join(([system_prompt] if system_prompt else []) + given)
    turns = [message for message in messages if message["role"] != "system"]
    said = [*few_shot, *turns]
    return [{"role": "system", "content": system}, *said] if system or not said else said


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template.

    Raises:
        InvalidRequest: the template refuses the conversation (roles in a wrong order, say).
    """
    if _spells_control_token(tokenizer, messages):
        return _render_with_plain_texts(tokenizer, messages, add_generation_prompt)
    return _encode(tokenizer, _apply_template(tokenizer, messages, add_generation_prompt))


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise InvalidRequest(
            f"The model's chat template refuses this conversation: {error}", param="messages"
        ) from error
    return str(text)


def _spells_control_token(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return any(token in message["content"] for message in messages for token in control)


def _render_with_plain_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    marks = [_MARK.format(index) for index in range(len(messages))]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    rendered = _apply_template(tokenizer, marked, add_generation_prompt)
    ids: list[int] = []
    # re.split gives frames at even places and, between them, the index of the text that goes there
    for place, part in enumerate(_MARKED.split(rendered)):
        text = messages[int(part)]["content"] if place % 2 else part
        ids += _encode(tokenizer, text, plain=place % 2 == 1)
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False) -> list[int]:
    """Token ids; of a plain text none is a control token. Lone surrogates become question marks.

    transformers keeps `split_special_tokens` in the tokenizer itself, so that threads must not mix.
    """
    readable = text.encode("utf-8", "replace").decode("utf-8")
    with _ENCODING:
        ids = tokenizer.encode(readable, add_special_tokens=False, split_special_tokens=plain)
    return list(ids)
