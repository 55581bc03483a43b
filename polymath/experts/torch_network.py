"""Any Hugging Face decoder on PyTorch, with rows of different adapters in one batch.

The plain path: exact, for GPUs and for architectures that the int8 graph does not know. Forward
hooks on the linear layers add the low-rank updates; a cache of slots stands in for transformers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.experts.kv_slots import CacheShape, KvSlots
from polymath.experts.lora_weights import JoinedLora, Site, join
from polymath.experts.network import Batch
from polymath.experts.quiet import quiet_loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import Cache

__all__ = ["TorchNetwork"]

GROUP = "all"


class TorchNetwork:
    """A causal language model of transformers.

    Args:
        folder: Hugging Face folder.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from torch import nn
        from transformers import AutoModelForCausalLM

        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model: Any = model.to(device).eval()
        self.dtype = dtype
        self.cache_shape = _cache_shape(self._model.config, dtype, device)
        linear = {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.sites = tuple(
            Site(name, GROUP, (name,), module.in_features, (module.out_features,))
            for name, module in linear.items()
        )
        self._joined: JoinedLora | None = None
        self._mask: Tensor | None = None
        for name, module in linear.items():
            module.register_forward_hook(self._update_of(name))

    def forward(self, batch: Batch, slots: KvSlots) -> Tensor:
        import torch

        self._use(batch.adapters)
        device = self.cache_shape.device
        ids = torch.tensor(batch.tokens, device=device)
        past = torch.tensor(batch.past, device=device)
        positions = past[:, None] + torch.arange(ids.shape[1], device=device)
        longest = max(batch.past) + ids.shape[1]
        seen = torch.arange(longest, device=device) <= positions[:, :, None]
        cache = _slot_cache(slots, batch.first_slot, positions, longest)
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=seen[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=0 if batch.every else 1,
            ).logits
            return logits.float().cpu()  # type: ignore[no-any-return]

    def _use(self, adapters: Any) -> None:
        members = list(dict.fromkeys(one for one in adapters if one is not None))
        if not members:
            self._joined = None
            return
        if self._joined is None or list(self._joined.members) != members:
            self._joined = join(members, self.sites)
        mask = self._joined.mask(GROUP, adapters)
        self._mask = mask.to(self.cache_shape.device, self.dtype)[:, None]

    def _update_of(self, name: str) -> Any:
        def add_update(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            joined, mask = self._joined, self._mask
            if joined is None or mask is None or name not in joined.down:
                return None
            low = inputs[0] @ joined.down[name].T
            return output + (low * mask) @ joined.up[name]

        return add_update


def _cache_shape(config: Any, dtype: torch.dtype, device: torch.device) -> CacheShape:
    text = config.get_text_config()
    heads = text.num_attention_heads
    return CacheShape(
        layers=text.num_hidden_layers,
        heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype,
        device=device,
    )


def _slot_cache(slots: KvSlots, first: int, positions: Tensor, longest: int) -> Cache:
    """The slots of a batch as transformers' cache: new tokens are written at `positions`.

    Args:
        positions: [rows, count].
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    rows = slice(first, first + len(positions))

    class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys[rows], values[rows]
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            for row, where in enumerate(positions.tolist()):
                self.keys[row, :, where[0] : where[-1] + 1] = key_states[row]
                self.values[row, :, where[0] : where[-1] + 1] = value_states[row]
            return self.keys[:, :, :longest], self.values[:, :, :longest]

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return longest, 0

        def get_seq_length(self) -> int:
            return longest - positions.shape[1]

        def get_max_length(self) -> int:
            return slots.capacity

    pairs = zip(slots.keys, slots.values, strict=True)
    return Cache(layers=[SlotLayer(keys, values) for keys, values in pairs])
