"""The router that the config names."""

from collections.abc import Mapping

from polymath.artifacts import Progress, no_progress
from polymath.router.artifact import RouterArtifact
from polymath.router.decision import Router
from polymath.router.encoder import SentenceEncoder, prepare_encoder
from polymath.router.encoder_router import EncoderRouter
from polymath.router.settings import RouterSettings

__all__ = ["build_router"]


def build_router(
    settings: RouterSettings, experts: Mapping[str, str], progress: Progress = no_progress
) -> Router:
    """Load the router and its encoder.

    Args:
        experts: domain -> name of the expert that answers it.
        progress: told when the encoder has to be exported first.
    Raises:
        RouterArtifactError: the router folder cannot be used.
        ModelSourceError: the encoder cannot be found or exported.
    """
    artifact = RouterArtifact.load(settings.path)
    folder = prepare_encoder(settings.encoder or artifact.card.encoder, progress)
    encoder = SentenceEncoder(folder, settings.threads)
    return EncoderRouter(artifact, encoder, experts, settings.fallback, settings.min_confidence)
