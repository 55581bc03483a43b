"""From a chat request to running decode groups: plan, submit."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from polymath.errors import ContextLengthExceeded, InvalidRequest, PolymathError
from polymath.experts import (
    Chunk,
    Combiner,
    DecodeGroup,
    Engine,
    EngineSettings,
    Expert,
    Mixture,
    Plan,
    Posterior,
    ProxyTuning,
    SamplingParams,
    WeightedLogits,
    plan_answer,
    plan_together,
)
from polymath.gateway.protocol import ChatRequest
from polymath.proxy import DraftLength, RemoteScores, SteeredAnswer
from polymath.router import Combine, Message, RouteDecision, Router

__all__ = ["Answer", "LocalAnswers", "RunningAnswer"]

SEEDS = 2**63

COMBINERS: Mapping[Combine, Callable[[tuple[float, ...]], Combiner]] = {
    "ensemble": Mixture,
    "posterior": Posterior,
    "logits": WeightedLogits,
}
"""By what the router says of experts that answer together."""


class RunningAnswer(Protocol):
    """Chunks of one choice as they are generated."""

    async def __anext__(self) -> Chunk: ...

    def close(self) -> None:
        """Stop generating."""
        ...

    def note(self) -> dict[str, Any]:
        """What there is to say of how it came about, when it is over."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that is being answered: who answers, and one running completion per choice."""

    decision: RouteDecision
    expert: Expert
    plan: Plan
    completions: Sequence[RunningAnswer]

    @property
    def prompt_tokens(self) -> int:
        """Of the first row; the others may have prompts of their own."""
        return len(self.plan.rows[0].prompt)

    def close(self) -> None:
        """Stop generating; to be called when the client has gone or has all it wants."""
        for completion in self.completions:
            completion.close()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that can be submitted."""

    decision: RouteDecision
    expert: Expert
    plan: Plan
    sampling: SamplingParams


class LocalAnswers:
    """Answers chat requests with the experts of one engine.

    Args:
        remotes: by the name of a proxy-tuned expert, the scores of the upstream that it steers.
    """

    def __init__(
        self,
        catalog: Mapping[str, Expert],
        router: Router,
        engine: Engine,
        settings: EngineSettings,
        remotes: Mapping[str, RemoteScores],
    ) -> None:
        self._remotes = remotes
        self._engine = engine
        self._catalog = catalog
        self._router = router
        self._settings = settings

    async def start(self, request: ChatRequest, decision: RouteDecision) -> Answer:
        """Start answering a request as the router decided.

        Raises:
            ModelNotFound, InvalidRequest, ContextLengthExceeded, Overloaded: as their names say.
        """
        prepared = await asyncio.to_thread(self._prepare, request, decision)
        groups = [
            DecodeGroup(
                prepared.plan.rows,
                prepared.plan.combiner,
                _with_own_seed(prepared.sampling, index),
                request.polymath.attribution,
            )
            for index in range(request.n)
        ]
        completions: Sequence[RunningAnswer]
        if prepared.plan.remote is None:
            completions = self._engine.submit(groups)
        else:
            completions = self._steer(prepared.expert, groups)
        return Answer(prepared.decision, prepared.expert, prepared.plan, completions)

    def _steer(self, expert: Expert, groups: Sequence[DecodeGroup]) -> list[SteeredAnswer]:
        """Answers of an upstream, each steered by two rows."""
        answers: list[SteeredAnswer] = []
        try:
            for group in groups:
                answers.append(self._steered(expert, group))
        except PolymathError:
            for answer in answers:
                answer.close()
            raise
        return answers

    def _steered(self, expert: Expert, group: DecodeGroup) -> SteeredAnswer:
        row = group.rows[1]
        tuned, untuned = self._engine.score_together(group.rows, group.sampling.max_tokens)
        return SteeredAnswer(
            self._remotes[expert.name],
            row.prompt,
            tuned,
            untuned,
            self._engine.models[row.base_model],
            group,
            DraftLength(expert.settings.draft),
        )

    def _prepare(self, request: ChatRequest, decision: RouteDecision) -> _Prepared:
        messages: list[Message] = [*request.conversation()]
        expert = self._catalog[decision.expert]
        plan = self._plan(decision, expert, messages)
        plan = _with_alpha(plan, request.polymath.alpha)
        return _Prepared(decision, expert, plan, self._sampling(request, expert, plan))

    def _plan(self, decision: RouteDecision, expert: Expert, messages: Sequence[Message]) -> Plan:
        catalog, models = self._catalog, self._engine.models
        weights = decision.weights
        if decision.combine != "select":
            rows = {name: w for name, w in weights.items() if catalog[name].settings.has_row}
            if decision.expert in rows and len(rows) > 1:
                combiner = COMBINERS[decision.combine]
                return plan_together(catalog, models, messages, rows, combiner)
        if decision.source == "explicit" and expert.settings.weighs_by_router:
            weights = self._router.route(messages).weights
        return plan_answer(expert, catalog, models, messages, weights)

    def _sampling(self, request: ChatRequest, expert: Expert, plan: Plan) -> SamplingParams:
        """The request's values, else the expert's, else the defaults of OpenAI."""
        models = [self._engine.models[row.base_model] for row in plan.rows]
        self._check_request(request, len(models[0].vocabulary))
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
        wanted = request.grammar
        longest = max(len(row.prompt) for row in plan.rows)
        context = min(model.context_length for model in models)
        return SamplingParams(
            max_tokens=self._max_tokens(request, expert, longest, context),
            stop=expert.sampling.stop if request.stop is None else request.stop,
            seed=request.seed,
            logit_bias=request.logit_bias,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            ignore_eos=request.ignore_eos,
            grammar=None if wanted is None else models[0].grammars.compile(wanted),
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


def _with_alpha(plan: Plan, alpha: float | None) -> Plan:
    """The plan with the alpha of the request, if it has one."""
    if alpha is None:
        return plan
    if not isinstance(plan.combiner, ProxyTuning):
        raise InvalidRequest(
            "polymath.alpha: this expert is not proxy-tuned.", param="polymath.alpha"
        )
    return replace(plan, combiner=ProxyTuning(alpha))


def _with_own_seed(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choice `index` of a request draws from its own seed, or all choices would be alike."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % SEEDS)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
