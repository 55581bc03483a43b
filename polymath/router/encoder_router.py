"""A router that reads the last user turn with a sentence encoder and a linear head."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from polymath.errors import RouterArtifactError
from polymath.router.artifact import RouterArtifact
from polymath.router.decision import Message, Neighbour, RouteDecision, Source, Why

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Encoder", "EncoderRouter", "calibrated"]

NEAREST = 3
"""Training prompts that a decision points at."""


class Encoder(Protocol):
    """Texts to unit vectors."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, dimensions]"""
        ...


class EncoderRouter:
    """Last user turn -> unit vector -> calibrated domain probabilities -> weights over experts.

    Args:
        artifact: the trained head.
        encoder: the encoder that the head was trained on.
        experts: domain -> expert that answers it; other domains belong to the fallback.
        fallback: expert for what is below `min_confidence`.
    Raises:
        RouterArtifactError: the encoder's vectors have another length than the head's.
    """

    def __init__(
        self,
        artifact: RouterArtifact,
        encoder: Encoder,
        experts: Mapping[str, str],
        fallback: str,
        min_confidence: float,
    ) -> None:
        found = encoder.encode([""]).shape[1]
        if found != artifact.dimensions:
            raise RouterArtifactError(
                f"the router was trained on vectors of {artifact.dimensions} dimensions, "
                f"but the encoder gives {found}; check router.encoder"
            )
        self._artifact = artifact
        self._encoder = encoder
        self._owners = [experts.get(label, fallback) for label in artifact.card.labels]
        self._fallback = fallback
        self._min_confidence = min_confidence

    def route(self, messages: Sequence[Message]) -> RouteDecision:
        """The decision for the last user turn; any text is answered."""
        started = time.perf_counter()
        vector = self._encoder.encode([_last_user_text(messages)])[0]
        probabilities = self._probabilities(vector)
        domain = max(probabilities, key=lambda label: probabilities[label])
        weights, source = self._weights(probabilities, probabilities[domain])
        return RouteDecision(
            weights=weights,
            confidence=probabilities[domain],
            domain=domain,
            source=source,
            why=Why(probabilities, self._nearest(vector)),
            latency_ms=(time.perf_counter() - started) * 1e3,
        )

    def _probabilities(self, vector: NDArray[np.float32]) -> dict[str, float]:
        card = self._artifact.card
        logits = self._artifact.weight @ vector + self._artifact.bias
        values = calibrated(logits[None], card.temperature)[0]
        return {label: float(value) for label, value in zip(card.labels, values, strict=True)}

    def _weights(
        self, probabilities: Mapping[str, float], confidence: float
    ) -> tuple[dict[str, float], Source]:
        if confidence < self._min_confidence:
            return {self._fallback: 1.0}, "fallback"
        weights: dict[str, float] = {}
        for owner, probability in zip(self._owners, probabilities.values(), strict=True):
            weights[owner] = weights.get(owner, 0.0) + probability
        return {owner: weight for owner, weight in weights.items() if weight > 0}, "encoder"

    def _nearest(self, vector: NDArray[np.float32]) -> tuple[Neighbour, ...]:
        similarities = self._artifact.vectors @ vector
        order = (-similarities).argsort()[:NEAREST]
        return tuple(
            Neighbour(**self._artifact.references[index].model_dump(), similarity=similarity)
            for index, similarity in zip(order, similarities[order].tolist(), strict=True)
        )


def calibrated(logits: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Temperature-scaled softmax over the last axis (Guo et al. 2017), in float64."""
    import numpy as np

    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    exponentials = np.exp(scaled)
    result: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def _last_user_text(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    return ""
