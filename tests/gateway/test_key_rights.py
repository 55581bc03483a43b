"""What a key may do, over HTTP: whom it may ask, how often, for how much; and what is billed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.asking import DEFAULTS, ask, refusal, stream, streamed_text, text
from tests.gateway.running import CODING, LAW, MATH, Running, running, wait_for, write_config
from tests.proxy.stand_in import StandInServer, chunk, events, failing

EXPERTS = """\
cheap: {<<: *law, model: m-cheap, domains: [cheap], price: {input: 1, output: 1}}
  covered: {<<: *law, model: m-covered, domains: [covered], fallbacks: [cheap]}
"""
USAGE = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}}
COST = 0.009
"""Dollars of an answer of the stand-in: 3 tokens at 1000 a million, 2 at 3000."""
STREAM_COST = 0.09


@pytest.fixture(scope="module")
def only_gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("rights")
    config = write_config(folder, text_router, upstream, experts=EXPERTS)
    with running(config, upstream) as gate:
        gate.create_key("nobody's")
        yield gate


@pytest.fixture
def gate(only_gate: Running) -> Iterator[Running]:
    only_gate.server.forget()
    yield only_gate
    for one in only_gate.gateway.service.upstreams.values():
        one.servers[0].breaker.succeed()


def asked_for(gate: Running) -> list[str]:
    return [request.body["model"] for request in gate.server.requests]


def bill(gate: Running, name: str, expert: str) -> dict[str, Any]:
    row = gate.usage()[name, expert]
    return {what: row.get(what, 0) for what in ("prompt_tokens", "completion_tokens", "dollars")}


# --- who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Basic abc", "Bearer nonsense", "Bearer pm-0-0"]
)
def test_without_a_key_there_is_401(gate: Running, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    bodies = {
        "chat/completions": {"model": "law", "messages": LAW},
        "route": {"input": "Hi."},
        "feedback": {"id": "x", "thumbs": "up"},
    }
    for path, body in bodies.items():
        answer = httpx.post(f"{gate.url}/v1/{path}", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{gate.url}/v1/models", headers=headers).status_code == 401
    assert gate.server.requests == []


def test_a_wrong_secret_is_an_authentication_error_that_does_not_show_it(gate: Running) -> None:
    key = gate.create_key("own")
    wrong = key[:-4] + ("AAAA" if not key.endswith("AAAA") else "BBBB")
    error = refusal(gate.client(wrong))
    assert isinstance(error, openai.AuthenticationError)
    assert error.code == "invalid_api_key"
    assert "Incorrect API key provided" in error.message
    assert wrong[8:-6] not in error.response.text


def test_a_revoked_key_is_refused_at_once(gate: Running) -> None:
    key = gate.create_key("short-lived")
    assert text(ask(gate.client(key), model="law")) == "Hello."
    assert gate.admin("DELETE", "/keys/short-lived").status_code == 200
    error = refusal(gate.client(key), model="law")
    assert isinstance(error, openai.AuthenticationError)
    assert "revoked" in error.message


# --- whom it may ask -----------------------------------------------------------------------------


def test_a_forbidden_expert_is_never_routed_to_and_the_rest_is_renormalised(gate: Running) -> None:
    key, all_of_them = gate.create_key("two", experts=("coding", "math")), gate.create_key("all")

    def weights(key: str) -> dict[str, float]:
        body = {"input": LAW[0]["content"]}
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{gate.url}/v1/route", json=body, headers=headers)
        return dict(answer.raise_for_status().json()["weights"])

    full, kept = weights(all_of_them), weights(key)
    assert next(iter(full)) == "law"
    assert kept.keys() == {"coding", "math"}
    rest = full["coding"] + full["math"]
    assert kept == pytest.approx({name: full[name] / rest for name in kept})
    answer = ask(gate.client(key), model="polymath", messages=LAW)
    assert answer.model == max(kept, key=kept.__getitem__)
    assert (answer.model_extra or {})["polymath"]["weights"] == pytest.approx(kept)
    for messages in (LAW, CODING, MATH):
        gate.post({"messages": messages}, key)
    assert "m" not in asked_for(gate)


def test_an_expert_that_is_named_but_forbidden_is_a_permission_error(gate: Running) -> None:
    key = gate.create_key("two", experts=("coding", "math"))
    for error in (
        refusal(gate.client(key), model="law"),
        refusal(gate.client(key), model="law", stream=True),
    ):
        assert isinstance(error, openai.PermissionDeniedError)
        assert (error.code, error.param) == ("permission_denied", "model")
        assert "'law'" in error.message
    assert gate.server.requests == []


def test_the_models_of_a_key_are_those_that_it_may_ask(gate: Running) -> None:
    client = gate.client(gate.create_key("two", experts=("coding", "math")))
    assert [model.id for model in client.models.list()] == ["polymath", "coding", "math"]
    assert client.models.retrieve("coding").id == "coding"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("law")
    error = refusal(client, model="nobody")
    assert isinstance(error, openai.NotFoundError)
    assert "law" not in error.message


def test_a_fallback_that_is_forbidden_is_not_asked(gate: Running) -> None:
    key = gate.create_key("covered", experts=("covered",))
    for streaming in (False, True):
        gate.server.says(failing(500))
        error = refusal(gate.client(key), model="covered", stream=streaming)
        assert error.status_code == 502
    assert asked_for(gate) == ["m-covered"] * 2


def test_a_fallback_that_is_allowed_is_asked_and_billed_by_its_own_price(gate: Running) -> None:
    key = gate.create_key("both", experts=("covered", "cheap"))
    gate.server.says(failing(500))
    assert text(ask(gate.client(key), model="covered")) == "Hello."
    assert asked_for(gate) == ["m-covered", "m-cheap"]
    expected = {"prompt_tokens": 3, "completion_tokens": 2, "dollars": pytest.approx(5e-6)}
    assert bill(gate, "both", "cheap") == expected


@pytest.mark.parametrize("experts", [(), ("gone",)])
@pytest.mark.parametrize("model", ["polymath", "law"])
def test_a_key_of_whose_experts_none_is_there_may_ask_nobody(
    gate: Running, experts: tuple[str, ...], model: str
) -> None:
    error = refusal(gate.client(gate.create_key("none", experts=experts)), model=model)
    assert isinstance(error, openai.PermissionDeniedError)


# --- how often -----------------------------------------------------------------------------------


def test_requests_a_minute(gate: Running) -> None:
    client = gate.client(gate.create_key("slow", rpm=2))
    raw = client.chat.completions.with_raw_response
    left = []
    for _ in range(2):
        headers = raw.create(**{**DEFAULTS, "model": "law"}).headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-reset-requests"].endswith("s")
        left.append(headers["x-ratelimit-remaining-requests"])
    assert left == ["1", "0"]
    error = refusal(client, model="law")
    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert "requests per min (RPM): Limit 2" in error.message
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(gate.server.requests) == 2


def test_tokens_a_minute_count_as_they_were_used(gate: Running) -> None:
    client = gate.client(gate.create_key("wordy", tpm=1000))
    raw = client.chat.completions.with_raw_response
    given = {**DEFAULTS, "model": "law", "max_tokens": 900}
    first = raw.create(**given).headers
    assert int(first["x-ratelimit-remaining-tokens"]) < 100
    gate.usage()  # settled
    second = raw.create(**given).headers
    assert int(second["x-ratelimit-remaining-tokens"]) == int(
        first["x-ratelimit-remaining-tokens"]
    ) - (3 + 2)


def test_a_request_larger_than_the_limit_says_so(gate: Running) -> None:
    client = gate.client(gate.create_key("small", tpm=100))
    error = refusal(client, model="law", max_tokens=200)
    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "Request too large" in error.message
    assert "retry-after" not in error.response.headers


def test_requests_at_a_time(gate: Running) -> None:
    client = gate.client(gate.create_key("single", concurrent=1))
    end = threading.Event()
    gate.server.says(events(chunk("a"), end, chunk("b")))
    chunks = client.chat.completions.create(stream=True, **{**DEFAULTS, "model": "law"})
    next(chunks)
    error = refusal(client, model="law")
    assert isinstance(error, openai.RateLimitError)
    assert "concurrent requests: Limit 1" in error.message
    end.set()
    assert len(list(chunks)) == 1
    gate.usage()
    assert text(ask(client, model="law")) == "Hello."


@pytest.mark.parametrize(
    "given",
    [
        {"model": "nobody"},
        {"model": "polymath", "extra_body": {"timeout": -1}},
        {"model": "law", "extra_body": {"timeout": "soon"}},
    ],
)
def test_a_request_that_goes_wrong_gives_its_place_back(
    gate: Running, given: dict[str, Any]
) -> None:
    client = gate.client(gate.create_key("clumsy", concurrent=1))
    for _ in range(3):
        assert refusal(client, **given).status_code in (400, 404)
        gate.usage()
    assert text(ask(client, model="law")) == "Hello."


# --- for how much --------------------------------------------------------------------------------


def test_the_budget_counts_the_price_of_the_expert(gate: Running) -> None:
    client = gate.client(gate.create_key("poor", budget={"dollars": COST * 1.5}))
    for _ in range(2):
        ask(client, model="law")
        gate.usage()
    error = refusal(client, model="law")
    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert bill(gate, "poor", "law")["dollars"] == pytest.approx(2 * COST)
    assert len(gate.server.requests) == 2


def test_a_budget_of_nothing_buys_nothing(gate: Running) -> None:
    client = gate.client(gate.create_key("broke", budget={"dollars": 0, "period": "month"}))
    assert refusal(client, model="law").code == "insufficient_quota"
    assert gate.server.requests == []


def test_a_stream_is_billed_though_its_client_does_not_ask_for_the_usage(gate: Running) -> None:
    client = gate.client(gate.create_key("streams"))
    gate.server.says(events(chunk("a", usage=None), chunk("b"), {**chunk(""), **USAGE}))
    chunks = stream(client, model="law", extra_body={"stream_options": {"include_obfuscation": 0}})
    assert streamed_text(chunks) == "ab"
    assert all(one.choices for one in chunks)
    assert all("usage" not in one.model_fields_set for one in chunks)
    options = {"include_usage": True, "include_obfuscation": 0}
    assert gate.server.requests[0].body["stream_options"] == options
    expected = {"prompt_tokens": 30, "completion_tokens": 20}
    assert bill(gate, "streams", "law") == {**expected, "dollars": pytest.approx(STREAM_COST)}


def test_a_stream_shows_the_usage_to_a_client_that_asks_for_it(gate: Running) -> None:
    client = gate.client(gate.create_key("curious"))
    gate.server.says(events(chunk("a"), {**chunk(""), **USAGE}))
    chunks = stream(client, model="law", stream_options={"include_usage": True})
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 50


def test_a_stream_of_tool_calls_is_billed(gate: Running) -> None:
    client = gate.client(gate.create_key("tools"))
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    delta = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
    gate.server.says(events({**chunk(""), "choices": [delta]}, {**chunk(""), **USAGE}))
    stream(client, model="law")
    assert bill(gate, "tools", "law")["completion_tokens"] == 20
    assert gate.decisions()[0]["id"] == "chatcmpl-theirs"


@pytest.mark.parametrize("cut", [False, True])
def test_a_stream_of_unknown_usage_costs_a_token_for_each_piece(gate: Running, cut: bool) -> None:
    name = f"pieces-{cut}"
    client = gate.client(gate.create_key(name))
    end = threading.Event()
    gate.server.says(events(chunk("a"), chunk("b"), *([end] if cut else [])))
    chunks = client.chat.completions.create(stream=True, **{**DEFAULTS, "model": "law"})
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["a", "b"]
    chunks.close() if cut else list(chunks)
    wait_for(lambda: not gate.gateway.door.inside)
    end.set()
    found = bill(gate, name, "law")
    assert found["completion_tokens"] == 2
    assert found["prompt_tokens"] > 0
    assert gate.decisions()[0]["outcome"] == ("cancelled" if cut else "ok")


def test_a_failure_costs_nothing_and_is_told(gate: Running) -> None:
    client = gate.client(gate.create_key("unlucky"))
    for streaming in (False, True):
        gate.server.says(failing(500))
        assert refusal(client, model="law", stream=streaming).status_code == 502
    found = bill(gate, "unlucky", "law")
    assert found == {"prompt_tokens": 0, "completion_tokens": 0, "dollars": 0}
    assert [entry["outcome"] for entry in gate.decisions()[:2]] == ["upstream_error"] * 2


@pytest.mark.parametrize("options", ["yes", [1], {"include_usage": "yes"}, 7])
def test_odd_stream_options_are_the_upstreams_to_refuse(gate: Running, options: Any) -> None:
    gate.server.says(failing(400))
    body = {"model": "law", "stream": True, "stream_options": options}
    answer = gate.post(body, gate.create_key("odd"))
    assert answer.status_code == 400
    assert gate.gateway.door.inside == 0
