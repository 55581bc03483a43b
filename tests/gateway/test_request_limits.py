"""What a client may send, over HTTP and over bare sockets; and what a browser is told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from polymath.gateway.request_limits import RequestLimits, check_request, estimated_tokens
from tests.gateway.asking import DEFAULTS, refusal, stream, user
from tests.gateway.running import LAW, Running, running, wait_for, write_config
from tests.proxy.stand_in import HANG, Reply, StandInServer, chunk, completion, events

LIMITS = """\
limits:
  max_messages: 4
  max_characters: 2000
  max_tokens: 100
  max_choices: 3
  max_top_logprobs: 5
  max_depth: 8
  max_header_bytes: 2048
  receive_timeout: 0.5
  timeout: 30
  max_in_flight: 2
"""
SOCKET_SECONDS = 20


@pytest.fixture(scope="module")
def only_gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("limits")
    keys = "max_body_bytes: 16384"
    config = write_config(folder, text_router, upstream, LIMITS, server_keys=keys)
    with running(config, upstream) as gate:
        yield gate


@pytest.fixture
def gate(only_gate: Running) -> Iterator[Running]:
    only_gate.server.forget()
    yield only_gate
    wait_for(lambda: not only_gate.gateway.door.inside)


def problem(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": LAW * 5}, (400, "invalid_value", "messages")),
        ({"messages": [user("x" * 1001)] * 2}, (413, "request_too_large", "messages")),
        ({"max_tokens": 101}, (400, "invalid_value", "max_tokens")),
        ({"max_completion_tokens": 101}, (400, "invalid_value", "max_completion_tokens")),
        ({"n": 4}, (400, "invalid_value", "n")),
        ({"top_logprobs": 6}, (400, "invalid_value", "top_logprobs")),
    ],
)
def test_what_is_too_large_is_named(gate: Running, body: dict[str, Any], expected: Any) -> None:
    for streaming in (False, True):
        assert problem(gate.post({**body, "stream": streaming})) == expected
    assert gate.server.requests == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": LAW * 4},
        {"messages": [user("x" * 1000)] * 2},
        {"max_tokens": 100, "n": 3, "top_logprobs": 5},
    ],
)
def test_what_is_as_large_as_it_may_be_is_served(gate: Running, body: dict[str, Any]) -> None:
    assert gate.post(body).status_code == 200


def nested(depth: int) -> Any:
    value: Any = 1
    for index in range(depth):
        value = [value] if index % 2 else {"x": value}
    return value


def test_json_is_nested_so_deep_and_no_deeper(gate: Running) -> None:
    assert gate.post({"odd": nested(6)}).status_code == 200
    answer = gate.post({"odd": nested(9)})
    assert problem(answer) == (400, "invalid_value", None)
    assert "nested deeper than 8 levels" in answer.json()["error"]["message"]
    wide = {"odd": [[1] for _ in range(100)]}
    assert gate.post(wide).status_code == 200


def test_json_that_would_break_a_parser_is_a_bad_request(gate: Running) -> None:
    for data in (b"[" * 8000, b'{"a":' * 2000, b'{"model":' + b"[" * 4000 + b"]" * 4000 + b"}"):
        answer = httpx.post(f"{gate.url}/v1/chat/completions", content=data, headers=JSON)
        assert problem(answer)[:2] == (400, "invalid_value")


JSON = {"content-type": "application/json"}


def test_a_large_body_is_413_whether_its_length_is_told_or_not(gate: Running) -> None:
    url, data = f"{gate.url}/v1/chat/completions", b'{"model": "' + b"x" * 20_000 + b'"}'
    for content in (data, iter([data[:10_000], data[10_000:]])):
        answer = httpx.post(url, content=content, headers=JSON)
        assert problem(answer) == (413, "request_too_large", None)


@pytest.mark.parametrize("value", [-1, 0, "two", 1.5, True, [1], 10**30])
@pytest.mark.parametrize("field", ["n", "max_tokens", "top_logprobs", "seed"])
def test_odd_values_are_never_a_failure_of_ours(gate: Running, field: str, value: Any) -> None:
    assert gate.post({field: value}).status_code in (200, 400)


# --- headers and slow clients --------------------------------------------------------------------


def connected(gate: Running) -> socket.socket:
    host, port = gate.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=SOCKET_SECONDS)


def received(connection: socket.socket) -> bytes:
    """All until the other side closes."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def request_of(data: bytes, *headers: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


BODY = json.dumps({"model": "law", "messages": LAW}).encode()


def test_large_headers_are_431(gate: Running) -> None:
    answer = httpx.get(f"{gate.url}/healthz", headers={"x-large": "x" * 3000})
    assert problem(answer) == (431, "headers_too_large", None)
    many = {f"x-{index}": "y" * 20 for index in range(100)}
    assert httpx.get(f"{gate.url}/healthz", headers=many).status_code == 431


def test_headers_without_an_end_are_cut_off_at_the_limit(gate: Running) -> None:
    with closing(connected(gate)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        for index in range(300):
            try:
                connection.sendall(b"x-%d: yyyyyyyyyy\r\n" % index)
            except OSError:
                break
        else:
            assert received(connection).startswith(b"HTTP/1.1 431 ")


def test_a_second_request_of_a_connection_has_the_same_limit(gate: Running) -> None:
    with httpx.Client(base_url=gate.url) as client:
        for _ in range(3):
            assert client.get("/healthz", headers={"x": "y" * 1500}).status_code == 200
        assert client.get("/healthz", headers={"x": "y" * 3000}).status_code == 431


def test_a_body_that_comes_with_its_headers_does_not_count_as_headers(gate: Running) -> None:
    data = json.dumps({"model": "law", "messages": LAW, "odd": "x" * 8000}).encode()
    with closing(connected(gate)) as connection:
        connection.sendall(request_of(data, "connection: close"))
        assert received(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_nor_if_the_end_of_the_headers_is_cut_in_two(gate: Running, cut: int) -> None:
    data = json.dumps({"model": "law", "messages": LAW, "odd": "x" * 8000}).encode()
    whole = request_of(data, "connection: close")
    at = whole.index(b"\r\n\r\n") + cut
    with closing(connected(gate)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(whole[:at])
        time.sleep(0.05)
        connection.sendall(whole[at:])
        assert received(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "begin", [b"", b"POST /v1/chat/comp", b"GET /healthz HTTP/1.1\r\nx: y\r\n"]
)
def test_headers_that_do_not_come_end_the_connection(gate: Running, begin: bytes) -> None:
    with closing(connected(gate)) as connection:
        connection.sendall(begin)
        assert received(connection) == b""


def test_headers_that_drip_do_not_live_longer(gate: Running) -> None:
    with closing(connected(gate)) as connection:
        started = time.monotonic()
        try:
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")
            while time.monotonic() - started < SOCKET_SECONDS:
                connection.sendall(b"x: y\r\n")
                time.sleep(0.1)
        except OSError:
            return
        raise AssertionError("the connection is still open")


@pytest.mark.parametrize("data", [b"", BODY[:10]])
def test_a_body_that_does_not_come_is_408(gate: Running, data: bytes) -> None:
    with closing(connected(gate)) as connection:
        head = request_of(BODY, "connection: close").removesuffix(BODY)
        connection.sendall(head + data)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_body_in_pieces_is_read_and_may_be_followed_by_another(gate: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(BODY), 20):
            yield BODY[start : start + 20]

    with httpx.Client(base_url=gate.url, headers=JSON) as client:
        for _ in range(2):
            assert client.post("/v1/chat/completions", content=pieces()).status_code == 200


def test_an_answer_may_take_longer_than_the_request(gate: Running) -> None:
    gate.server.says(events(chunk("a"), 1.0, chunk("b")))
    assert len(stream(gate.client(), model="law")) == 2


# --- deadlines and overload ----------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_takes_longer_than_the_request_allows_is_408(
    gate: Running, streaming: bool
) -> None:
    gate.server.says(Reply(before=[HANG]))
    error = refusal(gate.client(), model="law", stream=streaming, extra_body={"timeout": 0.3})
    assert (error.status_code, error.code) == (408, "timeout")
    assert "0.3 seconds" in error.message
    assert gate.server.cut_off.wait(SOCKET_SECONDS)
    assert gate.decisions()[0]["outcome"] == "timeout"


def test_a_stream_that_takes_longer_ends_with_an_error(gate: Running) -> None:
    gate.server.says(events(chunk("a"), HANG))
    given = {**DEFAULTS, "model": "law", "extra_body": {"timeout": 0.5}}
    chunks = gate.client().chat.completions.create(stream=True, **given)
    assert next(chunks).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError) as caught:
        next(chunks)
    assert caught.value.code == "timeout"
    assert gate.server.cut_off.wait(SOCKET_SECONDS)


@pytest.mark.parametrize("wanted", [0, -1, "soon", True, [1], 1e10])
def test_a_deadline_is_a_number_of_seconds(gate: Running, wanted: Any) -> None:
    assert problem(gate.post({"timeout": wanted})) == (400, "invalid_value", "timeout")


def test_the_deadline_is_not_told_to_the_upstream(gate: Running) -> None:
    assert gate.post({"timeout": 20}).status_code == 200
    assert "timeout" not in gate.server.requests[0].body


def test_requests_beyond_what_can_be_answered_are_429_at_once(gate: Running) -> None:
    end = threading.Event()
    gate.server.says(*[events(chunk("a"), end, chunk("b"))] * 2)
    given = {**DEFAULTS, "model": "law"}
    running = [gate.client().chat.completions.create(stream=True, **given) for _ in range(2)]
    for chunks in running:
        next(chunks)
    error = refusal(gate.client(), model="law")
    assert isinstance(error, openai.RateLimitError)
    assert error.response.headers["retry-after"] == "1"
    with pytest.raises(openai.RateLimitError):
        gate.client().embeddings.create(model="polymath-encoder", input="Hello.")
    assert httpx.get(f"{gate.url}/healthz").status_code == 200
    end.set()
    for chunks in running:
        assert [one.choices[0].delta.content for one in chunks] == ["b"]
    wait_for(lambda: not gate.gateway.door.inside)
    assert gate.post().status_code == 200


async def test_of_many_at_once_some_are_answered_and_the_rest_are_429(gate: Running) -> None:
    gate.server.otherwise = lambda _: Reply([0.2, *completion().pieces], headers=JSON)
    async with httpx.AsyncClient(base_url=gate.url, timeout=30) as client:
        body = {"model": "law", "messages": LAW}
        asking = [client.post("/v1/chat/completions", json=body) for _ in range(20)]
        found = [answer.status_code for answer in await asyncio.gather(*asking)]
    assert set(found) == {200, 429}
    assert gate.server.most <= 2


# --- browsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nowhere", "/metrics"])
def test_every_response_has_the_security_headers(gate: Running, path: str) -> None:
    answer = httpx.get(f"{gate.url}{path}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-request-id"]


def test_the_documentation_may_load_its_scripts(gate: Running) -> None:
    answer = httpx.get(f"{gate.url}/docs")
    assert answer.status_code == 200
    assert "content-security-policy" not in answer.headers


ORIGIN = "https://chat.example"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def test_other_origins_are_told_nothing_unless_the_config_names_them(gate: Running) -> None:
    url = f"{gate.url}/v1/chat/completions"
    answers = [
        httpx.options(url, headers=PREFLIGHT),
        httpx.post(url, json={"model": "law", "messages": LAW}, headers={"origin": ORIGIN}),
    ]
    for answer in answers:
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_named_origins_may_ask(tmp_path: Path, text_router: Path, upstream: StandInServer) -> None:
    keys = f"cors_origins: ['{ORIGIN}']"
    config = write_config(tmp_path, text_router, upstream, server_keys=keys)
    with running(config, upstream) as gate:
        url = f"{gate.url}/v1/chat/completions"
        allowed = httpx.options(url, headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        answer = gate.post(origin=ORIGIN)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"]
        assert {"x-polymath-expert", "x-ratelimit-remaining-requests"} <= set(exposed.split(", "))
        refused = gate.post({"model": "nobody"}, origin=ORIGIN)
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        other = {**PREFLIGHT, "origin": "https://evil.example"}
        assert httpx.options(url, headers=other).status_code == 400
        assert "access-control-allow-origin" not in gate.post(origin=other["origin"]).headers


def test_a_failure_of_ours_is_500_and_counted_as_such(
    gate: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(gate.gateway.live.service, "answering", broken)
    answer = gate.post(x_request_id="mine")
    assert problem(answer) == (500, "internal_error", None)
    assert answer.headers["x-request-id"] == "mine"
    assert "secret" not in answer.text
    wait_for(lambda: 'status="500"' in httpx.get(f"{gate.url}/metrics").text)
    assert gate.gateway.door.inside == 0


# --- alone ---------------------------------------------------------------------------------------


def test_tokens_are_estimated_from_characters_and_what_is_asked_for() -> None:
    body = {"messages": [user("x" * 41)]}
    assert estimated_tokens(body, 512) == 11 + 512
    assert estimated_tokens({**body, "max_tokens": 5}, 512) == 11 + 5
    assert estimated_tokens({**body, "max_tokens": 5, "max_completion_tokens": 7}, 512) == 11 + 7
    assert estimated_tokens({**body, "max_tokens": 5, "n": 3}, 512) == 11 + 15
    assert estimated_tokens({**body, "max_tokens": -5, "n": -3}, 512) == 11
    assert estimated_tokens({**body, "max_tokens": "x", "n": "y"}, 512) == 11 + 512


def test_the_defaults_let_a_usual_request_in() -> None:
    check_request({"messages": [user("x" * 500_000)], "n": 4}, RequestLimits())
