"""A router that reads the user turns with a sentence encoder and a linear head."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polymath.errors import RouterArtifactError
from polymath.router.artifact import Reference, RouterArtifact
from polymath.router.calibration import calibrated
from polymath.router.conversation import Reading, belief, user_turns
from polymath.router.decision import Allowed, Message, Neighbour, RouteDecision, Why
from polymath.router.embedder import Embedder
from polymath.router.encoder import SentenceEncoder, halves
from polymath.router.micro_batch import Encoder, MicroBatcher
from polymath.router.policy import Policy
from polymath.router.prototypes import Prototypes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EncoderRouter"]

NEAREST = 3
"""Training prompts that a decision points at."""

TURNS = 4
"""User turns that a decision looks back on."""

SHOWN_DOMAINS = 10
"""The likeliest domains that a decision shows."""

TINY = 1e-12


class EncoderRouter:
    """User turns -> vectors -> calibrated domain probabilities -> weights over experts.

    Args:
        artifact: the trained head.
        encoder: the encoder that the head was trained on.
        policy: which expert owns a domain, and what happens when the router is unsure.
        examples: domain -> prompts by which a domain is known without training.
        sticky: probability that a conversation stays in its domain from turn to turn.
        out_of_scope: from this probability on a prompt is of no domain; by default the artifact's.
    Attributes:
        embedder: gives the encoder's vectors, if it is a sentence encoder.
    Raises:
        RouterArtifactError: the encoder's vectors have another length than the head's.
    """

    def __init__(
        self,
        artifact: RouterArtifact,
        encoder: Encoder,
        policy: Policy,
        examples: Mapping[str, Sequence[str]] | None = None,
        sticky: float = 0.0,
        out_of_scope: float | None = None,
    ) -> None:
        found = halves(encoder.encode([""]))[0].shape[1]
        if found != artifact.dimensions:
            raise RouterArtifactError(
                f"the router was trained on vectors of {artifact.dimensions} dimensions, "
                f"but the encoder gives {found}; train the router again"
            )
        self._artifact = artifact
        self._head = artifact.head
        self._encoder = MicroBatcher(encoder)
        self.embedder = (
            Embedder(encoder, self._encoder) if isinstance(encoder, SentenceEncoder) else None
        )
        self._policy = policy
        self._sticky = sticky
        limit = artifact.card.out_of_scope if out_of_scope is None else out_of_scope
        self._out_of_scope = 1.0 if limit is None else limit
        self._examples: dict[str, tuple[NDArray[np.float32], tuple[Reference, ...]]] = {}
        self._prototypes: Prototypes | None = None
        if examples:
            self._learn(examples, encoder)

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        """The decision for the last user turn; any text is answered."""
        started = time.perf_counter()
        turns = user_turns(messages, TURNS if self._sticky else 1)
        decision = self._by_encoder(turns, allowed)
        return replace(decision, latency_ms=(time.perf_counter() - started) * 1e3)

    def _by_encoder(self, turns: Sequence[str], allowed: Allowed) -> RouteDecision:
        vectors = self._encoder.vectors(turns)
        readings = [self._read(vector) for vector in vectors]
        last = readings[-1]
        silent = last.out_of_scope >= self._out_of_scope
        continued = silent and any(r.out_of_scope < self._out_of_scope for r in readings[:-1])
        probabilities = belief(readings, self._sticky)
        domain = next(iter(probabilities))
        likeliest = max(last.domains, key=lambda name: last.domains[name])
        stuck = continued or (len(readings) > 1 and domain != likeliest)
        choice = self._policy.choose(probabilities, continued or not silent, allowed)
        return RouteDecision(
            weights=choice.weights,
            confidence=probabilities[domain],
            domain=domain,
            source="sticky" if stuck and choice.source == "encoder" else choice.source,
            why=Why(
                domains=dict(list(probabilities.items())[:SHOWN_DOMAINS]),
                nearest=self._nearest(halves(vectors[-1])[1], last.domains),
                out_of_scope=last.out_of_scope,
            ),
            combine=choice.combine,
        )

    def _read(self, vector: NDArray[np.float32]) -> Reading:
        """Probabilities of the trained domains, and beside them of those known by examples."""
        card = self._artifact.card
        read, likeness = halves(vector)
        values: list[float] = calibrated(self._head.logits(read), card.temperature).tolist()
        outside = values[len(card.labels)] if len(values) > len(card.labels) else 0.0
        inside = max(1 - outside, TINY)
        odds = self._prototypes.odds(likeness) if self._prototypes else {}
        total = 1 + sum(odds.values())
        domains = {
            label: value / inside / total for label, value in zip(card.labels, values, strict=False)
        }
        for domain, odd in odds.items():
            domains[domain] = domains.get(domain, 0.0) + odd / total
        return Reading(domains, outside / total)

    def _nearest(
        self, vector: NDArray[np.float32], domains: Iterable[str]
    ) -> tuple[Neighbour, ...]:
        """Among the references, and the examples of the domains that come into question."""
        found = _most_similar(self._artifact.vectors, self._artifact.references, vector)
        for domain in domains:
            if domain in self._examples:
                found += _most_similar(*self._examples[domain], vector)
        found.sort(key=lambda neighbour: -neighbour.similarity)
        return tuple(found[:NEAREST])

    def _learn(self, examples: Mapping[str, Sequence[str]], encoder: Encoder) -> None:
        vectors = {domain: halves(encoder.encode(texts))[1] for domain, texts in examples.items()}
        domains = [reference.domain for reference in self._artifact.references]
        self._prototypes = Prototypes(vectors, self._artifact.vectors, domains)
        for domain, texts in examples.items():
            references = tuple(
                Reference(id=f"examples/{domain}#{index}", text=text, domain=domain)
                for index, text in enumerate(texts)
            )
            self._examples[domain] = (vectors[domain], references)


def _most_similar(
    vectors: NDArray[np.float32], references: Sequence[Reference], vector: NDArray[np.float32]
) -> list[Neighbour]:
    import numpy as np

    similarities = vectors @ vector
    some = min(NEAREST, len(similarities))
    nearest = np.argpartition(similarities, -some)[-some:] if some else np.arange(0)
    return [
        Neighbour(
            references[index].id,
            references[index].text,
            references[index].domain,
            float(similarities[index]),
        )
        for index in nearest.tolist()
    ]
