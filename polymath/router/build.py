"""The router that the config names."""

from collections.abc import Mapping, Sequence

from polymath.router.artifact import RouterArtifact
from polymath.router.decision import Router
from polymath.router.encoder import SentenceEncoder
from polymath.router.encoder_router import EncoderRouter
from polymath.router.policy import Policy
from polymath.router.rules import Rule
from polymath.router.settings import RouterSettings

__all__ = ["build_router"]


def build_router(
    settings: RouterSettings,
    owners: Mapping[str, str],
    examples: Mapping[str, Sequence[str]] | None = None,
) -> Router:
    """Load the router and its encoder.

    Args:
        owners: domain -> name of the expert that answers it.
        examples: domain -> prompts by which it is known without training.
    Raises:
        RouterArtifactError: the router folder cannot be used.
        ModelSourceError: the encoder in it cannot be used.
    """
    artifact = RouterArtifact.load(settings.path)
    encoder = SentenceEncoder(settings.path, settings.threads, artifact.card.max_tokens)
    policy = Policy(
        owners,
        settings.fallback,
        settings.min_confidence,
        settings.margin,
        settings.top_k,
        settings.combine,
    )
    rules = [Rule(rule) for rule in settings.rules]
    return EncoderRouter(
        artifact, encoder, policy, examples, rules, settings.sticky, settings.out_of_scope
    )
