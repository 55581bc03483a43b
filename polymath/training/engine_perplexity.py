"""Perplexity of answers through the engine's own networks, so that what is served is measured."""

from __future__ import annotations

from collections.abc import Iterable

from polymath.experts import LoraModel
from polymath.training.data import ChatRow
from polymath.training.examples import IGNORED, encode_chat
from polymath.training.perplexity import Perplexity

__all__ = ["answer_perplexity"]

MAX_LENGTH = 1024


def answer_perplexity(model: LoraModel, adapter: str | None, rows: Iterable[ChatRow]) -> Perplexity:
    """Perplexity over the answer tokens of some conversations under one adapter.

    Args:
        adapter: a name that the model knows; None is the bare base model.
    """
    import torch

    total, tokens = 0.0, 0
    for row in rows:
        example = encode_chat(model.tokenizer, row, MAX_LENGTH)
        if example is None:
            continue
        logits = model.all_logits(adapter, example.ids)[:-1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="sum"
        )
        total += losses.item()
        tokens += sum(label != IGNORED for label in example.labels[1:])
    return Perplexity(total / tokens, tokens)
