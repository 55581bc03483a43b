"""Two ways to know the clusters of a prompt: by its gradient, or by its words alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.errors import RouterArtifactError
from polymath.router.artifact import RouterArtifact
from polymath.router.calibration import calibrated
from polymath.router.cluster_artifact import ClusterArtifact
from polymath.router.conversation import user_turns
from polymath.router.decision import Message
from polymath.router.encoder import SentenceEncoder, halves
from polymath.router.gradient_router import ClusterReader, cluster_weights
from polymath.router.micro_batch import MicroBatcher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

__all__ = ["PromptFeatures", "distilled_reader", "gradient_reader"]

PromptFeatures = Callable[[Sequence[Message]], "Floats"]
"""A conversation -> its projected gradient, [dimensions], unit length."""


def gradient_reader(
    artifact: ClusterArtifact, features: PromptFeatures, temperature: float
) -> ClusterReader:
    """Reads the weights of the clusters from the prompt's gradient."""

    def read(messages: Sequence[Message]) -> Floats:
        weights: Floats = cluster_weights(
            features(messages)[None], artifact.centroids, temperature
        )[0]
        return weights

    return read


def distilled_reader(folder: Path, threads: int, labels: Sequence[str]) -> ClusterReader:
    """Guesses them from the words of the last user turn: a router folder that learned to.

    Raises:
        RouterArtifactError, ModelSourceError: the folder cannot be used.
    """
    artifact = RouterArtifact.load(folder)
    sentence_encoder = SentenceEncoder(folder, threads, artifact.card.max_tokens)
    width = sentence_encoder.dimensions // 2
    if artifact.card.labels != tuple(labels) or artifact.card.out_of_scope is not None:
        raise RouterArtifactError(f"{folder}: was not distilled from these clusters")
    if width != artifact.dimensions:
        raise RouterArtifactError(f"{folder}: head of {artifact.dimensions}, encoder of {width}")
    encoder, head = MicroBatcher(sentence_encoder), artifact.head

    def read(messages: Sequence[Message]) -> Floats:
        (vector,) = encoder.vectors(user_turns(messages, 1))
        logits = head.logits(halves(vector)[0])
        weights: Floats = calibrated(logits, artifact.card.temperature)
        return weights

    return read
