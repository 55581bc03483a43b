"""The int8 graph of a base model on disk: quantised once, and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.artifacts import Progress, cached_folder, file_key, no_progress
from polymath.errors import ModelSourceError
from polymath.experts.onnx_graph import supports, write_graph

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PretrainedConfig

    Floats = NDArray[np.float32]

__all__ = ["GRAPH_FILE", "ModelTensors", "prepare_graph", "read_config"]

GRAPH_FILE = "decoder.onnx"
GRAPH_VERSION = "int8-1"
"""Changes when the graph does, so that a cached one of an older version is not used."""


def read_config(folder: Path) -> PretrainedConfig:
    """The `config.json` of a Hugging Face folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def prepare_graph(folder: Path, progress: Progress = no_progress) -> Path | None:
    """The cached int8 graph of a base model, quantised now if it is not there yet.

    Args:
        folder: Hugging Face folder.
    Returns:
        The graph's folder; None if the architecture is not known to the graph.
    Raises:
        ModelSourceError: the weights are incomplete, or the cache cannot be written.
    """
    config = read_config(folder)
    if not supports(config):
        return None
    first = min(folder.glob("*.safetensors"))
    key = f"models/{folder.name}-{GRAPH_VERSION}-{file_key(first).rpartition('-')[2]}"
    return cached_folder(key, partial(_quantise, config, folder, progress))


def _quantise(config: PretrainedConfig, folder: Path, progress: Progress, target: Path) -> None:
    progress(f"{folder.name}: quantising to int8", 0, 1)
    try:
        write_graph(config, ModelTensors(folder), _rotary(config), target / GRAPH_FILE)
    except KeyError as error:
        raise ModelSourceError(f"{folder}: the tensor {error} is missing") from error
    progress(f"{folder.name}: quantised", 1, 1)


class ModelTensors(Mapping[str, "Floats"]):
    """The tensors of a Hugging Face folder as float32, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {
            name: tensors
            for file in sorted(folder.glob("*.safetensors"))
            for tensors in [_opened(file)]
            for name in tensors.keys()  # noqa: SIM118 - safe_open is no mapping
        }

    def tensor(self, name: str) -> Tensor:
        """As it is stored; its pages are read when they are used."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __getitem__(self, name: str) -> Floats:
        values: Floats = self.tensor(name).float().numpy()
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _rotary(config: PretrainedConfig) -> tuple[Floats, Floats]:
    """Cosines and sines of every position, [positions, head_dim / 2] (RoFormer, Su et al. 2021)."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(config)
    positions = torch.arange(config.max_position_embeddings).double()
    angles = torch.outer(positions, embedding.inv_freq.double())
    scale = embedding.attention_scaling
    return (angles.cos() * scale).float().numpy(), (angles.sin() * scale).float().numpy()
