"""A BERT sentence encoder on ONNX Runtime: texts to unit vectors (Sentence-BERT, Reimers 2019).

The weights come from a package or folder; the ONNX graph (transformer, mean pooling, normalisation)
is exported once into the cache. After that neither torch nor transformers is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.artifacts import (
    PACKAGE_PREFIX,
    Progress,
    cached_folder,
    file_key,
    no_progress,
    open_graph,
    package_files,
)
from polymath.errors import ModelSourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

__all__ = ["MAX_TOKENS", "SentenceEncoder", "locate_encoder", "prepare_encoder"]

MAX_TOKENS = 256
"""Longest input of all-MiniLM-L6-v2 (its sentence_bert_config.json); the rest is cut off."""

MAX_CHARACTERS = 16 * MAX_TOKENS
"""No more of a text is tokenised: 256 word pieces are never that long in practice."""

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
ONNX_OPSET = 18


class SentenceEncoder:
    """Texts to unit vectors.

    Args:
        folder: holds `model.onnx` and `tokenizer.json` (`prepare_encoder`).
        threads: of ONNX Runtime.
    Raises:
        ModelSourceError: a file is missing or corrupt.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self._session = open_graph(folder / MODEL_FILE, threads, "the encoder is exported again")
        self._tokenizer = _tokenizer(folder)
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts, [texts, dimensions]."""
        import numpy as np

        if not texts:
            return np.empty((0, self._session.get_outputs()[0].shape[-1]), dtype=np.float32)
        encodings = self._tokenizer.encode_batch([_readable(text) for text in texts])
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        (vectors,) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
        return np.asarray(vectors, dtype=np.float32)


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
        (folder / name).is_file() for name in ("config.json", "model.safetensors", TOKENIZER_FILE)
    ):
        raise ModelSourceError(
            f"{source}: no encoder there; expected config.json, model.safetensors, tokenizer.json"
        )
    return folder


def prepare_encoder(source: str, progress: Progress = no_progress) -> Path:
    """The exported encoder in the cache, exported now if it is not there yet.

    Raises:
        ModelSourceError: the source holds no encoder, or a corrupt one.
    """
    folder = locate_encoder(source)
    key = f"encoders/{folder.name}-{file_key(folder / 'model.safetensors')}"

    def build(target: Path) -> None:
        progress("encoder: exporting to ONNX", 0, 1)
        _export(folder, target)
        progress("encoder: exported", 1, 1)

    return cached_folder(key, build)


def _readable(text: str) -> str:
    """The text as the tokenizer can take it: bounded, without lone surrogates."""
    return text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelSourceError(
            f"{folder}: {TOKENIZER_FILE} is corrupt ({error}); fetch the encoder again"
        ) from error


def _bert(folder: Path) -> Any:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:  # a corrupt file fails in json, safetensors, torch or transformers
        raise ModelSourceError(
            f"{folder}: config.json or model.safetensors is corrupt ({error}); "
            "fetch the encoder again"
        ) from error


def _export(folder: Path, target: Path) -> None:
    import logging
    import shutil
    import warnings

    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    _tokenizer(folder)  # a corrupt one must not get into the cache
    bert = _bert(folder)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
            weight = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1)

    example = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations, about its own calls
        torch.onnx.export(
            Pooled().eval(),
            (example, example.clone()),
            target / MODEL_FILE,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(axes, axes),
            opset_version=ONNX_OPSET,
            external_data=False,
            verbose=False,
        )
    shutil.copy(folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
