"""The other endpoints: models, routing decisions, probes, and what no endpoint answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from openai import NotFoundError, OpenAI

from polymath.gateway import Prepared
from polymath.gateway.app import Gateway, create_app
from tests.conftest import COMBINED, EXPERTS


def test_models_lists_the_router_the_experts_and_the_bases(client: OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["polymath", *EXPERTS, *COMBINED, "smollm2"]


def test_every_listed_model_can_be_retrieved(client: OpenAI) -> None:
    for model in client.models.list():
        assert client.models.retrieve(model.id) == model


def test_an_unknown_model_cannot_be_retrieved(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="chemistry"):
        client.models.retrieve("chemistry")


def test_route_gives_the_decision_without_generation(base_url: str, gateway: Gateway) -> None:
    text = "A shop sells 3 pens for 2 dollars. How much do 12 pens cost?"
    answer = httpx.post(f"{base_url}/v1/route", json={"input": text})
    decision = answer.json()
    assert decision["expert"] == "math"
    assert answer.headers["x-polymath-expert"] == "math"
    assert gateway.engine.active == 0


def test_route_takes_a_conversation_and_an_explicit_model(base_url: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "law", "messages": messages}
    decision = httpx.post(f"{base_url}/v1/route", json=body).json()
    assert (decision["expert"], decision["source"], decision["confidence"]) == (
        "law",
        "explicit",
        1.0,
    )


@pytest.mark.parametrize(
    "body", [{}, {"input": "x", "messages": [{"role": "user", "content": "x"}]}]
)
def test_route_wants_either_a_conversation_or_an_input(
    base_url: str, body: dict[str, object]
) -> None:
    assert httpx.post(f"{base_url}/v1/route", json=body).status_code == 400


def test_probes(base_url: str) -> None:
    assert httpx.get(f"{base_url}/healthz").json() == {"status": "alive"}
    assert httpx.get(f"{base_url}/readyz").json() == {"status": "ready"}


def test_an_unknown_path_and_a_wrong_method_are_openai_errors(base_url: str) -> None:
    for answer, status in (
        (httpx.get(f"{base_url}/v2/nothing"), 404),
        (httpx.get(f"{base_url}/v1/chat/completions"), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_every_answer_has_a_request_id(base_url: str) -> None:
    given = httpx.get(f"{base_url}/healthz", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = httpx.get(f"{base_url}/healthz")
    assert made.headers["x-request-id"].startswith("req_")


async def test_before_the_models_are_loaded_probes_answer_and_chats_do_not(demo: Prepared) -> None:
    loading = Gateway(demo)
    transport = httpx.ASGITransport(create_app(loading))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        health, ready, chat = await asyncio.gather(
            client.get("/healthz"),
            client.get("/readyz"),
            client.post(
                "/v1/chat/completions",
                json={"model": "math", "messages": [{"role": "user", "content": "x"}]},
            ),
        )
    assert health.status_code == 200
    assert ready.status_code == chat.status_code == 503
    assert chat.headers["retry-after"] == "1"
    assert chat.json()["error"]["code"] == "not_ready"


async def test_a_model_that_cannot_be_loaded_ends_the_server(
    demo: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ended: list[bool] = []
    empty = tmp_path_factory.mktemp("empty")
    broken = Gateway(replace(demo, folders={"smollm2": empty}), lambda: ended.append(True))
    await broken.load()
    assert ended == [True]
    assert broken.failure is not None
    assert not broken.ready
