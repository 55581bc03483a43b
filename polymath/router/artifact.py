"""The router folder: an encoder, a head over its vectors, calibration, and example prompts.

`model.onnx` and `tokenizer.json` are the encoder, `router.json` says what the numbers mean,
`head.safetensors` holds them, `references.jsonl` holds the prompts that a decision can point at.
It is complete: onnxruntime and tokenizers read it, neither torch nor transformers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polymath.artifacts import first_problem
from polymath.errors import RouterArtifactError
from polymath.router.encoder import MAX_TOKENS, MODEL_FILE, TOKENIZER_FILE
from polymath.router.head import RouterHead
from polymath.router.int8 import rounded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CARD_FILE", "Reference", "RouterArtifact", "RouterCard", "floats"]

FORMAT = 3
CARD_FILE = "router.json"
HEAD_FILE = "head.safetensors"
REFERENCES_FILE = "references.jsonl"


class RouterCard(BaseModel):
    """What `router.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    encoder: str
    """Where the encoder came from."""
    finetuned: bool = False
    max_tokens: int = Field(default=MAX_TOKENS, ge=8)
    labels: tuple[str, ...] = Field(min_length=2)
    temperature: float = Field(gt=0)
    out_of_scope: float | None = Field(default=None, gt=0, le=1)
    """From this probability on a prompt is of no domain; None if the head has no row for that."""
    data_sha256: str
    rows: Mapping[str, int]
    """Training prompts by source."""
    metrics: Mapping[str, float]
    """Measured on prompts that were held out."""
    left_out: Mapping[str, float] = Field(default_factory=dict)
    """Accuracy on each data set when it was left out of training."""
    recipe: Mapping[str, Any] = Field(default_factory=dict)
    licence: str = ""

    @field_validator("format")
    @classmethod
    def _can_be_read(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"{value} is not {FORMAT}, which is read here; train the router again")
        return value

    @field_validator("labels")
    @classmethod
    def _are_different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := sorted({label for label in value if value.count(label) > 1}):
            raise ValueError(f"{', '.join(repeated)} given more than once")
        return value


class Reference(BaseModel):
    """A training prompt that decisions may point at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    text: str
    domain: str


@dataclass(frozen=True, slots=True)
class RouterArtifact:
    """The folder in memory, but for its encoder.

    Attributes:
        weight: [labels, dimensions], with one more row for "none of them" if the card has an
            `out_of_scope` probability; bias: of the same rows.
        centres: [centres, dimensions], unit length; owners: the row of each. With weight and bias
            they give logits (`RouterHead`); there may be none.
        vectors: [references, dimensions], the inner unit vectors of the `references`.
    """

    card: RouterCard
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    vectors: NDArray[np.float32]
    references: tuple[Reference, ...] = ()
    centres: NDArray[np.float32] | None = None
    owners: NDArray[np.int64] | None = None

    @classmethod
    def load(cls, folder: Path) -> RouterArtifact:
        """Read a router folder.

        Raises:
            RouterArtifactError: a file is missing, corrupt, or does not fit the others.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        for name in (CARD_FILE, HEAD_FILE, REFERENCES_FILE, MODEL_FILE, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise RouterArtifactError(
                    f"{folder / name}: missing; train a router with `polymath train router`"
                )
        try:
            card = RouterCard.model_validate_json((folder / CARD_FILE).read_bytes())
            lines = (folder / REFERENCES_FILE).read_text(encoding="utf-8").split("\n")
            references = tuple(Reference.model_validate_json(line) for line in lines if line)
            tensors: dict[str, Any] = load_file(folder / HEAD_FILE)
            artifact = cls(
                card,
                floats(tensors, "weight"),
                floats(tensors, "bias"),
                floats(tensors, "vectors"),
                references,
                *_centres(tensors),
            )
        except ValidationError as error:
            what = f"{error.title}: {first_problem(error)}"
            raise RouterArtifactError(f"{folder}: corrupt router folder ({what})") from error
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise RouterArtifactError(f"{folder}: corrupt router folder ({error})") from error
        artifact._check_shapes(folder)
        artifact._check_finite(folder)
        return artifact

    def save(self, folder: Path) -> None:
        """Write all but the encoder; `router.json` comes last, so that no half router is loaded."""
        import numpy as np
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        tensors = {
            "weight": self.weight.astype(np.float32),
            "bias": self.bias.astype(np.float32),
            "vectors": self.vectors.astype(np.float16),
        }
        if self.centres is not None and self.owners is not None:
            codes, scales = rounded(self.centres)
            owners = self.owners.astype(np.int32)
            tensors |= {"centres": codes, "centres.scale": scales, "owners": owners}
        # safetensors writes the memory as it lies, whatever the strides say
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(contiguous, folder / HEAD_FILE)
        lines = [reference.model_dump_json() + "\n" for reference in self.references]
        (folder / REFERENCES_FILE).write_text("".join(lines), encoding="utf-8")
        card = json.dumps(self.card.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (folder / CARD_FILE).write_text(card + "\n", encoding="utf-8")

    @property
    def dimensions(self) -> int:
        """Length of the half of the encoder's vectors that the head reads."""
        return int(self.weight.shape[1])

    @property
    def head(self) -> RouterHead:
        """What gives logits of the vectors' first half."""
        return RouterHead(self.weight, self.bias, self.centres, self.owners)

    def _check_shapes(self, folder: Path) -> None:
        labels = len(self.card.labels)
        rows = labels + (self.card.out_of_scope is not None)
        if (
            self.weight.ndim != 2
            or self.weight.shape[0] != rows
            or self.bias.shape != (rows,)
            or self.vectors.shape != (len(self.references), self.dimensions)
        ):
            raise RouterArtifactError(
                f"{folder}: {HEAD_FILE} does not fit {CARD_FILE}: weight "
                f"{list(self.weight.shape)}, bias {list(self.bias.shape)}, "
                f"vectors {list(self.vectors.shape)} for {labels} labels "
                f"and {len(self.references)} references"
            )

        if self.centres is not None and self.owners is not None:
            fits = self.centres.shape == (len(self.owners), self.dimensions) and len(self.owners)
            if not fits or self.owners.min() < 0 or self.owners.max() >= rows:
                raise RouterArtifactError(
                    f"{folder}: {HEAD_FILE} does not fit {CARD_FILE}: centres "
                    f"{list(self.centres.shape)} of {len(self.owners)} owners, {rows} rows"
                )

    def _check_finite(self, folder: Path) -> None:
        import numpy as np

        for name in ("weight", "bias", "vectors", "centres"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise RouterArtifactError(
                    f"{folder / HEAD_FILE}: {name} holds NaN or infinity; train the router again"
                )


def _centres(
    tensors: Mapping[str, Any],
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | tuple[()]:
    """The centres and their owners, if there are any; they are kept in int8."""
    import numpy as np

    if "centres" not in tensors:
        return ()
    scales = floats(tensors, "centres.scale")
    owners = np.asarray(tensors["owners"])
    if owners.dtype.kind not in "iu" or owners.ndim != 1:
        raise TypeError("owners are no row of integers")
    return floats(tensors, "centres") * scales[:, None], owners.astype(np.int64)


def floats(tensors: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """A tensor of a file, in float32.

    Raises:
        KeyError: there is none of that name.
        TypeError: it does not hold numbers that numpy knows.
    """
    import numpy as np

    values = tensors[name]
    if values.dtype.kind not in "fiu":  # such as bfloat16, which some libraries teach numpy
        raise TypeError(f"{name} is of type {values.dtype}")
    floats: NDArray[np.float32] = values.astype(np.float32)
    return floats
