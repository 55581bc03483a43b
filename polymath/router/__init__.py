"""Prompt -> RouteDecision. Imports nothing of ours but errors and artifact folders."""

from polymath.router.artifact import Reference, RouterArtifact, RouterCard
from polymath.router.build import build_router
from polymath.router.decision import Message, Neighbour, RouteDecision, Router, Source, Why
from polymath.router.encoder import SentenceEncoder, prepare_encoder
from polymath.router.encoder_router import Encoder, EncoderRouter, calibrated
from polymath.router.settings import RouterSettings

__all__ = [
    "Encoder",
    "EncoderRouter",
    "Message",
    "Neighbour",
    "Reference",
    "RouteDecision",
    "Router",
    "RouterArtifact",
    "RouterCard",
    "RouterSettings",
    "SentenceEncoder",
    "Source",
    "Why",
    "build_router",
    "calibrated",
    "prepare_encoder",
]
