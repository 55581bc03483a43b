"""What the encoder says of a prompt's words and what the gradient says of its pull, mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from polymath.router.decision import Allowed, Message, RouteDecision, Router, largest_first
from polymath.router.embedder import Embedder, HasEmbedder

__all__ = ["HybridRouter"]


class HybridRouter:
    """Mixes the weights of two routers; their experts answer together.

    Args:
        share: of the gradient's weights.
        most: so many experts answer at most, those of the largest weights.
    """

    def __init__(self, encoder: Router, gradient: Router, share: float, most: int) -> None:
        self._encoder = encoder
        self._gradient = gradient
        self._share = share
        self._most = most

    @property
    def embedder(self) -> Embedder | None:
        """That of the encoder's router."""
        return self._encoder.embedder if isinstance(self._encoder, HasEmbedder) else None

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The encoder's decision, with the weights of both."""
        words = self._encoder.route(messages, headers, allowed)
        pull = self._gradient.route(messages, headers, allowed)
        weights: dict[str, float] = {}
        for decision, share in ((words, 1 - self._share), (pull, self._share)):
            for expert, weight in decision.weights.items():
                weights[expert] = weights.get(expert, 0.0) + share * weight
        best = largest_first(weights, self._most)
        total = sum(best.values())
        return replace(
            words,
            weights={expert: weight / total for expert, weight in best.items() if weight > 0},
            combine="logits",
            latency_ms=words.latency_ms + pull.latency_ms,
        )
