"""Example conversations as token ids with the answers marked, and the loss on those answers.

Training and perplexity use the same encoding, so that what is measured is what was trained: the
conversation under the base model's chat template, counting only what the assistant says, its end
token included.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymath.experts import Prompt, render_chat
from polymath.training.data import ChatRow

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "answer_losses",
    "collate",
    "encode_chat",
    "encode_chats",
    "length_batches",
    "padding_id",
]

IGNORED = -100
"""The label that cross entropy skips (PyTorch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: token ids and, of the same length, labels (-100 where not an answer)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, row: ChatRow, max_length: int
) -> Example | None:
    """The row as an example of at most `max_length` tokens; None if no answer token is left."""
    messages = row.conversation()
    ids = render_chat(tokenizer, messages, add_generation_prompt=False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(render_chat(tokenizer, messages[:index]))
            whole = render_chat(tokenizer, messages[: index + 1], add_generation_prompt=False)
            end = _end_of_answer(whole, start, tokenizer.eos_token_id)
            labels[start:end] = ids[start:end]
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        return None
    return Example(tuple(ids), tuple(labels))


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[ChatRow], max_length: int
) -> list[Example]:
    """The rows as examples, without those that have no answer within `max_length` tokens."""
    encoded = (encode_chat(tokenizer, row, max_length) for row in rows)
    return [example for example in encoded if example is not None]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that `collate` fills rows with: the padding token, else the end token."""
    token = tokenizer.pad_token_id
    return int(token if token is not None else tokenizer.eos_token_id)


def length_batches(
    examples: Sequence[Example | Prompt], batch_tokens: int, seed: int | None = None
) -> Iterator[list[int]]:
    """Indices of examples in batches of like length, at most `batch_tokens` padded tokens each.

    With a seed the order is shuffled (the same seed, the same batches); without, it is by length.
    """
    order = list(range(len(examples)))
    shuffle = random.Random(seed).shuffle if seed is not None else lambda items: None
    shuffle(order)
    order.sort(key=lambda index: len(examples[index].ids))
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(examples[index].ids) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    shuffle(batches)
    yield from (batch for batch in batches if batch)


def collate(examples: Iterable[Example], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [batch, longest], padded on the right."""
    import torch

    rows = list(examples)
    longest = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in values])

    return {
        "input_ids": padded([row.ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def answer_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood of every answer token of the batch, [answer tokens], in nats."""
    import torch

    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    return torch.nn.functional.cross_entropy(
        logits[counted].float(), targets[counted], reduction="none"
    )


def _end_of_answer(ids: Sequence[int], start: int, eos_id: int | None) -> int:
    """Behind the end token of the answer, or the end of the turn if the template has none."""
    if eos_id is not None and eos_id in ids[start:]:
        return len(ids) - list(reversed(ids)).index(eos_id)
    return len(ids)
