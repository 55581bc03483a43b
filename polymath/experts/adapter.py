"""A LoRA adapter on disk, checked before it is loaded.

The folder is PEFT's: `adapter_config.json` and `adapter_model.safetensors`. Pickled weights are
refused, since reading one runs code. Every matrix is held against the base model's own shape, so
that an adapter made for another model is named as such and not found out in the middle of a matmul.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath.errors import AdapterError

__all__ = ["AdapterFile", "read_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
TENSOR_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")

UNSUPPORTED_OPTIONS = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "megatron_config": None,
    "layer_replication": None,
}
"""PEFT options that change the arithmetic beyond `W x + scale B A x`, with their neutral value."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What an adapter folder holds: `rank` and scale by module name, all of them checked."""

    folder: Path
    ranks: Mapping[str, int]
    scales: Mapping[str, float]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


def read_adapter(folder: Path, base_shapes: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    """Check an adapter against its base model; no weights are loaded.

    Args:
        folder: PEFT adapter folder.
        base_shapes: name and shape of every tensor of the base model (`weight_shapes`).
    Raises:
        AdapterError: a file is missing, pickled or corrupt; an option is not supported; a module is
            not in the base model or has another shape.
    """
    config = _read_config(folder)
    factors = _factor_shapes(folder)
    ranks = {
        module: _checked_rank(folder, module, shapes, base_shapes)
        for module, shapes in factors.items()
    }
    return AdapterFile(folder, ranks, {m: _scale(config, m, rank) for m, rank in ranks.items()})


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing; a PEFT adapter folder has one") from None
    except ValueError as error:
        raise AdapterError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type must be LORA")
    for option, neutral in UNSUPPORTED_OPTIONS.items():
        if config.get(option, neutral) not in (neutral, None, []):
            raise AdapterError(f"{file}: {option}={config[option]!r} is not supported")
    return config


def _factor_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each module the shapes of its factors A and B."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = [name for name in PICKLE_FILES if (folder / name).exists()]
        hint = (
            f"; {pickles[0]} is pickled and is not read, because reading it can run code: "
            "save it again with safe_serialization=True"
            if pickles
            else ""
        )
        raise AdapterError(f"{file}: missing{hint}")
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                match = TENSOR_NAME.match(name)
                if match is None:
                    raise AdapterError(f"{file}: tensor {name} is not a LoRA factor")
                shape = tuple(tensors.get_slice(name).get_shape())
                factors.setdefault(match["module"], {})[match["factor"]] = shape
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: corrupt or not safetensors ({error})") from error
    if not factors:
        raise AdapterError(f"{file}: holds no LoRA factors")
    return factors


def _checked_rank(
    folder: Path,
    module: str,
    factors: Mapping[str, tuple[int, ...]],
    base_shapes: Mapping[str, tuple[int, ...]],
) -> int:
    base = base_shapes.get(f"{module}.weight")
    if base is None:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: module {module} is not in the base model; "
            "the adapter was made for another architecture"
        )
    if factors.keys() != {"A", "B"}:
        raise AdapterError(f"{folder / WEIGHTS_FILE}: module {module} lacks lora_A or lora_B")
    a, b = factors["A"], factors["B"]
    out_features, in_features = base
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[1] != in_features or b[0] != out_features:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: module {module} has lora_A {list(a)} and lora_B {list(b)}, "
            f"but the base model needs [r, {in_features}] and [{out_features}, r]; "
            "the adapter was made for another base model"
        )
    return a[0]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
