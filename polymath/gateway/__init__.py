"""The chat endpoint. Imports router, experts and proxy; never training."""

from polymath.gateway.config import ConfigFile, load_config, read_config
from polymath.gateway.local_answers import Answer
from polymath.gateway.prepare import Prepared, open_router, prepare
from polymath.gateway.protocol import ChatRequest
from polymath.gateway.schema import config_schema
from polymath.gateway.service import ChatService, decide, open_service
from polymath.gateway.settings import ROUTED_MODELS, ServerSettings, Settings

__all__ = [
    "ROUTED_MODELS",
    "Answer",
    "ChatRequest",
    "ChatService",
    "ConfigFile",
    "Prepared",
    "ServerSettings",
    "Settings",
    "config_schema",
    "decide",
    "load_config",
    "open_router",
    "open_service",
    "prepare",
    "read_config",
    "serve",
]


def serve(prepared: Prepared) -> None:
    """Run the HTTP server until it is told to stop (see `polymath.gateway.server`)."""
    from polymath.gateway.server import serve as run

    run(prepared)
