"""The HTTP endpoint: OpenAI's chat completions and models, routing decisions, probes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, Request
from starlette.responses import Response

from polymath import __version__
from polymath.errors import ModelNotFound, NotReady
from polymath.experts import Engine, Expert, build_catalog
from polymath.gateway.adapters import AdapterUpdates
from polymath.gateway.completion import ExplainedEvents, decision_headers, explained
from polymath.gateway.failures import handle_failures
from polymath.gateway.metrics import metrics_response
from polymath.gateway.middleware import BodyLimit, RequestId
from polymath.gateway.prepare import Prepared
from polymath.gateway.protocol import (
    ChatBody,
    LoadAdapterRequest,
    RouteRequest,
    UnloadAdapterRequest,
)
from polymath.gateway.service import ChatService, decide, open_service
from polymath.gateway.settings import ROUTED_MODELS
from polymath.gateway.streaming import EventStream, unless_disconnected
from polymath.gateway.strict_json import StrictJsonRoute

__all__ = ["Gateway", "create_app"]

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; nobody sees it but the log."""


class Gateway:
    """What the endpoints share: the experts, the router and, once loaded, the engine.

    Args:
        on_failure: called if the models cannot be loaded, so that the server can end.
    """

    def __init__(self, prepared: Prepared, on_failure: Callable[[], None] = lambda: None) -> None:
        settings = prepared.settings
        self.catalog = build_catalog(settings.base_models, settings.experts)
        self.router = prepared.router
        self.max_body_bytes = settings.server.max_body_bytes
        self.started = int(time.time())
        self.failure: Exception | None = None
        self._prepared = prepared
        self._on_failure = on_failure
        self._service: ChatService | None = None
        self._updates: AdapterUpdates | None = None
        self.allow_updates = settings.server.allow_runtime_lora_updating

    @property
    def ready(self) -> bool:
        """Whether the models are loaded."""
        return self._service is not None

    @property
    def engine(self) -> Engine:
        """Runs the decode groups.

        Raises:
            NotReady: the models are still loading.
        """
        return self.service.engine

    @property
    def service(self) -> ChatService:
        """Answers requests.

        Raises:
            NotReady: the models are still loading.
        """
        if self._service is None:
            raise NotReady("The models are still loading; retry in a few seconds.")
        return self._service

    @property
    def updates(self) -> AdapterUpdates:
        """Adds and removes adapters.

        Raises:
            NotReady: the models are still loading.
        """
        if self._updates is None:
            self._updates = AdapterUpdates(self.catalog, self.engine.models)
        return self._updates

    async def load(self) -> None:
        """Load the models; the server answers probes meanwhile."""
        try:
            service = await asyncio.to_thread(open_service, self._prepared, self.catalog)
            await service.check_upstreams()
            self._service = service
        except Exception as error:  # ends the server: `serve` prints it and exits non-zero
            logger.exception("the models cannot be loaded")
            self.failure = error
            self._on_failure()
            return
        logger.info("ready: %s", ", ".join(self.catalog))

    async def close(self) -> None:
        """Close the connections to upstreams and end the engine."""
        if self._service is not None:
            await self._service.close()

    def model_card(self, name: str) -> dict[str, Any]:
        """One entry of `GET /v1/models`.

        Raises:
            ModelNotFound: there is no such model.
        """
        if name in ROUTED_MODELS:
            about: dict[str, Any] = {
                "kind": "router",
                "description": "The router chooses the expert.",
            }
        elif (expert := self.catalog.get(name)) is not None:
            about = _about(expert)
        else:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "polymath",
            "polymath": about,
        }


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application of one gateway; its models load in the background."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(gateway.load())
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
        await gateway.close()

    app = FastAPI(title="Polymath", version=__version__, lifespan=lifespan)
    app.router.route_class = StrictJsonRoute
    app.state.gateway = gateway
    app.add_middleware(BodyLimit, max_bytes=gateway.max_body_bytes)
    app.add_middleware(RequestId)
    handle_failures(app)
    _add_endpoints(app)
    if gateway.allow_updates:
        app.post("/v1/load_lora_adapter", response_model=None)(load_lora_adapter)
        app.post("/v1/unload_lora_adapter", response_model=None)(unload_lora_adapter)
    return app


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


Shared = Annotated[Gateway, Depends(_gateway)]


def _add_endpoints(app: FastAPI) -> None:
    app.post("/v1/chat/completions", response_model=None)(chat_completions)
    app.post("/v1/route", response_model=None)(route)
    app.get("/v1/models", response_model=None)(list_models)
    app.get("/v1/models/{name:path}", response_model=None)(retrieve_model)
    app.get("/metrics", response_model=None)(metrics)
    app.get("/healthz", response_model=None)(healthz)
    app.get("/readyz", response_model=None)(readyz)


async def chat_completions(body: ChatBody, request: Request, gateway: Shared) -> Response:
    """Answer a conversation, whole or as a stream."""
    service, asked = gateway.service, body.model_dump()
    decision = await asyncio.to_thread(service.decide, asked, request.headers)
    logger.info(
        "%s answers (%s, confidence %.2f) for user %s, metadata %s",
        decision.expert,
        decision.source,
        decision.confidence,
        asked.get("user"),
        asked.get("metadata"),
    )
    headers, expert = decision_headers(decision), service.answering(decision)
    if body.stream:
        events = await unless_disconnected(request.receive, expert.stream(asked))
        if events is not None:
            return EventStream(ExplainedEvents(events, decision), headers)
    else:
        whole = await unless_disconnected(request.receive, expert.whole(asked))
        if whole is not None:
            return _json(explained(whole, decision), headers=headers)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def route(body: RouteRequest, request: Request, gateway: Shared) -> Response:
    """The decision alone, without generation."""
    decision = await asyncio.to_thread(
        decide, body.model, body.conversation(), gateway.catalog, gateway.router, request.headers
    )
    return _json(decision.to_dict(), headers=decision_headers(decision))


async def list_models(gateway: Shared) -> Response:
    """Experts, base models and the routed model."""
    names = [ROUTED_MODELS[0], *gateway.catalog]
    return _json({"object": "list", "data": [gateway.model_card(name) for name in names]})


async def retrieve_model(name: str, gateway: Shared) -> Response:
    """One model."""
    return _json(gateway.model_card(name))


async def load_lora_adapter(body: LoadAdapterRequest, gateway: Shared) -> Response:
    """Make an adapter folder an expert."""
    await asyncio.to_thread(gateway.updates.load, body)
    return _json({"status": "loaded", "lora_name": body.lora_name})


async def unload_lora_adapter(body: UnloadAdapterRequest, gateway: Shared) -> Response:
    """Forget an adapter that was loaded at run time."""
    gateway.updates.unload(body.lora_name)
    return _json({"status": "unloaded", "lora_name": body.lora_name})


async def metrics(gateway: Shared) -> Response:
    """What the engine counts, for Prometheus."""
    return metrics_response(gateway.engine.stats, gateway.service.upstreams)


async def healthz() -> Response:
    """The process is alive."""
    return _json({"status": "alive"})


async def readyz(gateway: Shared) -> Response:
    """The models are loaded."""
    if gateway.ready:
        return _json({"status": "ready"})
    return _json({"status": "loading"}, status=NotReady.status)


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def _about(expert: Expert) -> dict[str, Any]:
    settings = expert.settings
    return {
        "kind": settings.kind,
        "description": settings.description,
        "base_model": settings.base_model,
        "members": [*settings.parts(), *settings.helpers()],
        "domains": list(expert.domains),
        "price": settings.price.model_dump() if settings.price else None,
    }
