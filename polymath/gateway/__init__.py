"""The chat endpoint. Imports router, experts and proxy; never training."""

from polymath.gateway.config import ConfigFile, load_config, read_config
from polymath.gateway.feedback import training_rows
from polymath.gateway.gateway import open_store
from polymath.gateway.keys import KeyRecord, KeyRing, read_budget
from polymath.gateway.local_answers import Answer
from polymath.gateway.prepare import Prepared, open_router, prepare
from polymath.gateway.protocol import ChatRequest
from polymath.gateway.records import AuditLog, FeedbackLog
from polymath.gateway.schema import config_schema
from polymath.gateway.service import ChatService, decide, open_service
from polymath.gateway.settings import ROUTED_MODELS, ServerSettings, Settings
from polymath.gateway.store import Store

__all__ = [
    "ROUTED_MODELS",
    "Answer",
    "AuditLog",
    "ChatRequest",
    "ChatService",
    "ConfigFile",
    "FeedbackLog",
    "KeyRecord",
    "KeyRing",
    "Prepared",
    "ServerSettings",
    "Settings",
    "Store",
    "config_schema",
    "decide",
    "load_config",
    "open_router",
    "open_service",
    "open_store",
    "prepare",
    "read_budget",
    "read_config",
    "training_rows",
    "serve",
]


def serve(prepared: Prepared) -> None:
    """Run the HTTP server until it is told to stop (see `polymath.gateway.server`)."""
    from polymath.gateway.server import serve as run

    run(prepared)
