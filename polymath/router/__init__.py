"""Prompt -> RouteDecision. Imports nothing of ours but errors and artifact folders."""

from polymath.router.artifact import CARD_FILE, Reference, RouterArtifact, RouterCard
from polymath.router.build import build_router
from polymath.router.decision import (
    Combine,
    Message,
    Neighbour,
    RouteDecision,
    Router,
    Source,
    Why,
)
from polymath.router.encoder import (
    MAX_TOKENS,
    TOKENIZER_FILE,
    SentenceEncoder,
    head_and_tail,
    open_tokenizer,
    token_ids,
)
from polymath.router.encoder_export import encoder_length, export_encoder, locate_encoder
from polymath.router.encoder_router import EncoderRouter, calibrated
from polymath.router.micro_batch import Encoder
from polymath.router.policy import Policy
from polymath.router.rules import Rule, RuleSettings
from polymath.router.settings import RouterSettings

__all__ = [
    "CARD_FILE",
    "TOKENIZER_FILE",
    "token_ids",
    "MAX_TOKENS",
    "Combine",
    "Encoder",
    "EncoderRouter",
    "Message",
    "Neighbour",
    "Policy",
    "Reference",
    "RouteDecision",
    "Router",
    "RouterArtifact",
    "RouterCard",
    "RouterSettings",
    "Rule",
    "RuleSettings",
    "SentenceEncoder",
    "Source",
    "Why",
    "build_router",
    "calibrated",
    "encoder_length",
    "export_encoder",
    "head_and_tail",
    "locate_encoder",
    "open_tokenizer",
]
