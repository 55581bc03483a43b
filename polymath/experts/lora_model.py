"""A base model with its LoRA adapters: rows of any adapters go through it together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.experts.adapter_bank import AdapterBank
from polymath.experts.grammar import GrammarCompiler
from polymath.experts.graph_files import prepare_graph, read_config
from polymath.experts.group import Row
from polymath.experts.kv_slots import KvSlots
from polymath.experts.lora_weights import read_weights
from polymath.experts.model_files import weight_shapes
from polymath.experts.network import Batch, Network
from polymath.experts.onnx_network import OnnxNetwork
from polymath.experts.sequence import Sequence
from polymath.experts.settings import EngineSettings
from polymath.experts.torch_network import TorchNetwork
from polymath.experts.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Feed", "LoraModel", "runs_on_onnx"]


@dataclass(frozen=True, slots=True)
class Feed:
    """The next `count` tokens of a row, which had `before` tokens pending."""

    sequence: Sequence
    count: int
    before: int


class LoraModel:
    """Weights, tokenizer, adapters and cache of one base model.

    Args:
        folder: Hugging Face folder of the base model.
        adapters: name -> PEFT folder.
        max_model_len: tokens of prompt and answer; by default the model's own context.
    Raises:
        AdapterError: an adapter cannot be used.
        ModelSourceError: the model cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[str, Path],
        settings: EngineSettings,
        max_model_len: int | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocabulary = Vocabulary(self.tokenizer)
        config = read_config(folder).get_text_config()
        self.context_length = max_model_len or int(config.max_position_embeddings)
        self.eos_ids = _eos_ids(folder, self.tokenizer.eos_token_id)
        self.grammars = GrammarCompiler(self.tokenizer, self.eos_ids)
        self.network = _network(folder, settings)
        self.slots = KvSlots(self.network.cache_shape, self.context_length)
        read = partial(
            read_weights,
            sites=self.network.sites,
            dtype=self.network.dtype,
            device=self.network.cache_shape.device,
        )
        modules = {module for site in self.network.sites for module in site.modules}
        self.adapters = AdapterBank(
            weight_shapes(folder), read, settings.max_loaded_adapters, modules
        )
        for name, path in adapters.items():
            self.adapters.add(name, path)

    def forward(self, feeds: list[Feed]) -> None:
        """Feed rows, each of which owns a slot: those of one token together, the others alone."""
        singles = [feed.sequence for feed in feeds if feed.count == 1 and not feed.sequence.lags]
        if singles:
            self.slots.arrange(singles)
            rows = [row for row in self.slots.rows(len(singles)) if isinstance(row, Sequence)]
            self._forward(rows, 1, 0)
        for feed in feeds:
            if feed.count > 1 or feed.sequence.lags:
                self._forward([feed.sequence], feed.count, self.slots.slot(feed.sequence))

    def all_logits(self, adapter: str | None, tokens: Iterable[int]) -> Tensor:
        """Logits after every token of a text, [tokens, vocab], for measurements."""
        known = None if adapter is None else self.adapters.find(adapter)
        row = Sequence(Row("", adapter, tuple(tokens)), known, 0)
        row.weights = None if known is None else self.adapters.weights(known)
        self.slots.join(row, row.longest)
        try:
            batch = Batch([row.tokens], [0], self.slots.slot(row), [row.weights], every=True)
            return self.network.forward(batch, self.slots)[0]
        finally:
            self.slots.leave(row)

    def _forward(self, rows: list[Sequence], count: int, first_slot: int) -> None:
        batch = Batch(
            tokens=[row.tokens[row.cached : row.cached + count] for row in rows],
            past=[row.cached for row in rows],
            first_slot=first_slot,
            adapters=[row.weights for row in rows],
            every=rows[0].lags,
        )
        logits: Tensor = self.network.forward(batch, self.slots)
        for row, of_row in zip(rows, logits, strict=True):
            row.take(count, of_row)


def runs_on_onnx(settings: EngineSettings) -> bool:
    """Whether the int8 graph is wanted, for the architectures that it knows."""
    if settings.backend == "auto":
        return _device(settings.device).type == "cpu" and settings.dtype == "auto"
    return settings.backend == "onnx"


def _network(folder: Path, settings: EngineSettings) -> Network:
    if runs_on_onnx(settings) and (graph := prepare_graph(folder)) is not None:
        return OnnxNetwork(folder, graph, settings.threads)
    device = _device(settings.device)
    return TorchNetwork(folder, device, _dtype(settings.dtype, device))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a folder without generation_config.json
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(index for index in [*ids, tokenizer_eos] if index is not None)
