"""How an adapter is trained, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymath.errors import DataError

__all__ = ["ExpertReport", "LoraRecipe", "checked"]

Recipe = TypeVar("Recipe", bound=BaseModel)


class LoraRecipe(BaseModel):
    """How an adapter is trained; the same recipe and data give the same adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_rank: int = Field(default=3, ge=1, le=256)
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = ("all-linear",)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    train_tokens: int = Field(default=60_000, ge=1)
    batch_tokens: int = Field(default=1024, ge=1)
    max_length: int = Field(default=512, ge=8)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    @classmethod
    def checked(cls, **values: Any) -> LoraRecipe:
        """A recipe from what a user typed.

        Raises:
            DataError: a value is out of range; the message names it.
        """
        return checked(cls, values)

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or twice the rank."""
        return self.lora_alpha or 2.0 * self.lora_rank


def checked(recipe: type[Recipe], values: Mapping[str, Any]) -> Recipe:
    """A recipe of what a user typed.

    Raises:
        DataError: a value is out of range; the message names it.
    """
    try:
        return recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from None


class ExpertReport(BaseModel):
    """What a training run did, written beside the adapter as `training.json`.

    `rows` and `eval_rows` count the conversations that had an answer within `max_length`.
    """

    base_model: str
    recipe: LoraRecipe
    data_sha256: str
    rows: int
    steps: int
    tokens: int
    seconds: float
    eval_rows: int
    eval_tokens: int
    loss_before: float
    loss_after: float
