"""The folder that `polymath train clusters` writes: directions in which groups of prompts pull.

`clusters.json` says how the directions were found, `centroids.safetensors` holds them. `base` and
`expert-0`, `expert-1` ... are the adapters, `distilled` is an ordinary router folder that tells the
clusters apart by their texts alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymath.artifacts import first_problem
from polymath.errors import RouterArtifactError
from polymath.router.artifact import floats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BASE_FOLDER", "CLUSTERS_FILE", "DISTILLED_FOLDER", "ClusterArtifact", "ClusterCard"]

FORMAT = 1
CLUSTERS_FILE = "clusters.json"
CENTROIDS_FILE = "centroids.safetensors"
BASE_FOLDER = "base"
DISTILLED_FOLDER = "distilled"


class ClusterCard(BaseModel):
    """What `clusters.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    base_model: str
    """Where the base model came from."""
    base_sha256: str
    """Of the base adapter's weights, as features of another adapter would mean nothing."""
    dimensions: int = Field(ge=1)
    """Of the projected gradients."""
    projection_seed: int
    layers: int | None = Field(default=None, ge=1)
    """The last so many decoder layers count; None for all."""
    max_length: int = Field(ge=8)
    """Tokens of a prompt that are read."""
    algorithm: str
    sizes: tuple[int, ...] = Field(min_length=1)
    """Training prompts of each cluster."""
    similarity: tuple[float, ...]
    """Mean cosine of each cluster's prompts with its centroid."""
    data_sha256: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the clusters, which stand for domains in decisions."""
        return tuple(f"cluster-{index}" for index in range(len(self.sizes)))


@dataclass(frozen=True, slots=True)
class ClusterArtifact:
    """The folder in memory, but for its adapters.

    Attributes:
        centroids: [clusters, dimensions], unit length.
    """

    card: ClusterCard
    centroids: NDArray[np.float32]

    @classmethod
    def load(cls, folder: Path) -> ClusterArtifact:
        """Read the folder.

        Raises:
            RouterArtifactError: a file is missing, corrupt, or does not fit the other.
        """
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        for name in (CLUSTERS_FILE, CENTROIDS_FILE):
            if not (folder / name).is_file():
                raise RouterArtifactError(
                    f"{folder / name}: missing; find clusters with `polymath train clusters`"
                )
        try:
            card = ClusterCard.model_validate_json((folder / CLUSTERS_FILE).read_bytes())
            centroids = floats(load_file(folder / CENTROIDS_FILE), "centroids")
        except ValidationError as error:
            raise RouterArtifactError(
                f"{folder / CLUSTERS_FILE}: corrupt ({first_problem(error)})"
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise RouterArtifactError(f"{folder / CENTROIDS_FILE}: corrupt ({error})") from error
        if centroids.shape != (len(card.sizes), card.dimensions):
            raise RouterArtifactError(
                f"{folder / CENTROIDS_FILE}: {list(centroids.shape)} does not fit "
                f"{len(card.sizes)} clusters of {card.dimensions} dimensions in {CLUSTERS_FILE}"
            )
        if not np.isfinite(centroids).all():
            raise RouterArtifactError(f"{folder / CENTROIDS_FILE}: holds NaN or infinity")
        return cls(card, centroids)

    def save(self, folder: Path) -> None:
        """Write both files; `clusters.json` comes last, so that no half folder is loaded."""
        import numpy as np
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLUSTERS_FILE).unlink(missing_ok=True)
        centroids = np.ascontiguousarray(self.centroids, dtype=np.float32)
        save_file({"centroids": centroids}, folder / CENTROIDS_FILE)
        card = json.dumps(self.card.model_dump(mode="json"), indent=2)
        (folder / CLUSTERS_FILE).write_text(card + "\n", encoding="utf-8")
