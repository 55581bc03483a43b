"""Perplexity of every expert on every domain: does each know its own domain best?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.errors import DataError
from polymath.experts import quiet_loading, read_adapter, weight_shapes
from polymath.training.data import ChatRow
from polymath.training.examples import Example, encode_chats, padding_id
from polymath.training.perplexity import Perplexity, measure_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["expert_matrix"]

MAX_LENGTH = 1024

Matrix = dict[str, dict[str, Perplexity]]


def expert_matrix(
    base_name: str,
    base_folder: Path,
    adapters: Mapping[str, Path],
    domains: Mapping[str, Sequence[ChatRow]],
    advance: Callable[[int], Any] = lambda rows: None,
) -> Matrix:
    """Perplexities by expert, then by domain; the first row is the bare base model.

    Args:
        adapters: expert name -> PEFT folder.
        domains: domain -> held-out conversations.
        advance: called with the number of conversations of each finished batch.
    Raises:
        AdapterError: an adapter is missing, corrupt or made for another base model.
        DataError: a domain has no answer to measure, or an adapter is named like the base.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_adapters(base_name, base_folder, adapters)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    encoded = {domain: _encode(tokenizer, domain, rows) for domain, rows in domains.items()}
    pad = padding_id(tokenizer)
    with quiet_loading():
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    matrix: Matrix = {}
    for name, adapter in {base_name: None, **adapters}.items():
        with _adapted(base, adapter) as model:
            matrix[name] = {
                domain: measure_perplexity(model, examples, pad, advance=advance)
                for domain, examples in encoded.items()
            }
    return matrix


def _check_adapters(base_name: str, base_folder: Path, adapters: Mapping[str, Path]) -> None:
    if base_name in adapters:
        raise DataError(
            f"{base_name}: an adapter has the name of the base model; give it another name"
        )
    shapes = weight_shapes(base_folder)
    for folder in adapters.values():
        read_adapter(folder, shapes)


def _encode(
    tokenizer: PreTrainedTokenizerBase, domain: str, rows: Sequence[ChatRow]
) -> list[Example]:
    examples = encode_chats(tokenizer, rows, MAX_LENGTH)
    if not examples:
        raise DataError(f"{domain}: no conversation has an answer within {MAX_LENGTH} tokens")
    return examples


@contextmanager
def _adapted(base: PreTrainedModel, adapter: Path | None) -> Iterator[Any]:
    """The base model under one adapter, and itself again afterwards."""
    from peft import PeftModel

    if adapter is None:
        yield base
        return
    with quiet_loading():
        model = PeftModel.from_pretrained(base, str(adapter))
    try:
        yield model
    finally:
        model.unload()
