"""A LoRA adapter on disk, checked before it is loaded.

The folder is PEFT's: `adapter_config.json` and `adapter_model.safetensors`. Pickled weights are
refused, since reading one runs code. Every matrix is held against the base model's own shape, so
that an adapter made for another model is named as such and not found out in the middle of a matmul.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from polymath.artifacts import first_problem
from polymath.errors import AdapterError

__all__ = ["ADAPTER_WEIGHTS", "AdapterFile", "adapter_sha256", "read_adapter"]

CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
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


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Number = TypeVar("Number", int, float)


class AdapterConfig(BaseModel):
    """What counts in PEFT's `adapter_config.json`; the rest is left alone."""

    r: Rank
    lora_alpha: Alpha = 8.0
    target_modules: str | tuple[str, ...] | None = None
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Alpha] | None = None
    use_rslora: bool = False

    def targets(self, module: str) -> bool:
        """Whether PEFT would adapt the module: a regular expression, or ends of names."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in self.target_modules)


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


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of the weights in an adapter folder."""
    return hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest()


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
    file = folder / ADAPTER_WEIGHTS
    ranks = {
        module: _checked_rank(file, module, shapes, base_shapes)
        for module, shapes in factors.items()
    }
    for module, rank in ranks.items():
        _check_config_agrees(file, config, module, rank)
    scales = {module: _scale(config, module, rank) for module, rank in ranks.items()}
    return AdapterFile(folder, ranks, scales)


def _read_config(folder: Path) -> AdapterConfig:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{file}: missing; a PEFT adapter folder has one") from None
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type must be LORA")
    for option, neutral in UNSUPPORTED_OPTIONS.items():
        if values.get(option, neutral) not in (neutral, None, []):
            raise AdapterError(f"{file}: {option}={values[option]!r} is not supported")
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise AdapterError(f"{file}: {first_problem(error)}") from error


def _factor_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each module the shapes of its factors A and B."""
    from safetensors import SafetensorError, safe_open

    file = folder / ADAPTER_WEIGHTS
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
    file: Path,
    module: str,
    factors: Mapping[str, tuple[int, ...]],
    base_shapes: Mapping[str, tuple[int, ...]],
) -> int:
    base = base_shapes.get(f"{module}.weight")
    if base is None or len(base) != 2:
        raise AdapterError(
            f"{file}: module {module} is no matrix of the base model; "
            "the adapter was made for another architecture"
        )
    if factors.keys() != {"A", "B"}:
        raise AdapterError(f"{file}: module {module} lacks lora_A or lora_B")
    a, b = factors["A"], factors["B"]
    out_features, in_features = base
    rank = a[0] if a else 0
    if rank < 1 or a != (rank, in_features) or b != (out_features, rank):
        raise AdapterError(
            f"{file}: module {module} has lora_A {list(a)} and lora_B {list(b)}, "
            f"but the base model needs [r, {in_features}] and [{out_features}, r]; "
            "the adapter was made for another base model"
        )
    return rank


def _check_config_agrees(file: Path, config: AdapterConfig, module: str, rank: int) -> None:
    """PEFT loads by the config, and silently leaves out what the config does not name."""
    if (wanted := _by_pattern(config.rank_pattern, module, config.r)) != rank:
        raise AdapterError(
            f"{file}: module {module} has rank {rank}, but {CONFIG_FILE} says {wanted}"
        )
    if not config.targets(module):
        raise AdapterError(f"{file}: module {module} is not among target_modules of {CONFIG_FILE}")


def _scale(config: AdapterConfig, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    """The value of the first pattern that fits the end of the module's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
