"""The router that the config names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polymath.errors import RouterArtifactError
from polymath.router.artifact import RouterArtifact
from polymath.router.cluster_artifact import DISTILLED_FOLDER, ClusterArtifact, ClusterCard
from polymath.router.cluster_readers import PromptFeatures, distilled_reader, gradient_reader
from polymath.router.decision import Router
from polymath.router.encoder import SentenceEncoder
from polymath.router.encoder_router import EncoderRouter
from polymath.router.fallback_router import FallbackRouter
from polymath.router.gradient_router import ClusterPolicy, GradientRouter
from polymath.router.hybrid_router import HybridRouter
from polymath.router.policy import Policy
from polymath.router.ruled_router import RuledRouter
from polymath.router.rules import Rule
from polymath.router.settings import RouterSettings

__all__ = ["build_router"]

OpenFeatures = Callable[[ClusterCard], PromptFeatures]
"""What the clusters were found by -> the gradients of prompts, for which a model is needed."""


def build_router(
    settings: RouterSettings,
    owners: Mapping[str, str],
    examples: Mapping[str, Sequence[str]] | None = None,
    open_features: OpenFeatures | None = None,
) -> Router:
    """Load the router and its encoder.

    Args:
        owners: domain -> name of the expert that answers it.
        examples: domain -> prompts by which it is known without training.
        open_features: needed for gradients, unless they are distilled.
    Raises:
        RouterArtifactError: a folder cannot be used.
        ModelSourceError: the encoder in it cannot be used.
    """
    clusters = settings.cluster_folder
    if settings.path is None:
        router: Router = FallbackRouter(settings.fallback)
    elif clusters is None:
        router = _encoder_router(settings, settings.path, owners, examples)
    else:
        try:
            router = _gradient_router(settings, clusters, owners, open_features)
        except RouterArtifactError as error:
            key = "clusters" if settings.kind == "hybrid" else "path"
            raise RouterArtifactError(error.message, param=error.param or key) from error
        if settings.kind == "hybrid":
            encoder = _encoder_router(settings, settings.path, owners, examples)
            router = HybridRouter(encoder, router, settings.share, settings.top_k + 1)
    rules = [Rule(rule) for rule in settings.rules]
    return RuledRouter(rules, router, owners) if rules else router


def _encoder_router(
    settings: RouterSettings,
    folder: Path,
    owners: Mapping[str, str],
    examples: Mapping[str, Sequence[str]] | None,
) -> EncoderRouter:
    artifact = RouterArtifact.load(folder)
    encoder = SentenceEncoder(folder, settings.threads, artifact.card.max_tokens)
    policy = Policy(
        owners,
        settings.fallback,
        settings.min_confidence,
        settings.margin,
        settings.top_k,
        settings.combine,
    )
    return EncoderRouter(
        artifact, encoder, policy, examples, settings.sticky, settings.out_of_scope
    )


def _gradient_router(
    settings: RouterSettings,
    folder: Path,
    owners: Mapping[str, str],
    open_features: OpenFeatures | None,
) -> GradientRouter:
    artifact = ClusterArtifact.load(folder)
    if settings.distil:
        read = distilled_reader(folder / DISTILLED_FOLDER, settings.threads, artifact.card.labels)
    else:
        if open_features is None:
            raise ValueError("gradients need a model")
        read = gradient_reader(artifact, open_features(artifact.card), settings.temperature)
    policy = ClusterPolicy(settings.fallback, owners, settings.base_weight, settings.top_k)
    return GradientRouter(read, artifact.card.labels, policy)
