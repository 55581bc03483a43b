"""A PEFT LoRA adapter as a GGUF file, so that llama.cpp can run the same expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["write_gguf_adapter"]

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PREFIX = "base_model.model.model.layers."


def write_gguf_adapter(folder: Path, heads: int, kv_heads: int, target: Path) -> Path:
    """Convert an adapter on a Llama model.

    Args:
        folder: PEFT folder.
        heads: attention heads; `kv_heads` those of keys and values.
    """
    import numpy as np
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(target, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        layer, _, rest = name.removeprefix(PREFIX).partition(".")
        module, _, factor = rest.removesuffix(".weight").rpartition(".lora_")
        weight = values.astype(np.float32)
        if factor == "B" and MODULES[module] in ("attn_q", "attn_k"):
            weight = _interleaved(weight, heads if MODULES[module] == "attn_q" else kv_heads)
        writer.add_tensor(
            f"blk.{layer}.{MODULES[module]}.weight.lora_{factor.lower()}",
            np.ascontiguousarray(weight),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in llama.cpp's order: it rotates neighbours, transformers the two halves of a head."""
    outputs, rank = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, rank)
    return halves.swapaxes(1, 2).reshape(outputs, rank)
