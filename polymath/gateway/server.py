"""uvicorn around the gateway: listens, drains on SIGTERM, ends if the models cannot be loaded."""

import logging
import os
import socket

import uvicorn

from polymath.errors import ConfigError
from polymath.gateway.app import Gateway, create_app
from polymath.gateway.prepare import Prepared

__all__ = ["serve"]

logger = logging.getLogger(__name__)

BACKLOG = 2048


def serve(prepared: Prepared) -> None:
    """Run until SIGINT or SIGTERM; running answers get `shutdown_grace` seconds.

    Raises:
        ConfigError: the address cannot be listened on, or a model cannot be loaded.
    """
    settings = prepared.settings.server
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("httpx", "httpcore", "hpack"):  # they log headers, in which keys may stand
        logging.getLogger(chatty).setLevel(logging.WARNING)
    listener = _listen(prepared)
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d/v1", f"[{host}]" if ":" in host else host, port)
    gateway = Gateway(prepared, on_failure=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        create_app(gateway),
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace)),
    )
    server = uvicorn.Server(config)
    server.run([listener])
    if gateway.failure is not None:
        raise ConfigError([f"the models cannot be loaded: {gateway.failure}"])


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _listen(prepared: Prepared) -> socket.socket:
    settings = prepared.settings.server
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        message = (
            f"cannot listen on {settings.host}:{settings.port} ({_reason(error)}); "
            "stop what listens there, or choose another port"
        )
        raise ConfigError([prepared.config.problem(("server", "port"), message)]) from error
