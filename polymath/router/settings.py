"""The config section `router`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
    encoder: str | None = Field(
        default=None,
        description="Where the encoder is, if not where the router folder says: `package:NAME` or "
        "a folder with a BERT model.",
    )
    fallback: str = Field(
        min_length=1, description="Expert for prompts that the router is not sure about."
    )
    min_confidence: float = Field(
        default=0.4, ge=0, le=1, description="Below this confidence the fallback answers."
    )
    threads: int = Field(default=1, ge=1, le=64, description="CPU threads of the encoder.")
