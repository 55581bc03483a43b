"""Who answers a chat request: an expert of the engine, or one behind HTTP."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from polymath.errors import ModelNotFound, NotAllowed, Overloaded, UpstreamFailed
from polymath.experts import (
    Engine,
    EngineSettings,
    Expert,
    ExpertSettings,
    build_catalog,
    load_models,
)
from polymath.gateway.completion import ChatCompletion
from polymath.gateway.failures import first_problem
from polymath.gateway.local_answers import LocalAnswers
from polymath.gateway.prepare import Prepared
from polymath.gateway.protocol import ChatRequest
from polymath.gateway.settings import ROUTED_MODELS
from polymath.proxy import (
    Answering,
    Body,
    Cascade,
    Events,
    Guided,
    Relay,
    RemoteScores,
    Upstream,
    text_of,
)
from polymath.router import Allowed, Message, RouteDecision, Router

logger = logging.getLogger(__name__)

__all__ = ["ChatService", "decide", "explicit", "open_engine", "open_service", "turns_of"]


CHECK_SECONDS = 10.0
"""An upstream that is slower at the start is checked when it is first asked."""


class ChatService:
    """The experts of a config, ready to answer.

    Args:
        catalog: experts by name; what is added to it can be asked at once.
        engine: None where no expert has a model here.
        known: upstreams that may be used again, if nothing about them has changed.

    Attributes:
        upstreams: those behind HTTP, by the expert's name.
    """

    def __init__(
        self,
        catalog: Mapping[str, Expert],
        router: Router,
        engine: Engine | None,
        settings: EngineSettings,
        fallback: str | None = None,
        known: Mapping[str, Upstream] | None = None,
    ) -> None:
        self.engine = engine
        self._fallback = fallback
        self._catalog = catalog
        self._router = router
        self.upstreams = {
            name: _same(known or {}, name, expert.settings) or Upstream(name, expert.settings)
            for name, expert in catalog.items()
            if expert.settings.kind == "upstream"
        }
        self._steered = dict(self._steered_upstreams())
        self.local = (
            None
            if engine is None
            else LocalAnswers(catalog, router, engine, settings, self._steered)
        )
        self._remote = dict(self._remote_experts())

    async def decide(
        self, body: Body, headers: Mapping[str, str], allowed: Allowed = None
    ) -> RouteDecision:
        """Who shall answer a request.

        Args:
            allowed: experts that may.
        Raises:
            ModelNotFound: nobody is called so.
            NotAllowed: the expert that is named may not answer.
        """
        if body["model"] in ROUTED_MODELS:
            return await self.routed(body, headers, allowed)
        return explicit(body["model"], self._catalog, allowed)

    async def routed(
        self, body: Body, headers: Mapping[str, str], allowed: Allowed = None
    ) -> RouteDecision:
        """What the router says of a request, whatever model it names."""
        turns, able = turns_of(body), _able(allowed, self._catalog)
        return await asyncio.to_thread(self._router.route, turns, headers, able)

    def fallback(self, decision: RouteDecision) -> RouteDecision:
        """The decision for the router's fallback in place of another."""
        name = self._fallback or decision.expert
        return replace(decision, weights={name: 1.0}, source="fallback", combine="select")

    def answering(self, decision: RouteDecision, allowed: Allowed = None) -> Answering:
        """Who answers as the router decided.

        Args:
            allowed: of the experts that stand in for one that fails, these alone are asked.
        """
        remote = self._remote.get(decision.expert)
        if isinstance(remote, Relay) and allowed is not None:
            return remote.within(allowed)
        if remote is not None:
            return remote
        if self.local is None:
            raise ModelNotFound(f"No model is loaded for {decision.expert!r}.", param="model")
        return LocalExpert(self.local, decision)

    def ask(self, name: str) -> Answering:
        """The expert of a name.

        Raises:
            ModelNotFound: there is none.
        """
        return self.answering(explicit(name, self._catalog))

    def cascade(self, name: str) -> Cascade:
        """An expert of kind `cascade`, for measurements.

        Raises:
            ModelNotFound: there is none of this name.
        """
        expert = self._remote.get(name)
        if not isinstance(expert, Cascade):
            raise ModelNotFound(f"There is no cascade {name!r}.", param="model")
        return expert

    async def close(self) -> None:
        """Close the connections and end the engine."""
        for upstream in self.upstreams.values():
            await upstream.close()
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)

    async def check_upstreams(self) -> None:
        """Make sure that upstreams that are steered cut texts as the local models do.

        Raises:
            ModelSourceError: one does not. One that cannot be asked now is checked when it is used.
        """
        for name, scores in self._steered.items():
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await scores.check()
            except (UpstreamFailed, Overloaded, TimeoutError) as error:
                logger.warning("the upstream of %s cannot be checked yet: %s", name, error)

    def _steered_upstreams(self) -> Iterator[tuple[str, RemoteScores]]:
        """By the name of the proxy-tuned expert."""
        for name, expert in self._catalog.items():
            settings = expert.settings
            upstream = self.upstreams.get(settings.large or "")
            if upstream is not None and self.engine is not None:
                base = self._catalog[str(settings.untuned)].settings.base_model
                local = self.engine.models[str(base)]
                yield name, RemoteScores(upstream, local, settings.support)

    def _remote_experts(self) -> Iterator[tuple[str, Answering]]:
        for name, expert in self._catalog.items():
            settings = expert.settings
            if settings.kind == "upstream":
                yield name, Relay(self.upstreams[name], settings, self.ask)
            elif settings.kind == "guided":
                yield name, Guided(settings, self.ask)
            elif settings.kind == "cascade":
                yield name, Cascade(settings, self.ask, self._confidence)

    async def _confidence(self, body: Body) -> float:
        decision = await asyncio.to_thread(self._router.route, turns_of(body))
        return decision.confidence


class LocalExpert:
    """An expert of the engine, or several that answer as one."""

    def __init__(self, answers: LocalAnswers, decision: RouteDecision) -> None:
        self._answers = answers
        self._decision = decision

    async def whole(self, body: Body) -> dict[str, Any]:
        request = _local_request(body)
        answer = await self._answers.start(request, self._decision)
        try:
            return await ChatCompletion(request, answer).whole()
        finally:
            answer.close()

    async def stream(self, body: Body) -> Events:
        request = _local_request(body)
        answer = await self._answers.start(request, self._decision)

        async def chunks() -> AsyncGenerator[dict[str, Any], None]:
            try:
                yield {}
                async for chunk in ChatCompletion(request, answer).chunks():
                    yield chunk
            finally:
                answer.close()

        events = chunks()
        await anext(events)  # from here on closing it ends the answer
        return events


def open_service(prepared: Prepared, catalog: dict[str, Expert] | None = None) -> ChatService:
    """Load the models of a config and start the engine; takes seconds.

    Args:
        catalog: the config's experts, if they are at hand; adapters loaded later are added to it.
    """
    settings = prepared.settings
    if catalog is None:
        catalog = build_catalog(settings.base_models, settings.experts)
    return ChatService(
        catalog, prepared.router, open_engine(prepared), settings.engine, settings.router.fallback
    )


def open_engine(prepared: Prepared) -> Engine | None:
    """Load the base models with their adapters and start the engine, if there are any."""
    settings = prepared.settings
    if not prepared.folders:
        return None
    models = load_models(prepared.folders, settings.base_models, settings.experts, settings.engine)
    return Engine(models, settings.engine)


def decide(
    model: str,
    messages: Sequence[Message],
    catalog: Mapping[str, Expert],
    router: Router,
    headers: Mapping[str, str] | None = None,
    allowed: Allowed = None,
) -> RouteDecision:
    """The router's decision for a routed model name; otherwise the expert that is named.

    Raises:
        ModelNotFound: no expert, base model or routed name is called so.
        NotAllowed: the expert that is named may not answer.
    """
    if model in ROUTED_MODELS:
        return router.route(messages, headers, _able(allowed, catalog))
    return explicit(model, catalog, allowed)


def explicit(name: str, catalog: Mapping[str, Expert], allowed: Allowed = None) -> RouteDecision:
    """The decision for an expert that is named.

    Raises:
        ModelNotFound: no expert or base model is called so.
        NotAllowed: it may not answer.
    """
    if allowed is not None and name not in allowed and name in catalog:
        raise NotAllowed(f"This API key does not have access to the model {name!r}.", param="model")
    expert = catalog.get(name)
    if expert is None:
        raise ModelNotFound(
            f"The model {name!r} does not exist. Available models: "
            f"{', '.join([ROUTED_MODELS[0], *(n for n in catalog if _may(n, allowed))])}.",
            param="model",
        )
    domain = expert.domains[0] if expert.domains else None
    return RouteDecision({name: 1.0}, confidence=1.0, domain=domain, source="explicit")


def _able(allowed: Allowed, catalog: Mapping[str, Expert]) -> Allowed:
    """The experts that may answer and are there.

    Raises:
        NotAllowed: there are none.
    """
    if allowed is None:
        return None
    able = frozenset(name for name in allowed if name in catalog)
    if not able:
        raise NotAllowed("This API key does not have access to any model.", param="model")
    return able


def _may(name: str, allowed: Allowed) -> bool:
    return allowed is None or name in allowed


def _same(known: Mapping[str, Upstream], name: str, settings: ExpertSettings) -> Upstream | None:
    upstream = known.get(name)
    return upstream if upstream is not None and upstream.settings == settings else None


def turns_of(body: Body) -> list[Message]:
    """The text of a conversation, as the router reads it."""
    return [
        {"role": str(message.get("role")), "content": text_of(message.get("content"))}
        for message in body["messages"]
    ]


def _local_request(body: Body) -> ChatRequest:
    """The request as the engine understands it.

    Raises:
        InvalidRequest: it has fields or values that the engine does not know.
    """
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise first_problem(error.errors(), ()) from None
