"""Black-box models: upstreams, steering, guidance, cascades. Imports experts alone."""

from polymath.proxy.answering import Answering, Ask, Body, Events
from polymath.proxy.cascade import Cascade
from polymath.proxy.circuit_breaker import BreakerState, CircuitBreaker
from polymath.proxy.draft_length import DraftLength
from polymath.proxy.guidance import Guided
from polymath.proxy.judges import Confidence, Reference, read_references
from polymath.proxy.messages import (
    FirstNoted,
    answer_text,
    events_of,
    noted,
    notes_of,
    text_of,
    wants_usage,
)
from polymath.proxy.relay import Relay
from polymath.proxy.remote_scores import RemoteScores, Scored
from polymath.proxy.steering import SteeredAnswer
from polymath.proxy.support import Support
from polymath.proxy.upstream import Upstream

__all__ = [
    "Answering",
    "Ask",
    "Body",
    "BreakerState",
    "Cascade",
    "CircuitBreaker",
    "Confidence",
    "DraftLength",
    "Events",
    "FirstNoted",
    "Guided",
    "Reference",
    "Relay",
    "RemoteScores",
    "Scored",
    "SteeredAnswer",
    "Support",
    "Upstream",
    "answer_text",
    "events_of",
    "noted",
    "notes_of",
    "read_references",
    "text_of",
    "wants_usage",
]
