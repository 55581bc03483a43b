"""From a chat request to running decode groups: decide, plan, submit."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polymath.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from polymath.experts import (
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    Expert,
    Row,
    SamplingParams,
    Select,
    build_catalog,
    expert_row,
    load_models,
)
from polymath.gateway.prepare import Prepared
from polymath.gateway.protocol import ChatRequest
from polymath.gateway.settings import ROUTED_MODELS
from polymath.router import Message, RouteDecision, Router

__all__ = ["Answer", "ChatService", "decide", "open_service"]

SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that is being answered: who answers, and one running completion per choice."""

    decision: RouteDecision
    expert: Expert
    prompt_tokens: int
    completions: Sequence[Completion]

    def close(self) -> None:
        """Stop generating; to be called when the client has gone or has all it wants."""
        for completion in self.completions:
            completion.close()


class ChatService:
    """Answers chat requests with the experts of one engine."""

    def __init__(
        self,
        catalog: Mapping[str, Expert],
        router: Router,
        engine: Engine,
        settings: EngineSettings,
    ) -> None:
        self.engine = engine
        self._catalog = catalog
        self._router = router
        self._settings = settings

    async def answer(self, request: ChatRequest) -> Answer:
        """Route the request and start answering it.

        Raises:
            ModelNotFound, InvalidRequest, ContextLengthExceeded, Overloaded: as their names say.
        """
        decision, row = await asyncio.to_thread(self._decide_and_render, request)
        expert = self._catalog[decision.expert]
        sampling = self._sampling(request, expert, row)
        groups = [
            DecodeGroup((row,), Select(), _with_own_seed(sampling, index))
            for index in range(request.n)
        ]
        return Answer(decision, expert, len(row.prompt), self.engine.submit(groups))

    def _decide_and_render(self, request: ChatRequest) -> tuple[RouteDecision, Row]:
        messages: list[Message] = [*request.conversation()]
        decision = decide(request.model, messages, self._catalog, self._router)
        return decision, expert_row(self._catalog[decision.expert], self.engine.models, messages)

    def _sampling(self, request: ChatRequest, expert: Expert, row: Row) -> SamplingParams:
        """The request's values, else the expert's, else the defaults of OpenAI."""
        model = self.engine.models[row.base_model]
        self._check_request(request, len(model.vocabulary))
        chosen: dict[str, Any] = {
            name: _first(getattr(request, name), getattr(expert.sampling, name))
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "frequency_penalty",
                "presence_penalty",
            )
        }
        return SamplingParams(
            max_tokens=self._max_tokens(request, expert, len(row.prompt), model.context_length),
            stop=expert.sampling.stop if request.stop is None else request.stop,
            seed=request.seed,
            logit_bias=request.logit_bias,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def _check_request(self, request: ChatRequest, vocabulary: int) -> None:
        for token in request.logit_bias:
            if token >= vocabulary:
                raise InvalidRequest(
                    f"logit_bias: token {token} is not in the vocabulary of {vocabulary} tokens.",
                    param="logit_bias",
                )
        most = self._settings.max_num_seqs + self._settings.max_waiting
        if request.n > most:
            raise InvalidRequest(f"n: at most {most} choices are possible here.", param="n")

    def _max_tokens(self, request: ChatRequest, expert: Expert, prompt: int, context: int) -> int:
        if request.limit is not None:
            return request.limit
        if prompt >= context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, your messages "
                f"have {prompt} tokens. Please reduce the length of the messages.",
                param="messages",
            )
        return min(expert.sampling.max_tokens or self._settings.max_tokens, context - prompt)


def open_service(prepared: Prepared) -> ChatService:
    """Load the models of a config and start the engine; takes seconds."""
    settings = prepared.settings
    models = load_models(prepared.folders, settings.base_models, settings.experts, settings.engine)
    catalog = build_catalog(settings.base_models, settings.experts)
    engine = Engine(models, settings.engine)
    return ChatService(catalog, prepared.router, engine, settings.engine)


def decide(
    model: str, messages: Sequence[Message], catalog: Mapping[str, Expert], router: Router
) -> RouteDecision:
    """The router's decision for a routed model name; otherwise the expert that is named.

    Raises:
        ModelNotFound: no expert, base model or routed name is called so.
    """
    if model in ROUTED_MODELS:
        return router.route(messages)
    expert = catalog.get(model)
    if expert is None:
        raise ModelNotFound(
            f"The model {model!r} does not exist. Available models: "
            f"{', '.join([ROUTED_MODELS[0], *catalog])}.",
            param="model",
        )
    domain = expert.domains[0] if expert.domains else None
    return RouteDecision({model: 1.0}, confidence=1.0, domain=domain, source="explicit")


def _with_own_seed(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choice `index` of a request draws from its own seed, or all choices would be alike."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % SEEDS)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
