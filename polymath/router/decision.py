"""What a router says: weights over experts, how sure it is, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["Message", "Neighbour", "RouteDecision", "Router", "Source", "Why"]

Message = Mapping[str, str]
"""One turn in Hugging Face's chat format: `role` and `content`."""

Source = Literal["encoder", "gradient", "rule", "explicit", "sticky", "fallback"]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A training prompt near the one that was routed; `similarity` is a cosine."""

    id: str
    text: str
    domain: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Why:
    """What a decision rests on: domain probabilities and the nearest training prompts."""

    domains: Mapping[str, float] = field(default_factory=dict)
    nearest: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Who should answer.

    Attributes:
        weights: expert name to weight, non-negative, summing to 1; those of weight 0 are left out.
        confidence: calibrated probability that `domain` is right.
        domain: the likeliest domain; None where no router was asked.
        source: what decided.
    """

    weights: Mapping[str, float]
    confidence: float
    domain: str | None
    source: Source
    why: Why = Why()
    latency_ms: float = 0.0

    @property
    def expert(self) -> str:
        """The expert of the largest weight."""
        return max(self.weights, key=lambda name: self.weights[name])

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON values: the `polymath` object of an answer."""
        return {"expert": self.expert, **asdict(self)}


class Router(Protocol):
    """Reads a conversation and says who should answer it."""

    def route(self, messages: Sequence[Message]) -> RouteDecision:
        """The decision for the last user turn of `messages`; never raises on any text."""
        ...
