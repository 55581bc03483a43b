"""CombLM (Ormazabal et al. 2023): a large model mixed with a small one by a learned share.

p = share * p_small + (1 - share) * p_large. The share is one number, or what a small network says
of how sure both models are at this token. It was fitted with both models frozen
(`polymath train combiner`), and lies in a folder: `combiner.json`, and `combiner.onnx` if it is a
network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymath.artifacts import open_graph
from polymath.errors import CombinerError, ModelSourceError
from polymath.experts.combiner import CombinerState

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COMBINER_CARD",
    "COMBINER_GRAPH",
    "CombLM",
    "CombinerCard",
    "CombinerKind",
    "mixing_features",
    "open_combiner",
]

CombinerKind = Literal["mean", "constant", "entropy", "full"]
COMBINER_CARD = "combiner.json"
COMBINER_GRAPH = "combiner.onnx"
LIKELIEST = 8
"""Log-probabilities of each model that `full` looks at."""
LEAST = -30.0
"""Nats; what is less likely is as good as impossible, and is told to a network as this."""


class CombinerCard(BaseModel):
    """`combiner.json`.

    Attributes:
        large, small: the experts that were mixed.
        share: of the small model; None if a network says it.
        perplexity: on held-out answers, by what answered: large, small, mean, fit.
        tokens: of the answers fitted on and held out.
        data_sha256: fingerprint of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: CombinerKind
    large: str
    small: str
    share: float | None = Field(default=None, ge=0, le=1)
    perplexity: dict[str, float]
    tokens: dict[str, int]
    data_sha256: str


@dataclass(frozen=True, eq=False)
class CombLM:
    """Mixes the rows large and small.

    Args:
        share: of the small model, given the features [features] of a step.
        kind: which features it looks at.
        typical: the share on average, for attribution.
    """

    follows_text: ClassVar[bool] = False
    share: Callable[[Tensor], float]
    kind: CombinerKind
    typical: float

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        import torch

        log_probs = logits.log_softmax(-1)
        share = self.share(mixing_features(self.kind, log_probs))
        if share in (0.0, 1.0):
            return log_probs[int(share)], state
        large, small = log_probs[0] + math.log1p(-share), log_probs[1] + math.log(share)
        return torch.logaddexp(large, small), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        return (1.0 - self.typical, self.typical)


def mixing_features(kind: CombinerKind, log_probs: Tensor) -> Tensor:
    """What a share depends on.

    Args:
        log_probs: [2, ..., vocab], of the large and the small model.
    Returns:
        [..., features]: nothing for a constant; for `entropy` both entropies and the two largest
        log-probabilities; for `full` also the likeliest ones of each in order, and how likely each
        model finds the other's first choice.
    """
    import torch

    if kind in ("mean", "constant"):
        return log_probs.new_zeros((*log_probs.shape[1:-1], 0))
    bounded = log_probs.clamp(min=LEAST)
    entropies = -(log_probs.exp() * bounded).sum(-1)
    best, first = bounded.max(-1)
    parts = [*entropies[..., None], *best[..., None]]
    if kind == "full":
        parts += bounded.topk(min(LIKELIEST, bounded.shape[-1])).values
        other = bounded.flip(0).gather(-1, first[..., None])
        parts += other
    return torch.cat(parts, -1)


def open_combiner(folder: Path) -> CombLM:
    """A combiner from its folder.

    Raises:
        CombinerError: the folder cannot be used.
    """
    card = read_card(folder)
    if card.share is not None:
        share = card.share
        return CombLM(lambda features: share, card.kind, share)
    try:
        session = open_graph(folder / COMBINER_GRAPH, 1, "train the combiner again")
    except ModelSourceError as error:
        raise CombinerError(error.message) from error

    def of_network(features: Tensor) -> float:
        (shares,) = session.run(None, {"features": features[None].numpy()})
        return float(shares[0, 0])

    return CombLM(of_network, card.kind, 0.5)


def read_card(folder: Path) -> CombinerCard:
    """The card of a combiner's folder.

    Raises:
        CombinerError: it is missing or not a card.
    """
    file = folder / COMBINER_CARD
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        card = CombinerCard.model_validate(values)
    except (OSError, ValueError, ValidationError) as error:
        raise CombinerError(f"{file} cannot be used; train the combiner again") from error
    if card.share is None and not (folder / COMBINER_GRAPH).is_file():
        raise CombinerError(f"{folder / COMBINER_GRAPH} is missing; train the combiner again")
    return card
