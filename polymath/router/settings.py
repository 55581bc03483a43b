"""The config section `router`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from polymath.router.decision import Combine
from polymath.router.rules import RuleSettings

__all__ = ["RouterSettings"]


class RouterSettings(BaseModel):
    """Which router reads the conversations and what happens when it is unsure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["encoder"] = Field(
        default="encoder", description="`encoder`: a sentence encoder with a trained head."
    )
    path: Path = Field(
        description="Router folder that `polymath train router` wrote, relative to the config file."
    )
    fallback: str = Field(
        min_length=1,
        description="Expert for prompts that are out of scope or that the router is not sure of.",
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
        "answer together: `ensemble` (their probabilities weighted by the router) or `posterior` "
        "(weights that follow the text).",
    )
    margin: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="The router is unsure where the two likeliest experts are closer than this.",
    )
    top_k: int = Field(
        default=2, ge=2, description="So many experts answer together when it is unsure."
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
