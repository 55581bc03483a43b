"""The config section `router`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polymath.router.decision import Combine
from polymath.router.rules import RuleSettings

__all__ = ["RouterSettings"]

UNUSED = {
    "encoder": frozenset({"clusters", "base_weight", "temperature", "share", "distil"}),
    "gradient": frozenset(
        {"clusters", "share", "min_confidence", "out_of_scope", "combine", "margin", "sticky"}
    ),
    "hybrid": frozenset({"combine", "margin"}),
    "rules": frozenset(
        {
            "path",
            "clusters",
            "base_weight",
            "temperature",
            "share",
            "distil",
            "min_confidence",
            "out_of_scope",
            "combine",
            "margin",
            "top_k",
            "sticky",
            "threads",
        }
    ),
}
"""Keys that a kind of router does not read."""


class RouterSettings(BaseModel):
    """Which router reads the conversations and what happens when it is unsure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["encoder", "gradient", "hybrid", "rules"] = Field(
        default="encoder",
        description="`encoder`: a sentence encoder with a trained head. `gradient`: the direction "
        "in which a prompt pulls an adapter's weights (ELREA). `hybrid`: both, mixed. `rules`: the "
        "rules alone, without a model, and then the fallback.",
    )
    path: Path | None = Field(
        default=None,
        description="Folder that `polymath train router` wrote (for `gradient`, `polymath train "
        "clusters`), relative to the config file; all kinds but `rules` need it.",
    )
    clusters: Path | None = Field(
        default=None,
        description="For `hybrid`: folder that `polymath train clusters` wrote.",
    )
    base_weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Of the base adapter's logits, where the clusters' experts have 1 together.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Of the softmax over the clusters; small values trust the nearest one.",
    )
    share: float = Field(
        default=0.5, ge=0, le=1, description="For `hybrid`: share of the gradient's weights."
    )
    distil: bool = Field(
        default=False,
        description="Guess the clusters from the words, at encoder speed, instead of computing "
        "the gradient.",
    )
    fallback: str = Field(
        min_length=1,
        description="Expert for prompts that are out of scope or that the router is not sure of; "
        "for `gradient` and `hybrid` that of the clusters' base adapter, which answers with them.",
    )
    min_confidence: float = Field(
        default=0.4, ge=0, le=1, description="Below this confidence the fallback answers."
    )
    out_of_scope: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="From this probability of belonging to no domain on, the fallback answers; by "
        "default what the training found.",
    )
    combine: Combine = Field(
        default="select",
        description="What an unsure router does: `select` the likeliest expert, or let several "
        "answer together: `ensemble` (their probabilities weighted by the router), `logits` (their "
        "logits) or `posterior` (weights that follow the text).",
    )
    margin: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="The router is unsure where the two likeliest experts are closer than this.",
    )
    top_k: int = Field(
        default=2,
        ge=1,
        description="So many experts answer together: of an unsure encoder, or beside the base of "
        "the clusters.",
    )
    sticky: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="Probability that a conversation stays in its domain from one user turn to "
        "the next; 0 looks at the last turn alone.",
    )
    rules: tuple[RuleSettings, ...] = Field(
        default=(), description="Asked in order before the encoder; the first that matches decides."
    )
    threads: int = Field(default=1, ge=1, le=64, description="CPU threads of the encoder.")

    @property
    def cluster_folder(self) -> Path | None:
        """Where the clusters are, if they are asked for."""
        return {"gradient": self.path, "hybrid": self.clusters}.get(self.kind)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "RouterSettings":
        if unused := sorted(self.model_fields_set & UNUSED[self.kind]):
            raise ValueError(f"{unused[0]!r} means nothing to a router of kind {self.kind!r}")
        if self.kind != "rules" and self.path is None:
            raise ValueError(f"'path' is missing; a router of kind {self.kind!r} needs it")
        if self.kind == "hybrid" and self.clusters is None:
            raise ValueError("'clusters' is missing; a router of kind 'hybrid' needs it")
        return self
