"""Experts behind HTTP, end to end: the official client, a gateway, and a server that stands in."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from polymath.gateway import load_config, prepare
from polymath.gateway.app import Gateway
from polymath.proxy.circuit_breaker import FAILURES
from tests.conftest import serving
from tests.gateway.asking import DEFAULTS, ask, refusal, stream, streamed_text, text, user
from tests.gateway.test_gradient_routing import TEXTS, write_text_router
from tests.gateway.test_server import ADDRESS, COMMAND
from tests.proxy.stand_in import (
    HANG,
    Reply,
    StandInServer,
    chunk,
    completion,
    events,
    failing,
    sends,
    unused_port,
)
from tests.router.conftest import write_tiny_bert

KEY = "sk-the-key-of-the-gateway"
SURE, UNSURE = "-1000", "0"
"""Thresholds that the tiny model always and never reaches."""

CONFIG = """\
base_models:
  tiny: {model: TINY}
experts:
  local: {kind: base, base_model: tiny, domains: [coding, math]}
  big: &big
    kind: upstream
    api_base: URL
    api_key: KEY
    model: their-model
    num_retries: 0
    timeout: 5
  hasty: {<<: *big, timeout: 0.2}
  patient: {<<: *big, num_retries: 2}
  lawyer: {<<: *big, domains: [law]}
  covered: {<<: *big, fallbacks: [local]}
  dead: {<<: *big, api_base: DEAD}
  background: {kind: guided, guide: local, upstream: big, guide_tokens: 4}
  read-here: {kind: guided, guide: big, upstream: local}
  thrifty: {kind: cascade, cheap: local, strong: big, judge: {kind: logprob, threshold: SURE}}
  strict: {kind: cascade, cheap: local, strong: big, judge: {kind: logprob, threshold: UNSURE}}
  by-domain: {kind: cascade, cheap: local, strong: big, judge: {kind: difficulty, threshold: 0}}
router: {path: router, fallback: local, min_confidence: 0}
engine: {backend: torch, dtype: float32}
"""

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def config(
    upstream: StandInServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("upstreams")
    bert = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    write_text_router(bert, root / "router", ("law", "coding", "math"))
    values = {
        "TINY": str(tiny_model),
        "URL": upstream.url,
        "DEAD": f"http://127.0.0.1:{unused_port()}/v1",
        "UNSURE": UNSURE,
        "SURE": SURE,
        "KEY": KEY,
    }
    content = re.sub("|".join(values), lambda match: values[match[0]], CONFIG)
    (root / "polymath.yaml").write_text(content)
    return root / "polymath.yaml"


@pytest.fixture(scope="module")
def gateway(config: Path) -> Gateway:
    return Gateway(prepare(load_config(config, {})))


@pytest.fixture(scope="module")
def base_url(gateway: Gateway) -> Iterator[str]:
    with serving(gateway) as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="the-client's", max_retries=0, timeout=20)


@pytest.fixture
def server(upstream: StandInServer, gateway: Gateway, base_url: str) -> Iterator[StandInServer]:
    """The stand-in; after the test nothing is outstanding, and the breakers are closed again."""
    upstream.forget()
    yield upstream
    deployments = [one for up in gateway.service.upstreams.values() for one in up.servers]
    wait_for(lambda: not any(one.outstanding for one in deployments))
    for one in deployments:
        one.breaker.succeed()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def notes(answer: Any) -> dict[str, Any]:
    return dict((answer.model_extra or {})["polymath"])


# --- there and back ------------------------------------------------------------------------------


def test_a_request_goes_to_the_upstream_untouched(client: OpenAI, server: StandInServer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Add."}, PICTURE]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    given = {
        "messages": messages,
        "tools": [TOOL],
        "tool_choice": "auto",
        "temperature": 1.5,
        "reasoning_effort": "low",
        "parallel_tool_calls": False,
    }
    ask(client, model="big", **given, extra_body={"their_own": {"deep": [1, None, 2.5]}})
    (request,) = server.requests
    expected = {**DEFAULTS, **given, "their_own": {"deep": [1, None, 2.5]}}
    assert request.body == {**expected, "model": "their-model", "stream": False}
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert "the-client's" not in str(request.headers)


def test_an_answer_comes_back_untouched(client: OpenAI, server: StandInServer) -> None:
    reply = completion(None, tool_calls=[CALL], reasoning_content="Hm.", odd={"a": [1, None]})
    server.says(reply)
    raw = client.chat.completions.with_raw_response.create(**{**DEFAULTS, "model": "big"})
    answer, sent = raw.http_response.json(), httpx.Response(200, content=reply.pieces[0]).json()
    assert {**answer, "model": sent["model"]} == {**sent, "polymath": answer["polymath"]}
    assert answer["model"] == "big"
    assert raw.parse().usage.total_tokens == 5
    assert raw.parse().choices[0].message.tool_calls[0].function.name == "add"


def test_the_decision_stands_in_headers_and_answer(client: OpenAI, server: StandInServer) -> None:
    raw = client.chat.completions.with_raw_response.create(**{**DEFAULTS, "model": "big"})
    assert raw.headers["x-polymath-expert"] == notes(raw.parse())["expert"] == "big"
    assert raw.headers["x-polymath-source"] == notes(raw.parse())["source"] == "explicit"


def test_the_router_may_choose_an_upstream(client: OpenAI, server: StandInServer) -> None:
    answer = ask(client, model="polymath", messages=[user(TEXTS[0])])
    assert (answer.model, text(answer)) == ("lawyer", "Hello.")
    assert notes(answer)["domain"] == "law"
    assert server.requests[0].body["model"] == "their-model"


@pytest.mark.parametrize("theirs", [None, "text", [1], {"expert": "mallory", "source": "forged"}])
def test_an_upstream_cannot_say_who_answered(
    client: OpenAI, server: StandInServer, theirs: Any
) -> None:
    message = {"role": "assistant", "content": "Hi."}
    server.says(sends({"id": "1", "choices": [{"message": message}], "polymath": theirs}))
    server.says(events(chunk("Hi.", polymath=theirs)))
    whole, (first, *_) = ask(client, model="big"), stream(client, model="big")
    assert notes(whole)["expert"] == notes(first)["expert"] == "big"
    assert notes(whole)["source"] == notes(first)["source"] == "explicit"


def test_a_stream_comes_back_untouched_but_for_its_model(
    client: OpenAI, server: StandInServer
) -> None:
    delta = {"tool_calls": [{"index": 0, **CALL}], "reasoning_content": "Hm."}
    call = {"id": "1", "choices": [{"index": 0, "delta": delta}], "odd": [1, None]}
    usage = {"id": "1", "choices": [], "usage": {"total_tokens": 5}}
    server.says(events(call, usage))
    first, last = stream(client, model="big", stream_options={"include_usage": True})
    assert first.model == last.model == "big"
    assert first.choices[0].delta.tool_calls[0].function.arguments == CALL["function"]["arguments"]
    assert first.model_extra["odd"] == [1, None]
    assert notes(first)["expert"] == "big"
    assert "polymath" not in (last.model_extra or {})
    assert last.usage.total_tokens == 5
    assert server.requests[0].body["stream_options"] == {"include_usage": True}


def test_each_event_is_passed_on_when_it_comes(client: OpenAI, server: StandInServer) -> None:
    second, end = threading.Event(), threading.Event()
    server.says(events(chunk("a"), second, chunk("b"), end))
    chunks = client.chat.completions.create(stream=True, **{**DEFAULTS, "model": "big"})
    assert next(chunks).choices[0].delta.content == "a"
    assert server.answering == 1
    second.set()
    assert next(chunks).choices[0].delta.content == "b"
    assert server.answering == 1
    end.set()
    assert list(chunks) == []


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (failing(400), openai.BadRequestError, "their_code"),
        (failing(404), openai.NotFoundError, "their_code"),
        (failing(422), openai.UnprocessableEntityError, "their_code"),
        (failing(429, retry_after="30"), openai.RateLimitError, "overloaded"),
        (failing(401), openai.InternalServerError, "upstream_error"),
        (failing(500), openai.InternalServerError, "upstream_error"),
        (Reply(status=0), openai.InternalServerError, "upstream_error"),
        (sends({"choices": []}), openai.InternalServerError, "upstream_error"),
        (Reply([b"<html>"], headers={"content-type": "text/html"}), openai.APIError, None),
    ],
)
def test_a_failure_is_the_error_that_a_client_knows(
    client: OpenAI,
    server: StandInServer,
    reply: Reply,
    kind: type[openai.APIStatusError],
    code: str | None,
) -> None:
    server.says(reply)
    error = refusal(client, model="big")
    assert isinstance(error, kind)
    assert error.code == (code or "upstream_error")
    assert KEY not in error.response.text


def test_retry_after_is_told_to_the_client(client: OpenAI, server: StandInServer) -> None:
    server.says(failing(429, retry_after="30"))
    assert refusal(client, model="big").response.headers["retry-after"] == "30"


def test_a_late_upstream_is_504(client: OpenAI, server: StandInServer) -> None:
    server.says(Reply(before=[HANG]))
    error = refusal(client, model="hasty")
    assert (error.status_code, error.code) == (504, "upstream_timeout")


def test_an_upstream_is_asked_again(client: OpenAI, server: StandInServer) -> None:
    server.says(failing(503, retry_after_ms="10"), failing(429, retry_after_ms="10"))
    assert text(ask(client, model="patient")) == "Hello."
    assert len(server.requests) == 3


def test_an_open_breaker_is_503_and_shown_by_the_metrics(
    client: OpenAI, server: StandInServer, base_url: str
) -> None:
    for _ in range(FAILURES):
        assert refusal(client, model="dead").status_code == 502
    error = refusal(client, model="dead")
    assert (error.status_code, error.code) == (503, "upstream_unavailable")
    assert 1 <= int(error.response.headers["retry-after"]) <= 10
    states = breaker_states(base_url)
    assert states["dead"] == "open"
    assert states["big"] == "closed"


def breaker_states(base_url: str) -> dict[str, str]:
    page = httpx.get(f"{base_url}/metrics").raise_for_status().text
    assert KEY not in page
    samples = [
        sample
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if family.name == "polymath_upstream_breaker_state"
    ]
    return {s.labels["expert"]: s.labels["state"] for s in samples if s.value == 1}


@pytest.mark.parametrize(
    "reply",
    [
        events(chunk("a"), drop=True, done=False),
        events(chunk("a"), {"error": {"message": f"{KEY} is out of memory."}}),
        events(chunk("a"), b"data: {\n\n"),
    ],
    ids=["cut", "error", "broken"],
)
def test_a_stream_that_breaks_ends_with_an_error(
    client: OpenAI, server: StandInServer, reply: Reply
) -> None:
    server.says(reply)
    chunks = client.chat.completions.create(stream=True, **{**DEFAULTS, "model": "big"})
    assert next(chunks).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError) as caught:
        next(chunks)
    assert caught.value.code == "upstream_error"
    assert KEY not in caught.value.message


# --- clients that go away ------------------------------------------------------------------------


@pytest.fixture
def server_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("model", ["big", "background"])
def test_a_client_that_leaves_a_stream_ends_that_of_the_upstream(
    client: OpenAI, server: StandInServer, server_log: pytest.LogCaptureFixture, model: str
) -> None:
    server.says(events(chunk("a"), HANG))
    chunks = client.chat.completions.create(stream=True, **{**DEFAULTS, "model": model})
    next(chunks)
    chunks.close()
    assert server.cut_off.wait(5)
    time.sleep(0.05)
    assert "Exception" not in server_log.text


def test_a_client_that_leaves_a_local_stream_does_no_harm(
    client: OpenAI, gateway: Gateway, server_log: pytest.LogCaptureFixture
) -> None:
    given = {**DEFAULTS, "model": "local", "max_tokens": 150}
    chunks = client.chat.completions.create(stream=True, **given, extra_body={"ignore_eos": True})
    next(chunks)
    chunks.close()
    wait_for(lambda: not gateway.engine.active)
    time.sleep(0.05)
    assert "Exception" not in server_log.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_does_not_wait_for_an_answer_ends_the_request(
    base_url: str, server: StandInServer, server_log: pytest.LogCaptureFixture, streaming: bool
) -> None:
    server.says(Reply(before=[HANG]))
    body = {**DEFAULTS, "model": "big", "stream": streaming}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=0.3)
    assert server.cut_off.wait(5)
    time.sleep(0.05)
    assert "Exception" not in server_log.text


# --- others answer -------------------------------------------------------------------------------


def test_a_local_expert_answers_where_the_upstream_cannot(
    client: OpenAI, server: StandInServer
) -> None:
    server.says(failing(500), failing(500))
    own = ask(client, model="local")
    whole, chunks = ask(client, model="covered"), stream(client, model="covered")
    assert text(whole) == streamed_text(chunks) == text(own)
    assert whole.model == chunks[0].model == "covered"
    assert notes(whole)["fallback"] == notes(chunks[0])["fallback"] == "local"
    assert notes(whole)["expert"] == "covered"


def test_a_fallback_that_does_not_know_the_fields_leaves_the_first_error(
    client: OpenAI, server: StandInServer
) -> None:
    server.says(failing(500, "It hurts."))
    assert "It hurts." in refusal(client, model="covered", tools=[TOOL]).message


def test_an_upstream_reads_what_a_local_expert_wrote(client: OpenAI, server: StandInServer) -> None:
    server.says(completion("It is far."), events(chunk("It is "), chunk("far.")))
    whole, chunks = ask(client, model="background"), stream(client, model="background")
    assert text(whole) == streamed_text(chunks) == "It is far."
    for answer in (whole, chunks[0]):
        guidance = {"expert": "local", "used": True, "failure": None}
        assert notes(answer)["guidance"] == guidance
        assert answer.model == "background"
    first, second = (request.body["messages"] for request in server.requests)
    assert first == second
    assert [message["role"] for message in first] == ["system", "user"]
    assert first[0]["content"].startswith("Background knowledge")


def test_a_local_expert_reads_what_an_upstream_wrote(client: OpenAI, server: StandInServer) -> None:
    server.says(completion("Far."), failing(500))
    with_it, without = ask(client, model="read-here"), ask(client, model="read-here")
    assert notes(with_it)["guidance"]["used"] is True
    assert notes(without)["guidance"]["used"] is False
    assert "500" in notes(without)["guidance"]["failure"]
    assert text(without) == text(ask(client, model="local"))
    assert with_it.usage.prompt_tokens > without.usage.prompt_tokens


def test_a_cascade_keeps_what_is_good_enough(client: OpenAI, server: StandInServer) -> None:
    own = ask(client, model="local")
    options = {"stream_options": {"include_usage": True}}
    whole, chunks = ask(client, model="thrifty"), stream(client, model="thrifty", **options)
    assert text(whole) == streamed_text(chunks) == text(own)
    assert whole.choices[0].logprobs is None
    assert chunks[-1].usage == whole.usage == own.usage
    for answer in (whole, chunks[0]):
        assert answer.model == "thrifty"
        assert notes(answer)["cascade"]["expert"] == "local"
        assert notes(answer)["cascade"]["score"] < 0
    assert server.requests == []


def test_a_cascade_asks_the_strong_expert_where_it_is_not(
    client: OpenAI, server: StandInServer
) -> None:
    server.says(completion("Strong."), events(chunk("Strong.")))
    whole, chunks = ask(client, model="strict"), stream(client, model="strict")
    assert text(whole) == streamed_text(chunks) == "Strong."
    for answer in (whole, chunks[0]):
        assert notes(answer)["cascade"]["expert"] == "big"
        assert notes(answer)["cascade"]["trusted"] is False


def test_a_cascade_by_difficulty_asks_the_router(client: OpenAI, server: StandInServer) -> None:
    answer = ask(client, model="by-domain", messages=[user(TEXTS[0])])
    assert notes(answer)["cascade"]["score"] > 0.5
    assert text(answer) == text(ask(client, model="local", messages=[user(TEXTS[0])]))


def test_what_the_cheap_expert_cannot_read_the_strong_one_answers(
    client: OpenAI, server: StandInServer
) -> None:
    answer = ask(client, model="thrifty", messages=[{"role": "user", "content": [PICTURE]}])
    assert text(answer) == "Hello."
    assert "only text parts" in notes(answer)["cascade"]["failure"]


# --- local experts stay strict -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"extra_body": {"their_own": 1}}, "their_own"),
        ({"extra_body": {"n": "two"}}, "n"),
        ({"temperature": 7}, "temperature"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_what_only_an_upstream_understands_a_local_expert_refuses_by_name(
    client: OpenAI, server: StandInServer, given: dict[str, Any], param: str
) -> None:
    assert text(ask(client, model="big", **given)) == "Hello."
    error = refusal(client, model="local", **given)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "big"},
        {"model": "big", "messages": []},
        {"model": "big", "messages": ["text"]},
        {"model": 3, "messages": [user("x")]},
        {"model": "big", "messages": [user("x")], "stream": "yes"},
    ],
)
def test_a_request_that_nobody_could_answer_asks_nobody(
    base_url: str, server: StandInServer, body: dict[str, Any]
) -> None:
    answer = httpx.post(f"{base_url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.requests == []


def test_the_models_say_whom_they_ask(client: OpenAI) -> None:
    about = notes(client.models.retrieve("background"))
    assert (about["kind"], about["members"]) == ("guided", ["local", "big"])
    assert KEY not in client.models.with_raw_response.list().http_response.text


# --- a process of its own ------------------------------------------------------------------------


def test_keys_are_not_in_the_log_however_much_is_logged(
    config: Path, server: StandInServer, tmp_path: Path
) -> None:
    """Nor are base models needed."""
    alone = f"""\
server: {{log_level: debug}}
experts:
  big:
    kind: upstream
    api_base: {server.url}
    api_key: {KEY}
    model: m
    domains: [law, coding, math]
router: {{path: {config.parent / "router"}, fallback: big}}
"""
    (tmp_path / "polymath.yaml").write_text(alone)
    command = [*COMMAND, "0", "--config", str(tmp_path / "polymath.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready" in line:
            break
    url = next(match[1] for line in lines if (match := ADDRESS.search(line)))
    server.says(Reply([b"{}"], 400, {"x-echo": KEY}), failing(401, KEY))
    for status in (400, 502):
        body = {**DEFAULTS, "model": "big"}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == status
    process.send_signal(signal.SIGTERM)
    log = "".join(lines) + process.stderr.read()
    process.wait(10)
    assert "answered 401" in log
    assert KEY not in log
