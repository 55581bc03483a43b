"""uvicorn around the gateway: listens, drains on SIGTERM, ends if the models cannot be loaded."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket

import uvicorn

from polymath.errors import ConfigError
from polymath.gateway.app import create_app
from polymath.gateway.gateway import Gateway, open_store
from polymath.gateway.http_protocol import limited_protocol
from polymath.gateway.json_logs import set_up_logging
from polymath.gateway.keys import KeyRing
from polymath.gateway.prepare import Prepared
from polymath.gateway.workers import Workers

__all__ = ["serve", "serve_on"]

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE = 75
"""Seconds that an idle connection is kept, as by nginx: longer than clients use theirs, or else a
request could meet a connection that is being closed."""


def serve(prepared: Prepared) -> None:
    """Run until SIGINT or SIGTERM; running answers get `shutdown_grace` seconds.

    Raises:
        ConfigError: the address cannot be listened on, or a model cannot be loaded.
    """
    settings = prepared.settings.server
    set_up_logging(settings.log_level, settings.log_format)
    asyncio.run(_check_open(prepared))
    listener = _listen(prepared)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d/v1", f"[{host}]" if ":" in host else host, port)
    if settings.workers > 1:
        Workers(prepared, listener, serve_on).serve()
    else:
        serve_on(prepared, listener)


def serve_on(prepared: Prepared, listener: socket.socket) -> None:
    """Run one process on a socket.

    Raises:
        ConfigError: a model cannot be loaded.
    """
    settings = prepared.settings.server
    set_up_logging(settings.log_level, settings.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to be reloaded
    gateway = Gateway(prepared, on_failure=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        create_app(gateway),
        http=limited_protocol(prepared.settings.limits),
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace)),
    )
    server = uvicorn.Server(config)
    server.run([listener])
    if gateway.failure is not None:
        raise ConfigError([f"the models cannot be loaded: {gateway.failure}"])


async def _check_open(prepared: Prepared) -> None:
    """Serve nobody but this machine without keys, unless the config says so.

    Raises:
        ConfigError: there are no keys, and others could reach the address.
    """
    settings = prepared.settings
    if settings.auth == "none" or _is_loopback(settings.server.host):
        return
    store = open_store(settings)
    try:
        protected = await KeyRing(store).any()
    finally:
        await store.close()
    if not protected:
        message = (
            f"{settings.server.host} can be reached by others, and there are no keys; make one "
            "(`polymath keys create --name NAME`), listen on 127.0.0.1, or say `auth: none`"
        )
        raise ConfigError([prepared.config.problem(("server", "host"), message)])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
