"""A BERT model as Hugging Face folders hold it -> an encoder folder for ONNX Runtime, in int8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from polymath.artifacts import PACKAGE_PREFIX, first_problem, package_files
from polymath.errors import ModelSourceError
from polymath.router.encoder import (
    MAX_TOKENS,
    MODEL_FILE,
    TOKENIZER_FILE,
    open_tokenizer,
    token_ids,
)
from polymath.router.encoder_graph import BertConfig, Pooling, activation_ranges, encoder_graph

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["encoder_length", "export_encoder", "locate_encoder"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
POOLING_FILE = "1_Pooling/config.json"
PREFIX = "bert."


def locate_encoder(source: str) -> Path:
    """The Hugging Face folder of the encoder that `package:NAME` or a folder path names.

    Raises:
        ModelSourceError: there is no model with a `tokenizer.json`.
    """
    if source.startswith(PACKAGE_PREFIX):
        configs = [file for file in package_files(source) if file.name == TOKENIZER_FILE]
        folder = configs[0].parent if configs else None
    else:
        folder = Path(source).expanduser()
    if folder is None or not all(
        (folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
    ):
        raise ModelSourceError(
            f"{source}: no encoder there; expected {CONFIG_FILE}, {WEIGHTS_FILE}, {TOKENIZER_FILE}"
        )
    return folder


def encoder_length(source: Path) -> int:
    """Tokens that the encoder in a Hugging Face folder reads at most.

    Raises:
        ModelSourceError: its `config.json` is not that of a BERT model.
    """
    return _length(_config(source))


def export_encoder(source: Path, target: Path, calibration: Sequence[str]) -> None:
    """Write `model.onnx` (int8) and `tokenizer.json`.

    Args:
        source: `config.json`, `model.safetensors` and `tokenizer.json` of a BERT model; mean
            pooling, unless sentence-transformers' `1_Pooling/config.json` says otherwise.
        calibration: texts like those to come; some hundreds.
    Raises:
        ModelSourceError: a file is missing, corrupt, or not of a BERT model.
    """
    import onnx

    tokenizer = open_tokenizer(source)
    config, weights, pooling = _config(source), _weights(source), _pooling(source)
    most = _length(config)
    ids = token_ids(tokenizer, calibration, most)
    try:
        ranges = activation_ranges(encoder_graph(config, weights, most), ids)
        graph = encoder_graph(config, weights, most, pooling, ranges)
    except Exception as error:  # onnxruntime's exceptions have no common type
        raise ModelSourceError(
            f"{source / WEIGHTS_FILE}: not the weights of the BERT model in {CONFIG_FILE} ({error})"
        ) from error
    target.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, str(target / MODEL_FILE))
    if source != target:
        shutil.copyfile(source / TOKENIZER_FILE, target / TOKENIZER_FILE)


def _length(config: BertConfig) -> int:
    return min(MAX_TOKENS, config.max_position_embeddings)


def _config(source: Path) -> BertConfig:
    try:
        return BertConfig.model_validate_json((source / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise ModelSourceError(f"{source / CONFIG_FILE}: cannot be read ({error})") from error
    except ValidationError as error:
        raise ModelSourceError(
            f"{source / CONFIG_FILE}: {first_problem(error)}; encoders must be BERT models"
        ) from error


def _weights(source: Path) -> dict[str, NDArray[np.float32]]:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(source / WEIGHTS_FILE)
        return {
            name.removeprefix(PREFIX): values.astype(np.float32)
            for name, values in tensors.items()
            if values.dtype.kind == "f"
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ModelSourceError(
            f"{source / WEIGHTS_FILE}: corrupt ({error}); fetch the encoder again"
        ) from error


def _pooling(source: Path) -> Pooling:
    file = source / POOLING_FILE
    if not file.exists():
        return "mean"
    try:
        values = json.loads(file.read_bytes())
        return "cls" if values.get("pooling_mode_cls_token") else "mean"
    except (OSError, ValueError, AttributeError) as error:
        raise ModelSourceError(f"{file}: corrupt ({error}); fetch the encoder again") from error
