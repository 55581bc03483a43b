"""What the endpoints share: the running generation of the config, the door, the records."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from polymath.errors import ModelNotFound, NotReady, PolymathError
from polymath.experts import Engine, EngineStats, Expert, ExpertSettings
from polymath.gateway import memory
from polymath.gateway.access import Access
from polymath.gateway.adapters import AdapterUpdates
from polymath.gateway.live import Live, open_live
from polymath.gateway.metrics import Metrics, Now
from polymath.gateway.overlay import Overlay
from polymath.gateway.prepare import Prepared
from polymath.gateway.records import AuditLog, DecisionLog, FeedbackLog
from polymath.gateway.report import Observer, Report
from polymath.gateway.service import ChatService
from polymath.gateway.settings import ROUTED_MODELS, Settings
from polymath.gateway.store import MemoryStore, RedisStore, Store
from polymath.gateway.tracing import Tracing
from polymath.gateway.visit import Door
from polymath.proxy import Upstream
from polymath.router import Router

__all__ = ["Gateway", "open_store"]

logger = logging.getLogger(__name__)
requests = logging.getLogger("polymath.requests")

FLUSH_SECONDS = 1.0


class Gateway:
    """The running gateway.

    Args:
        on_failure: called if the models cannot be loaded, so that the server can end.

    Attributes:
        door: lets chat requests in.
        added: adapters that were loaded at run time, by vLLM's endpoint.
        ready: whether the models are loaded and the changes of the admin API are in force.
    """

    def __init__(self, prepared: Prepared, on_failure: Callable[[], None] = lambda: None) -> None:
        self.prepared = prepared
        self.started = int(time.time())
        self.failure: Exception | None = None
        self.ready = False
        self.added: dict[str, ExpertSettings] = {}
        self._live: Live | None = None
        settings = prepared.settings
        self.store = open_store(settings)
        self.access = Access(self.store, settings.auth, settings.store_failure)
        self.overlay = Overlay(self.store)
        self.audit = AuditLog(self.store)
        self.feedback = FeedbackLog(self.store)
        self.decisions = DecisionLog(self.store, self._logs_prompts)
        self.tracing = self._tracing()
        self.metrics = Metrics(Now(self._stats, self._upstreams, lambda: self.door.inside))
        self.door = Door(self.access, self._observers())
        self._on_failure = on_failure
        self._generations: list[Live] = []
        self._retiring: set[asyncio.Task[None]] = set()
        self._flushing: asyncio.Task[None] | None = None

    @property
    def live(self) -> Live:
        """The generation that answers now.

        Raises:
            NotReady: the models are still loading.
        """
        if self._live is None:
            raise NotReady("The models are still loading; retry in a few seconds.")
        return self._live

    @property
    def settings(self) -> Settings:
        """Those that are in force."""
        return self.prepared.settings if self._live is None else self._live.settings

    @property
    def service(self) -> ChatService:
        """Answers requests. Raises NotReady as `live`."""
        return self.live.service

    @property
    def catalog(self) -> dict[str, Expert]:
        """Experts by name. Raises NotReady as `live`."""
        return self.live.catalog

    @property
    def router(self) -> Router:
        """Of the generation that answers now."""
        return self.prepared.router if self._live is None else self._live.router

    @property
    def engine(self) -> Engine:
        """Runs the decode groups.

        Raises:
            NotReady: the models are still loading, or there are none here.
        """
        engine = self.live.engine
        if engine is None:
            raise NotReady("No model is loaded here: all experts are upstreams.")
        return engine

    @property
    def updates(self) -> AdapterUpdates:
        """Adds and removes adapters. Raises NotReady as `engine`."""
        return AdapterUpdates(self.catalog, self.engine.models, self.added)

    async def load(self) -> None:
        """Load the models; the server answers probes meanwhile."""
        try:
            live = await asyncio.to_thread(open_live, self.prepared, self.store)
            self._generations.append(live)
            await live.service.check_upstreams()
            self._live = live
        except Exception as error:  # ends the server: `serve` prints it and exits non-zero
            logger.exception("the models cannot be loaded")
            self.failure = error
            self._on_failure()
            return
        self._flushing = asyncio.create_task(self._flush())
        memory.settle()

    async def swap(self, live: Live) -> None:
        """Answer with another generation; the old one ends with its last request.

        Raises:
            AdapterError: an adapter cannot be used; the old generation goes on.
        """
        self._generations.append(live)  # from here on nobody takes its adapters away
        try:
            await asyncio.to_thread(live.take_over, self._live)
        except BaseException:
            self._generations.remove(live)
            raise
        old, self._live = self._live, live
        self.prepared = live.prepared
        if old is not None:
            task = asyncio.create_task(self._retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def discard(self, live: Live) -> None:
        """Let go of a generation that never answered."""
        await live.let_go(self._generations)

    async def close(self) -> None:
        """Settle what is open, close the connections and end the engine."""
        if self._flushing is not None:
            self._flushing.cancel()
        await self.decisions.flush()
        await self.access.close()
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=FLUSH_SECONDS)
        if self._live is not None:
            await self._live.service.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        await self.store.close()

    def model_cards(self, allowed: Collection[str] | None = None) -> list[dict[str, Any]]:
        """`GET /v1/models`: the routed model, and the experts that may be asked."""
        names = [name for name in self.catalog if allowed is None or name in allowed]
        return [self.model_card(name) for name in (ROUTED_MODELS[0], *names)]

    def model_card(self, name: str, allowed: Collection[str] | None = None) -> dict[str, Any]:
        """One entry of `GET /v1/models`.

        Raises:
            ModelNotFound: there is no such model.
        """
        expert = self.catalog.get(name)
        if name in ROUTED_MODELS:
            about: dict[str, Any] = {
                "kind": "router",
                "description": "The router chooses the expert.",
            }
        elif expert is not None and (allowed is None or name in allowed):
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

    async def _retire(self, old: Live) -> None:
        await old.drained()
        self._generations.remove(old)
        await old.let_go(self._generations)
        memory.unsettle()

    def _tracing(self) -> Tracing | None:
        settings = self.settings.tracing
        return None if settings.endpoint is None else Tracing(settings, self._logs_prompts)

    def _logs_prompts(self) -> bool:
        return self.settings.server.log_prompts

    def _observers(self) -> list[Observer]:
        observers: list[Observer] = [
            self.metrics.observe,
            self.decisions.observe,
            self._log,
        ]
        return observers if self.tracing is None else [*observers, self.tracing]

    def _log(self, report: Report) -> None:
        fields = report.to_dict()
        if self._logs_prompts():
            fields["messages"] = report.prompt
        requests.info(
            "%s answered (%s, confidence %.2f): %s in %.3f s",
            report.expert,
            report.decision.source,
            report.decision.confidence,
            report.outcome,
            report.ended,
            extra={"fields": fields},
        )

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.decisions.flush()
            except PolymathError as error:
                logger.warning("decisions are not kept: %s", error.message)

    def _stats(self) -> EngineStats | None:
        engine = None if self._live is None else self._live.engine
        return None if engine is None else engine.stats()

    def _upstreams(self) -> dict[str, Upstream]:
        return {} if self._live is None else self._live.service.upstreams


def open_store(settings: Settings) -> Store:
    """The store that a config names.

    Raises:
        ConfigError: its URL cannot be read.
    """
    if settings.store == "memory":
        return MemoryStore(settings.state_dir)
    return RedisStore(settings.store)


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
