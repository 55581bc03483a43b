"""What a router says: weights over experts, how sure it is, and why."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

__all__ = [
    "Allowed",
    "Combine",
    "Message",
    "Neighbour",
    "RouteDecision",
    "Router",
    "Source",
    "Why",
    "largest_first",
    "within",
]

Message = Mapping[str, str]
"""One turn in Hugging Face's chat format: `role` and `content`."""

Source = Literal["encoder", "gradient", "rule", "explicit", "sticky", "fallback"]

Allowed = Set[str] | None
"""Experts that may be chosen; None is all of them."""

Combine = Literal["select", "ensemble", "posterior", "logits"]
"""Who answers: the expert of the largest weight, or all of them by the engine's combiners."""


def within(weights: Mapping[str, float], allowed: Allowed) -> dict[str, float]:
    """The weights of the experts that are allowed, brought to the sum that they had."""
    if allowed is None:
        return dict(weights)
    kept = {name: weight for name, weight in weights.items() if name in allowed and weight > 0}
    if not kept:
        return dict.fromkeys(sorted(allowed)[:1], 1.0)
    scale = sum(weights.values()) / sum(kept.values())
    return {name: weight * scale for name, weight in kept.items()}


def largest_first(weights: Mapping[str, float], most: int | None = None) -> dict[str, float]:
    """The weights in order, or only the `most` largest; equal ones stay as they came."""
    ordered = sorted(weights.items(), key=lambda item: item[1], reverse=True)
    return dict(ordered[:most])


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A training prompt near the one that was routed; `similarity` is a cosine."""

    id: str
    text: str
    domain: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Why:
    """What a decision rests on.

    Attributes:
        domains: calibrated probabilities of the domains, the likeliest first.
        nearest: the training prompts most like the last user turn.
        out_of_scope: probability that the last user turn belongs to no domain by itself.
        rule: name of the rule that matched.
    """

    domains: Mapping[str, float] = field(default_factory=dict)
    nearest: tuple[Neighbour, ...] = ()
    out_of_scope: float | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Who should answer.

    Attributes:
        weights: expert name to weight, non-negative, summing to 1; those of weight 0 are left out.
        confidence: calibrated probability that `domain` is right.
        domain: the likeliest domain; None where no router was asked.
        source: what decided.
        combine: whether the experts of `weights` answer together.
    """

    weights: Mapping[str, float]
    confidence: float
    domain: str | None
    source: Source
    why: Why = Why()
    latency_ms: float = 0.0
    combine: Combine = "select"

    @property
    def expert(self) -> str:
        """The expert of the largest weight."""
        return max(self.weights, key=lambda name: self.weights[name])

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON values: the `polymath` object of an answer."""
        return {"expert": self.expert, **asdict(self)}


class Router(Protocol):
    """Reads a conversation and says who should answer it."""

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The decision for the last user turn of `messages`; never raises on any text.

        Args:
            headers: of the HTTP request, with names in lower case.
            allowed: the weights are those of these experts, summing to 1: taking an expert away
                takes away its domain (DEMix, Gururangan et al. 2022). Not empty.
        """
        ...
