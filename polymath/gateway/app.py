"""The HTTP endpoint: OpenAI's APIs, routing decisions, feedback, probes."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from polymath import __version__
from polymath.errors import NotReady, PolymathError
from polymath.gateway.access import ANYBODY
from polymath.gateway.admin import admin_routes
from polymath.gateway.completion import decision_headers
from polymath.gateway.completions_api import create_completion
from polymath.gateway.embeddings_api import create_embeddings
from polymath.gateway.endpoint import Shared, chat_id, entered, json_response
from polymath.gateway.failures import handle_failures
from polymath.gateway.feedback import FeedbackRequest, judged
from polymath.gateway.gateway import Gateway
from polymath.gateway.middleware import CLIENT_CLOSED_REQUEST, BodyLimit, Counted, RequestId
from polymath.gateway.protocol import (
    ChatBody,
    LoadAdapterRequest,
    RouteRequest,
    UnloadAdapterRequest,
)
from polymath.gateway.reload import Reloader
from polymath.gateway.responses_api import create_response
from polymath.gateway.service import decide
from polymath.gateway.streaming import EventStream, unless_disconnected
from polymath.gateway.strict_json import strict_json_route

__all__ = ["Gateway", "create_app"]

logger = logging.getLogger(__name__)

EXPOSED = [
    "retry-after",
    "x-request-id",
    *(f"x-polymath-{name}" for name in ("expert", "domain", "confidence", "source", "cache")),
    *(
        f"x-ratelimit-{what}-{name}"
        for what in ("limit", "remaining", "reset")
        for name in ("requests", "tokens")
    ),
]
"""Headers that web pages of other origins may read."""


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application of one gateway; its models load in the background."""
    settings = gateway.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.reloader = Reloader(gateway)
        running = asyncio.create_task(_run(gateway, app.state.reloader))
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await gateway.close()

    app = FastAPI(title="Polymath", version=__version__, lifespan=lifespan)
    app.router.route_class = strict_json_route(settings.limits.max_depth)
    app.state.gateway = gateway
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.server.max_body_bytes,
        max_header_bytes=settings.limits.max_header_bytes,
        seconds=settings.limits.receive_timeout,
    )
    if settings.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's own client sends a dozen
            expose_headers=EXPOSED,
        )
    app.add_middleware(RequestId)
    app.add_middleware(Counted, tell=gateway.metrics.observe_http)
    handle_failures(app)
    _add_endpoints(app)
    if settings.server.allow_runtime_lora_updating:
        app.post("/v1/load_lora_adapter", response_model=None)(load_lora_adapter)
        app.post("/v1/unload_lora_adapter", response_model=None)(unload_lora_adapter)
    if settings.server.admin_key is not None:
        app.include_router(admin_routes(settings.limits.max_depth))
    return app


async def _run(gateway: Gateway, reloader: Reloader) -> None:
    """Load the models, then reload when that is asked for."""
    with suppress(ValueError, RuntimeError, NotImplementedError):  # outside of the main thread
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(_hung_up(reloader)))
    await gateway.load()
    if gateway.failure is not None:
        return
    await reloader.start()
    gateway.ready = True
    logger.info("ready: %s", ", ".join(gateway.catalog))
    await reloader.watch()


async def _hung_up(reloader: Reloader) -> None:
    try:
        await reloader.reload("SIGHUP")
    except PolymathError as error:
        logger.error("the config is as it was: %s", error.message)


def _add_endpoints(app: FastAPI) -> None:
    app.post("/v1/chat/completions", response_model=None)(chat_completions)
    app.post("/v1/completions", response_model=None)(create_completion)
    app.post("/v1/responses", response_model=None)(create_response)
    app.post("/v1/embeddings", response_model=None)(create_embeddings)
    app.post("/v1/route", response_model=None)(route)
    app.post("/v1/feedback", response_model=None)(feedback)
    app.get("/v1/models", response_model=None)(list_models)
    app.get("/v1/models/{name:path}", response_model=None)(retrieve_model)
    app.get("/metrics", response_model=None)(metrics)
    app.get("/healthz", response_model=None)(healthz)
    app.get("/readyz", response_model=None)(readyz)


async def chat_completions(body: ChatBody, request: Request, gateway: Shared) -> Response:
    """Answer a conversation, whole or as a stream."""
    visit = await entered(gateway, body.model_dump(), request)
    if body.stream:
        events = await unless_disconnected(request.receive, visit.stream())
        if events is not None:
            return EventStream(events, visit.headers)
    else:
        whole = await unless_disconnected(request.receive, visit.whole())
        if whole is not None:
            return json_response(whole, headers=visit.headers)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def route(body: RouteRequest, request: Request, gateway: Shared) -> Response:
    """The decision alone, without generation."""
    key = await gateway.access.authenticate(request.headers.get("authorization"))
    decision = await asyncio.to_thread(
        decide,
        body.model,
        body.conversation(),
        gateway.catalog,
        gateway.router,
        request.headers,
        None if key is None else key.allowed,
    )
    return json_response(decision.to_dict(), headers=decision_headers(decision))


async def feedback(body: FeedbackRequest, request: Request, gateway: Shared) -> Response:
    """What a client thinks of an answer: the expert that would have been right, or thumbs."""
    key = await gateway.access.authenticate(request.headers.get("authorization"))
    owner = ANYBODY if key is None else key.id
    decision = await gateway.decisions.find(chat_id(body.id), owner)
    keeps_prompt = key is None or key.keep_prompts
    entry = judged(body, decision, owner, keeps_prompt, gateway.catalog, time.time())
    await gateway.feedback.write(entry)
    return json_response(
        {"object": "feedback", "id": body.id, "stored_prompt": "messages" in entry}
    )


async def list_models(request: Request, gateway: Shared) -> Response:
    """Experts, base models and the routed model."""
    key = await gateway.access.authenticate(request.headers.get("authorization"))
    cards = gateway.model_cards(None if key is None else key.allowed)
    return json_response({"object": "list", "data": cards})


async def retrieve_model(name: str, request: Request, gateway: Shared) -> Response:
    """One model."""
    key = await gateway.access.authenticate(request.headers.get("authorization"))
    return json_response(gateway.model_card(name, None if key is None else key.allowed))


async def load_lora_adapter(
    body: LoadAdapterRequest, request: Request, gateway: Shared
) -> Response:
    """Make an adapter folder an expert."""
    await gateway.access.authenticate(request.headers.get("authorization"))
    await asyncio.to_thread(gateway.updates.load, body)
    return json_response({"status": "loaded", "lora_name": body.lora_name})


async def unload_lora_adapter(
    body: UnloadAdapterRequest, request: Request, gateway: Shared
) -> Response:
    """Forget an adapter that was loaded at run time."""
    await gateway.access.authenticate(request.headers.get("authorization"))
    gateway.updates.unload(body.lora_name)
    return json_response({"status": "unloaded", "lora_name": body.lora_name})


async def metrics(gateway: Shared) -> Response:
    """What is counted, for Prometheus."""
    return gateway.metrics.response()


async def healthz() -> Response:
    """The process is alive."""
    return json_response({"status": "alive"})


async def readyz(gateway: Shared) -> Response:
    """Whether this replica answers as it should."""
    if gateway.ready:
        return json_response({"status": "ready"})
    return json_response({"status": "loading"}, status=NotReady.status)
