"""A Llama decoder on ONNX Runtime with int8 weights: the fast path of a CPU.

The cache is bound in place (`past` and `present` are the same memory), so that a step copies
nothing. ONNX Runtime's attention takes several rows of one token, or one row of several.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.artifacts import open_graph
from polymath.experts.graph_files import GRAPH_FILE, ModelTensors, read_config
from polymath.experts.kv_slots import CacheShape, KvSlots
from polymath.experts.lora_weights import JoinedLora, LoraWeights, join
from polymath.experts.network import Batch
from polymath.experts.onnx_graph import PACK, graph_sites

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession, IOBinding
    from torch import Tensor

    Floats = NDArray[np.float32]

__all__ = ["OnnxNetwork"]

KEPT_JOINS = 8
"""Sets of adapters whose joined factors are kept for the next batch of the same adapters."""

LEAST_WIDTH = 2
"""Low-rank columns; ONNX Runtime sums a single one in another order than several."""


class OnnxNetwork:
    """The int8 graph of a base model.

    Args:
        folder: Hugging Face folder of the base model, for its input embeddings.
        graph: what `prepare_graph` gave.
        threads: CPU threads; None is all cores.
    Raises:
        ModelSourceError: the graph cannot be loaded.
    """

    def __init__(self, folder: Path, graph: Path, threads: int | None) -> None:
        import torch

        config = read_config(folder)
        self.dtype = torch.float32
        self.sites = graph_sites(config)
        self.cache_shape = CacheShape(
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self._config = config
        self._embeddings = ModelTensors(folder).tensor("model.embed_tokens.weight")
        self._width = self.sites[1].inputs
        self._session = open_graph(graph / GRAPH_FILE, threads, "it is quantised again")
        self._groups = tuple(dict.fromkeys(site.group for site in self.sites))
        self._nothing = LoraWeights("", dict.fromkeys(self._groups, LEAST_WIDTH), {}, {})
        self._joined: OrderedDict[frozenset[LoraWeights], JoinedLora] = OrderedDict()
        self._bindings: dict[tuple[int, int], _Binding] = {}
        self._bound_version = 0

    def forward(self, batch: Batch, slots: KvSlots) -> Tensor:
        import torch

        *before, last = _pieces(batch)
        several_rows = len(batch.tokens) > 1
        logits = [self._run(piece, slots, several_rows or batch.every) for piece in before]
        logits.append(self._run(last, slots, wanted=True))
        return torch.cat(logits, dim=0 if several_rows else 1)

    def _run(self, batch: Batch, slots: KvSlots, wanted: bool) -> Tensor:
        """Logits [rows, positions, vocab]; no positions unless they are wanted."""
        import numpy as np
        import torch

        rows, count = len(batch.tokens), len(batch.tokens[0])
        packs = max(rows * count // PACK, 1)
        tokens = rows * count // packs
        binding = self._binding(batch.first_slot, rows, slots)
        binding.use(self._joined_for(batch.adapters), batch.adapters, tokens)
        past = np.array(batch.past, dtype=np.int32)
        ends = np.arange(rows * count, dtype=np.int64).reshape(rows, count)
        ends = ends[:, (0 if batch.every else count - 1) if wanted else count :]
        inputs: dict[str, NDArray[Any]] = {
            "embeddings": self._embedded(batch.tokens).reshape(packs, tokens, -1),
            "row_shape": np.array([rows, count, sum(self.sites[0].outputs)], dtype=np.int64),
            "pack_shape": np.array([packs, tokens, self._width], dtype=np.int64),
            "last_positions": past + (count - 1),
            "longest": np.array([past.max() + count], dtype=np.int32),
            "wanted": ends.reshape(-1),
        }
        logits = np.empty((ends.size, self._config.vocab_size), dtype=np.float32)
        binding.run(inputs, logits)
        return torch.from_numpy(logits).view(*ends.shape, logits.shape[1])

    def _embedded(self, tokens: Sequence[Sequence[int]]) -> Floats:
        """[tokens, hidden_size]"""
        import torch

        ids = torch.tensor(tokens).flatten()
        embedded: Floats = torch.nn.functional.embedding(ids, self._embeddings).float().numpy()
        return embedded

    def _joined_for(self, adapters: Sequence[LoraWeights | None]) -> JoinedLora:
        """The adapters of a batch side by side; the last few joins are kept."""
        members = frozenset(one for one in adapters if one is not None)
        if members not in self._joined:
            self._joined[members] = self._join(members)
            if len(self._joined) > KEPT_JOINS:
                self._joined.popitem(last=False)
        self._joined.move_to_end(members)
        return self._joined[members]

    def _join(self, members: frozenset[LoraWeights]) -> JoinedLora:
        """With columns of zeros where no member changes a site, or too few do."""
        joined = join(members or (self._nothing,), self.sites)
        widths = {group: max(joined.widths.get(group, 0), LEAST_WIDTH) for group in self._groups}
        down, up = {}, {}
        for site in self.sites:
            width, outputs = widths[site.group], sum(site.outputs)
            down[site.name] = _padded(joined.down.get(site.name), (width, site.inputs))
            up[site.name] = _padded(joined.up.get(site.name), (width, outputs))
        return JoinedLora(joined.members, widths, down, up)

    def _binding(self, first: int, rows: int, slots: KvSlots) -> _Binding:
        if self._bound_version != slots.version:
            self._bindings.clear()
            self._bound_version = slots.version
        key = (first, rows)
        if key not in self._bindings:
            self._bindings[key] = _Binding(self._session, slots, first, rows)
        return self._bindings[key]


def _padded(factor: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """A low-rank factor with rows of zeros up to a shape; zeros for none."""
    import torch

    if factor is not None and factor.shape == shape:
        return factor
    padded = torch.zeros(shape)
    if factor is not None:
        padded[: len(factor)] = factor
    return padded


def _pieces(batch: Batch) -> list[Batch]:
    """The batch in parts of whole packs, or of less than one, and never of a single token of a
    prompt: several rows by rows, a single row by tokens."""
    rows, count = len(batch.tokens), len(batch.tokens[0])
    starts = [0]
    for size in _sizes(max(rows, count), whole_packs=count > 1):
        starts.append(starts[-1] + size)
    if count == 1:
        return [
            replace(
                batch,
                tokens=batch.tokens[start:end],
                past=batch.past[start:end],
                first_slot=batch.first_slot + start,
                adapters=batch.adapters[start:end],
            )
            for start, end in pairwise(starts)
        ]
    return [
        replace(batch, tokens=[batch.tokens[0][start:end]], past=[batch.past[0] + start])
        for start, end in pairwise(starts)
    ]


def _sizes(total: int, whole_packs: bool) -> list[int]:
    """Sizes that add up to `total`: packs, together if they may be, and what is left."""
    packs, left = divmod(total, PACK)
    if whole_packs and left == 1 and packs:  # 17 tokens are 14 and 3, not 16 and 1
        sizes = [(packs - 1) * PACK, PACK - 2, 3]
    else:
        sizes = [packs * PACK, left] if whole_packs else [*[PACK] * packs, left]
    return [size for size in sizes if size]


class _Binding:
    """The graph's inputs and outputs for a range of slots, all of them memory of ours."""

    def __init__(self, session: InferenceSession, slots: KvSlots, first: int, rows: int) -> None:
        self._session = session
        self._binding: IOBinding = session.io_binding()
        self._joined: JoinedLora | None = None
        self._masked: tuple[tuple[LoraWeights | None, ...], int] | None = None
        self._masks: dict[str, Floats] = {}
        for kind, tensors in (("key", slots.keys), ("value", slots.values)):
            for layer, tensor in enumerate(tensors):
                part = tensor[first : first + rows].numpy()
                self._bind_input(f"past.{layer}.{kind}", part)
                self._bind_output(f"present.{layer}.{kind}", part)

    def use(self, joined: JoinedLora, adapters: Sequence[LoraWeights | None], tokens: int) -> None:
        """Bind the low-rank factors, and the masks of a pack of so many tokens."""
        if joined is not self._joined:
            for part, factors in (("A", joined.down), ("B", joined.up)):
                for site, tensor in factors.items():
                    self._bind_input(f"{site}.{part}", tensor.numpy())
            self._joined = joined
        elif self._masked == (tuple(adapters), tokens):
            return
        self._masked = (tuple(adapters), tokens)
        for group in joined.widths:
            mask = joined.mask(group, adapters).T
            of_tokens = mask if len(adapters) > 1 else mask.expand(-1, tokens)
            self._masks[group] = of_tokens.contiguous().numpy()
            self._bind_input(f"mask.{group}", self._masks[group])

    def run(self, inputs: Mapping[str, NDArray[Any]], logits: Floats) -> None:
        for name, values in inputs.items():
            self._bind_input(name, values)
        self._bind_output("logits", logits)
        self._session.run_with_iobinding(self._binding)

    def _bind_input(self, name: str, values: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)

    def _bind_output(self, name: str, values: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
