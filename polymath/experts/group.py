"""The heart of the engine: rows whose logits are combined into one distribution each step."""

from dataclasses import dataclass
from typing import Literal

from polymath.experts.combiner import Combiner
from polymath.experts.sampling import SamplingParams

__all__ = ["Attribution", "Chunk", "DecodeGroup", "FinishReason", "Row", "ScoredToken"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of one model.

    Attributes:
        adapter: name of a LoRA adapter of that base model; None is the base model itself.
        prompt: token ids; rows of one group may have different prompts.
    """

    base_model: str
    adapter: str | None
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that answer together: the token sampled from `combiner(logits)` is fed to every row.

    Attributes:
        attribution: say for each token which rows it came from.
    """

    rows: tuple[Row, ...]
    combiner: Combiner
    sampling: SamplingParams
    attribution: bool = False


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where a token came from.

    Attributes:
        row: the row that raised its probability most: of all rows the one with the largest
            `weight * (log p_row - mean of log p over the rows)`.
        weights: the coefficient of every row in this step.
    """

    row: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability under the combined distribution, and the likeliest others.

    Attributes:
        piece: the bytes of the token.
        logprob: nats, before penalties, bias and temperature.
        top: the likeliest tokens in order, themselves without `top`.
        attribution: None unless the group asked for it.
    """

    id: int
    piece: bytes
    logprob: float
    top: tuple["ScoredToken", ...] = ()
    attribution: Attribution | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step adds to an answer; the last chunk alone has a `finish_reason`.

    Attributes:
        text: may be empty, where a character or a stop string is not decided yet.
        token: the token sampled in this step; None if it was the end token.
    """

    text: str
    token: ScoredToken | None
    finish_reason: FinishReason | None = None
