"""transformers with PEFT, as somebody without an engine would run the experts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PeftPeer"]


class PeftPeer:
    """The base model with all adapters; `generate` with one, or with one for each row."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path], dtype: str) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        (first, path), *others = adapters.items()
        self._model: Any = PeftModel.from_pretrained(base, str(path), adapter_name=first)
        for name, other in others:
            self._model.load_adapter(str(other), adapter_name=name)
        self._model.eval()

    def one(self, adapter: str, prompt: Sequence[int], tokens: int) -> float:
        """Seconds for one answer of so many tokens."""
        self._model.set_adapter(adapter)
        return self._generate([prompt], tokens)

    def mixed(
        self, adapters: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
    ) -> float:
        """Seconds for a batch in which every row has an adapter of its own."""
        return self._generate(prompts, tokens, adapter_names=list(adapters))

    def _generate(self, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> float:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[2] * (longest - len(one)) + list(one) for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=2,
                **more,
            )
        return time.perf_counter() - start
