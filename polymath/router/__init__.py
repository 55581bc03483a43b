"""Prompt -> RouteDecision. Imports nothing of ours but errors and artifact folders."""

from polymath.router.artifact import CARD_FILE, Reference, RouterArtifact, RouterCard
from polymath.router.build import build_router
from polymath.router.calibration import calibrated
from polymath.router.cluster_artifact import (
    BASE_FOLDER,
    CLUSTERS_FILE,
    DISTILLED_FOLDER,
    ClusterArtifact,
    ClusterCard,
)
from polymath.router.cluster_readers import PromptFeatures, distilled_reader, gradient_reader
from polymath.router.decision import (
    Allowed,
    Combine,
    Message,
    Neighbour,
    RouteDecision,
    Router,
    Source,
    Why,
)
from polymath.router.embedder import Embedder, HasEmbedder
from polymath.router.encoder import (
    MAX_TOKENS,
    TOKENIZER_FILE,
    SentenceEncoder,
    halves,
    head_and_tail,
    open_tokenizer,
    token_ids,
)
from polymath.router.encoder_export import encoder_length, export_encoder, locate_encoder
from polymath.router.encoder_router import EncoderRouter
from polymath.router.fallback_router import FallbackRouter
from polymath.router.gradient_router import ClusterPolicy, GradientRouter, cluster_weights
from polymath.router.head import RouterHead
from polymath.router.hybrid_router import HybridRouter
from polymath.router.micro_batch import Encoder
from polymath.router.policy import Policy
from polymath.router.ruled_router import RuledRouter
from polymath.router.rules import Rule, RuleSettings
from polymath.router.settings import RouterSettings

__all__ = [
    "Allowed",
    "BASE_FOLDER",
    "CLUSTERS_FILE",
    "DISTILLED_FOLDER",
    "CARD_FILE",
    "TOKENIZER_FILE",
    "token_ids",
    "MAX_TOKENS",
    "ClusterArtifact",
    "ClusterCard",
    "ClusterPolicy",
    "Combine",
    "Embedder",
    "Encoder",
    "EncoderRouter",
    "FallbackRouter",
    "GradientRouter",
    "HasEmbedder",
    "HybridRouter",
    "Message",
    "Neighbour",
    "Policy",
    "PromptFeatures",
    "Reference",
    "RouteDecision",
    "Router",
    "RouterArtifact",
    "RouterCard",
    "RouterHead",
    "RouterSettings",
    "Rule",
    "RuledRouter",
    "RuleSettings",
    "SentenceEncoder",
    "Source",
    "Why",
    "build_router",
    "calibrated",
    "distilled_reader",
    "gradient_reader",
    "cluster_weights",
    "encoder_length",
    "export_encoder",
    "halves",
    "head_and_tail",
    "locate_encoder",
    "open_tokenizer",
]
