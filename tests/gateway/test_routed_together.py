"""An unsure router asks several experts: their distributions are one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from polymath.experts import Engine, EngineSettings, Posterior
from polymath.gateway import Answer, ChatRequest, ChatService
from polymath.gateway.app import Gateway
from polymath.router import Allowed, Combine, Message, RouteDecision

QUESTION = "Tom has 3 apples and buys 5 more. How many has he now?"
HALVES = {"general": 0.5, "math": 0.5}


class DecidedRouter:
    """Stands for a router: its decision is known beforehand."""

    def __init__(self, weights: Mapping[str, float], combine: Combine) -> None:
        self.headers: Mapping[str, str] | None = None
        self._decision = RouteDecision(weights, 0.5, None, "encoder", combine=combine)

    def route(
        self,
        messages: Sequence[Message],
        headers: Mapping[str, str] | None = None,
        allowed: Allowed = None,
    ) -> RouteDecision:
        self.headers = headers
        return self._decision


def service(gateway: Gateway, engine: Engine, router: DecidedRouter) -> ChatService:
    return ChatService(gateway.catalog, router, engine, EngineSettings())


def request(model: str = "polymath") -> ChatRequest:
    return ChatRequest.model_validate(
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 16,
        }
    )


async def text_of(answer: Answer) -> str:
    return "".join([chunk.text async for chunk in answer.completions[0]])


def answered(
    gateway: Gateway,
    engine: Engine,
    weights: Mapping[str, float],
    combine: Combine,
    model: str = "polymath",
) -> tuple[Answer, str]:
    async def ask() -> tuple[Answer, str]:
        chats = service(gateway, engine, DecidedRouter(weights, combine))
        decision = await chats.decide(request(model).model_dump(), {})
        answer = await chats.local.start(request(model), decision)
        return answer, await text_of(answer)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("weights", "combine", "expert"),
    [
        ({"general": 0.7, "math": 0.3}, "ensemble", "both"),
        (HALVES, "posterior", "posterior"),
        ({"math": 0.7, "general": 0.3}, "select", "math"),
    ],
)
def test_experts_that_a_router_combines_answer_as_the_ensemble_of_the_same_weights(
    gateway: Gateway, engine: Engine, weights: dict[str, float], combine: Combine, expert: str
) -> None:
    _, routed = answered(gateway, engine, weights, combine)
    _, configured = answered(gateway, engine, weights, combine, model=expert)
    assert routed == configured


def test_the_rows_of_an_answer_are_the_experts_of_the_decision(
    gateway: Gateway, engine: Engine
) -> None:
    answer, _ = answered(gateway, engine, HALVES, "posterior")
    assert answer.plan.names == ("general", "math")
    assert isinstance(answer.plan.combiner, Posterior)
    assert answer.expert.name == "general"


def test_an_expert_that_combines_others_is_left_out(gateway: Gateway, engine: Engine) -> None:
    weights = {"math": 0.4, "both": 0.3, "general": 0.3}
    answer, _ = answered(gateway, engine, weights, "ensemble")
    assert answer.plan.names == ("math", "general")


def test_one_that_combines_others_and_leads_answers_by_itself(
    gateway: Gateway, engine: Engine
) -> None:
    answer, _ = answered(gateway, engine, {"both": 0.6, "math": 0.4}, "ensemble")
    assert answer.plan.names == ("math", "general")
    assert answer.expert.name == "both"


def test_the_router_sees_the_headers_of_the_request(gateway: Gateway, engine: Engine) -> None:
    router = DecidedRouter(HALVES, "select")
    asyncio.run(
        service(gateway, engine, router).decide(request().model_dump(), {"x-team": "clinic"})
    )
    assert router.headers == {"x-team": "clinic"}
