"""A base model with its LoRA adapters, on PyTorch and PEFT: one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.experts.quiet import quiet_loading
from polymath.experts.settings import EngineSettings
from polymath.experts.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

__all__ = ["LoraModel"]


class LoraModel:
    """Weights, tokenizer and adapters of one base model.

    Args:
        folder: Hugging Face folder of the base model.
        adapters: name -> PEFT folder, all checked (`read_adapter`).
        max_model_len: tokens of prompt and answer; by default the model's own context.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[str, Path],
        settings: EngineSettings,
        max_model_len: int | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocabulary = Vocabulary(self.tokenizer)
        self._device = _device(settings.device)
        dtype = _dtype(settings.dtype, self._device)
        with quiet_loading():
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        base.to(self._device).eval()
        self.context_length = max_model_len or int(base.config.max_position_embeddings)
        self.eos_ids = _eos_ids(base, self.tokenizer.eos_token_id)
        # PEFT keeps adapters as attributes, so that a name with a dot would be refused
        self._slots = {name: f"slot{index}" for index, name in enumerate(adapters)}
        self._model = _with_adapters(base, {self._slots[n]: p for n, p in adapters.items()})
        self._active: str | None = next(iter(adapters), None)  # PEFT activates the first one
        self._inference = torch.inference_mode

    def forward(
        self, adapter: str | None, tokens: Sequence[int], cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Feed the next tokens of a row.

        Args:
            tokens: the prompt at the first call, then the token sampled last.
            cache: what the last call returned; None at the first.
        Returns:
            Logits of the next token, [vocab], float32 on the CPU, and the grown cache.
        """
        import torch

        with self._inference():
            self._activate(adapter)
            ids = torch.tensor([tokens], device=self._device)
            result = self._model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return result.logits[0, -1].float().cpu(), result.past_key_values

    def _activate(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        model: Any = self._model
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(self._slots[adapter])
        self._active = adapter


def _with_adapters(
    base: PreTrainedModel, adapters: Mapping[str, Path]
) -> PreTrainedModel | PeftModel:
    from peft import PeftModel

    model: PeftModel | None = None
    with quiet_loading():
        for slot, folder in adapters.items():
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=slot)
            else:
                model.load_adapter(str(folder), adapter_name=slot)
    return base if model is None else model.eval()


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


def _eos_ids(model: PreTrainedModel, tokenizer_eos: int | None) -> frozenset[int]:
    configured: int | list[int] | None = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(index for index in [*ids, tokenizer_eos] if index is not None)
