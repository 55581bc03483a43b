"""An upstream against a real server that fails in every way: retries, balance, breaker, limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from polymath.errors import (
    Overloaded,
    PolymathError,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from polymath.proxy import CircuitBreaker, Upstream
from polymath.proxy.circuit_breaker import COOLDOWN, FAILURES
from tests.proxy.conftest import Connect
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

PATH = "/chat/completions"
BODY: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "Hi."}]}

Ask = Callable[[Upstream], Awaitable[list[dict[str, Any]]]]


async def whole(upstream: Upstream) -> list[dict[str, Any]]:
    return [await upstream.post(PATH, BODY)]


async def streamed(upstream: Upstream) -> list[dict[str, Any]]:
    return [event async for event in await upstream.stream(PATH, BODY)]


BOTH_WAYS = pytest.mark.parametrize("ask", [whole, streamed])


def good(ask: Ask) -> Reply:
    return completion() if ask is whole else events(chunk("Hello."))


async def failure(ask: Ask, upstream: Upstream) -> PolymathError:
    with pytest.raises(PolymathError) as caught:
        await ask(upstream)
    return caught.value


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


# --- one request ---------------------------------------------------------------------------------


async def test_a_request_arrives_as_it_is_but_for_its_model(
    connect: Connect, server: StandInServer
) -> None:
    body = {**BODY, "unknown": {"a": [1, None, "ü"]}}
    await connect(api_key="sk-1", headers={"X-Team": "blue"}).post(PATH, body)
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", f"/v1{PATH}")
    assert request.body == {**body, "model": "their-model"}
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["x-team"] == "blue"
    assert request.headers["content-type"] == "application/json"


async def test_without_a_key_no_authorization_is_sent(
    connect: Connect, server: StandInServer
) -> None:
    await connect().post(PATH, BODY)
    assert "authorization" not in server.requests[0].headers


async def test_get_asks_without_a_body(connect: Connect, server: StandInServer) -> None:
    server.says(sends({"object": "list", "data": []}))
    assert await connect().get("/models") == {"object": "list", "data": []}
    assert (server.requests[0].method, server.requests[0].data) == ("GET", b"")


async def test_cookies_of_one_request_are_not_sent_with_another(
    connect: Connect, server: StandInServer
) -> None:
    server.says(sends({"id": "1"}, set_cookie="session=1; Path=/"))
    upstream = connect()
    for _ in range(2):
        await upstream.post(PATH, BODY)
    assert "cookie" not in server.requests[1].headers


async def test_a_slash_at_the_end_of_the_address_does_not_matter(
    connect: Connect, server: StandInServer
) -> None:
    await connect(f"{server.url}/").post(PATH, BODY)
    assert server.requests[0].path == f"/v1{PATH}"


@BOTH_WAYS
async def test_connections_are_kept(connect: Connect, server: StandInServer, ask: Ask) -> None:
    server.says(good(ask), good(ask), good(ask))
    upstream = connect()
    for _ in range(3):
        await ask(upstream)
    assert server.connections == 1


async def test_a_stream_is_its_objects_up_to_done(connect: Connect, server: StandInServer) -> None:
    ping = b": ping\n\n"
    server.says(events(chunk("a"), ping, chunk("b"), b"data: [DONE]\n\n", chunk("never")))
    assert await streamed(connect()) == [chunk("a"), chunk("b")]


async def test_a_stream_may_be_empty(connect: Connect, server: StandInServer) -> None:
    server.says(events())
    assert await streamed(connect()) == []


# --- tries ---------------------------------------------------------------------------------------

NOTHING = Reply(status=0)
"""The connection is cut before the status line."""


@BOTH_WAYS
@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
async def test_a_status_that_may_pass_is_tried_again(
    connect: Connect, server: StandInServer, ask: Ask, status: int
) -> None:
    server.says(failing(status), failing(status), good(ask))
    assert await ask(connect())
    assert len(server.requests) == 3


@BOTH_WAYS
async def test_a_connection_that_is_cut_before_the_answer_is_tried_again(
    connect: Connect, server: StandInServer, ask: Ask
) -> None:
    server.says(NOTHING, good(ask))
    assert await ask(connect())
    assert len(server.requests) == 2


@BOTH_WAYS
async def test_a_status_whose_body_breaks_off_is_tried_again_all_the_same(
    connect: Connect, server: StandInServer, ask: Ask
) -> None:
    server.says(Reply([b"{"], 503, drop=True), good(ask))
    assert await ask(connect())


@BOTH_WAYS
async def test_all_tries_together_are_one_more_than_the_retries(
    connect: Connect, server: StandInServer, ask: Ask
) -> None:
    server.says(*[failing(500, "It hurts.")] * 5)
    error = await failure(ask, connect(num_retries=3))
    assert len(server.requests) == 4
    assert (error.status, error.code) == (502, "upstream_error")
    assert error.message == "The upstream of big answered 500: It hurts."


@BOTH_WAYS
@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 413, 422])
async def test_a_status_that_stays_is_not_tried_again(
    connect: Connect, server: StandInServer, ask: Ask, status: int
) -> None:
    server.says(failing(status))
    await failure(ask, connect())
    assert len(server.requests) == 1


@BOTH_WAYS
async def test_a_refused_connection_is_tried_again_and_says_what_to_look_at(
    connect: Connect, ask: Ask
) -> None:
    upstream = connect(f"http://127.0.0.1:{unused_port()}/v1", num_retries=FAILURES)
    error = await failure(ask, upstream)
    assert isinstance(error, UpstreamUnavailable)  # five tries were made
    error = await failure(ask, connect(f"http://127.0.0.1:{unused_port()}/v1", num_retries=1))
    assert (error.status, error.code) == (502, "upstream_error")
    assert "cannot be reached (ConnectError)" in error.message


HALF = completion().pieces[0]
assert isinstance(HALF, bytes)
JSON = {"content-type": "application/json"}
STREAM = {"content-type": "text/event-stream"}


@pytest.mark.parametrize(
    "reply",
    [
        Reply([HALF[:40]], headers=JSON, drop=True),
        Reply([HALF[:40]], headers=JSON, drop=True, chunked=True),
        Reply([b"{"], headers=JSON),
        Reply([b""], headers=JSON),
        Reply([b"[1]"], headers=JSON),
        Reply([b'"text"'], headers=JSON),
        Reply([HALF], headers={"content-type": "text/html"}),
        Reply([HALF]),
        Reply([b"not gzip"], headers={**JSON, "content-encoding": "gzip"}),
        sends({"error": {"message": "Out of memory."}}),
    ],
    ids=["cut", "cut chunk", "half", "empty", "list", "text", "html", "untyped", "gzip", "error"],
)
async def test_an_answer_that_has_begun_is_not_tried_again(
    connect: Connect, server: StandInServer, reply: Reply
) -> None:
    server.says(reply)
    error = await failure(whole, connect())
    assert (error.status, error.code) == (502, "upstream_error")
    assert error.message.startswith("The upstream of big ")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "before"),
    [
        (events(chunk("a"), drop=True, done=False), 1),
        (events(chunk("a"), done=False), 1),
        (events(chunk("a"), b"data: {\n\n"), 1),
        (events(chunk("a"), b"data: 3\n\n"), 1),
        (events(chunk("a"), {"error": {"message": "Out of memory."}}), 1),
        (events(chunk("a"), b"data: " + b"x" * (1 << 21) + b"\n\n"), 1),
        (events(drop=True, done=False), 0),
        (events({"error": "Out of memory."}), 0),
        (completion(), 0),
    ],
    ids=["cut", "no end", "half", "number", "error", "huge", "nothing", "error first", "no stream"],
)
async def test_a_stream_that_has_begun_is_not_tried_again(
    connect: Connect, server: StandInServer, reply: Reply, before: int
) -> None:
    server.says(reply)
    seen: list[dict[str, Any]] = []

    async def collect() -> None:
        async for event in await connect().stream(PATH, BODY):
            seen.append(event)

    with pytest.raises(UpstreamFailed) as caught:
        await collect()
    assert seen == [chunk("a")] * before
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert caught.value.message.count("The upstream") == 1
    assert len(server.requests) == 1


async def test_what_the_upstream_says_of_its_failure_is_shown(
    connect: Connect, server: StandInServer
) -> None:
    server.says(events(chunk("a"), {"error": {"message": "Out of memory."}}))
    with pytest.raises(UpstreamFailed, match=r"The upstream of big failed: Out of memory\."):
        await streamed(connect())


# --- waiting -------------------------------------------------------------------------------------


async def test_retry_after_is_waited_for(connect: Connect, server: StandInServer) -> None:
    server.says(failing(429, retry_after_ms="150"))
    started = time.monotonic()
    await whole(connect())
    assert 0.15 <= time.monotonic() - started < 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_wait_that_is_too_long_is_not_waited_for(
    connect: Connect, server: StandInServer, status: int
) -> None:
    server.says(failing(status, retry_after="21"))
    started = time.monotonic()
    error = await failure(whole, connect())
    assert time.monotonic() - started < 1
    assert len(server.requests) == 1
    assert error.headers == ({"retry-after": "21"} if status == 429 else {})


@pytest.mark.parametrize("value", ["inf", "nan", "1e400", "soon"])
async def test_a_retry_after_that_is_no_time_does_no_harm(
    connect: Connect, server: StandInServer, value: str
) -> None:
    server.says(failing(429, retry_after=value))
    error = await failure(whole, connect(num_retries=0))
    assert isinstance(error, Overloaded)
    assert error.headers == {"retry-after": "1"}


# --- several deployments -------------------------------------------------------------------------


async def test_the_least_busy_deployment_is_asked(
    connect: Connect, server: StandInServer, other: StandInServer
) -> None:
    for one in (server, other):
        one.says(*[Reply([0.1, HALF], headers=JSON)] * 4)
    upstream = connect(server.url, other.url)
    await asyncio.gather(*(upstream.post(PATH, BODY) for _ in range(8)))
    assert (server.most, other.most) == (4, 4)


async def test_a_busy_deployment_is_left_out(
    connect: Connect, server: StandInServer, other: StandInServer
) -> None:
    server.says(events(chunk("a"), HANG))
    upstream = connect(server.url, other.url)
    running = await upstream.stream(PATH, BODY)
    for _ in range(3):
        await upstream.post(PATH, BODY)
    assert (len(server.requests), len(other.requests)) == (1, 3)
    await running.aclose()


async def test_another_try_asks_another_deployment(
    connect: Connect, server: StandInServer, other: StandInServer
) -> None:
    server.says(failing(500), failing(500))
    await whole(connect(server.url, other.url))
    assert (len(server.requests), len(other.requests)) == (1, 1)


async def test_a_deployment_whose_breaker_is_open_is_not_asked(
    connect: Connect, server: StandInServer, other: StandInServer
) -> None:
    upstream = connect(f"http://127.0.0.1:{unused_port()}/v1", other.url)
    for _ in range(FAILURES + 3):
        await whole(upstream)
    assert [deployment.breaker.state for deployment in upstream.servers] == ["open", "closed"]
    assert len(other.requests) == FAILURES + 3


async def test_each_deployment_has_its_model_and_key(
    connect: Connect, server: StandInServer, other: StandInServer
) -> None:
    upstream = connect(
        api_base=None,
        deployments=[
            {"api_base": server.url, "api_key": "sk-1"},
            {"api_base": other.url, "model": "another"},
        ],
    )
    server.says(failing(500))
    await whole(upstream)
    assert server.requests[0].body["model"] == "their-model"
    assert server.requests[0].headers["authorization"] == "Bearer sk-1"
    assert other.requests[0].body["model"] == "another"
    assert "authorization" not in other.requests[0].headers


# --- the circuit breaker -------------------------------------------------------------------------


async def failed_often(upstream: Upstream, server: StandInServer) -> CircuitBreaker:
    server.says(*[failing(500)] * FAILURES)
    for _ in range(FAILURES):
        await failure(whole, upstream)
    return upstream.servers[0].breaker


@BOTH_WAYS
async def test_after_five_failures_nobody_is_asked(
    connect: Connect, server: StandInServer, ask: Ask
) -> None:
    upstream = connect(num_retries=0)
    breaker = await failed_often(upstream, server)
    error = await failure(ask, upstream)
    assert (error.status, error.code) == (503, "upstream_unavailable")
    assert error.headers == {"retry-after": str(round(COOLDOWN))}
    assert breaker.state == "open"
    assert len(server.requests) == FAILURES


@pytest.mark.parametrize(
    "reply",
    [
        failing(500),
        NOTHING,
        Reply([b"{"], headers=JSON),
        Reply([HALF[:9]], headers=JSON, drop=True),
    ],
    ids=["500", "nothing", "half", "cut"],
)
async def test_every_failure_of_the_server_counts(
    connect: Connect, server: StandInServer, reply: Reply
) -> None:
    upstream = connect(num_retries=0)
    server.says(*[reply] * FAILURES)
    for _ in range(FAILURES):
        await failure(whole, upstream)
    assert upstream.servers[0].breaker.state == "open"


@pytest.mark.parametrize("status", [400, 401, 404, 408, 409, 429])
async def test_what_is_no_failure_of_the_server_does_not_count(
    connect: Connect, server: StandInServer, status: int
) -> None:
    upstream = connect(num_retries=0)
    server.says(*[failing(status)] * (FAILURES + 1))
    for _ in range(FAILURES + 1):
        await failure(whole, upstream)
    assert upstream.servers[0].breaker.state == "closed"


@BOTH_WAYS
async def test_a_trial_that_succeeds_closes_the_breaker(
    connect: Connect, server: StandInServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = connect(num_retries=0)
    breaker = await failed_often(upstream, server)
    monkeypatch.setattr("polymath.proxy.circuit_breaker.COOLDOWN", 0.0)
    server.says(good(ask))
    await ask(upstream)
    assert breaker.state == "closed"


async def test_while_one_request_tries_the_others_are_refused(
    connect: Connect, server: StandInServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = connect(num_retries=0)
    breaker = await failed_often(upstream, server)
    monkeypatch.setattr("polymath.proxy.circuit_breaker.COOLDOWN", 0.0)
    server.says(Reply([0.1, HALF], headers=JSON))
    trial = asyncio.create_task(whole(upstream))
    await until(lambda: server.answering)
    assert isinstance(await failure(whole, upstream), UpstreamUnavailable)
    await trial
    assert breaker.state == "closed"


async def test_a_trial_whose_client_goes_away_makes_room_for_another(
    connect: Connect, server: StandInServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = connect(num_retries=0)
    breaker = await failed_often(upstream, server)
    monkeypatch.setattr("polymath.proxy.circuit_breaker.COOLDOWN", 0.0)
    server.says(Reply(before=[HANG]))
    trial = asyncio.create_task(whole(upstream))
    await until(lambda: server.answering)
    trial.cancel()
    await asyncio.wait({trial})
    assert breaker.lets_pass


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_requests_are_answered_at_a_time(
    connect: Connect, server: StandInServer, most: int
) -> None:
    server.says(*[Reply([0.03, HALF], headers=JSON)] * 6)
    upstream = connect(max_parallel=most)
    await asyncio.gather(*(upstream.post(PATH, BODY) for _ in range(6)))
    assert server.most == most
    assert len(server.requests) == 6


async def test_a_stream_has_its_place_until_it_is_closed(
    connect: Connect, server: StandInServer
) -> None:
    server.says(events(chunk("a"), HANG))
    upstream = connect(max_parallel=1)
    running = await upstream.stream(PATH, BODY)
    waiting = asyncio.create_task(whole(upstream))
    await asyncio.sleep(0.05)
    assert len(server.requests) == 1
    await running.aclose()
    assert await waiting


@BOTH_WAYS
async def test_a_failure_gives_its_place_back(
    connect: Connect, server: StandInServer, ask: Ask
) -> None:
    upstream = connect(max_parallel=1, num_retries=0)
    server.says(failing(500), NOTHING, failing(400), good(ask))
    for _ in range(3):
        await failure(ask, upstream)
    assert await ask(upstream)


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_huge_answer_is_given_up(
    connect: Connect, server: StandInServer, chunked: bool
) -> None:
    server.says(Reply([b"x" * (1 << 20)] * 100, headers=JSON, chunked=chunked))
    error = await failure(whole, connect())
    assert error.message == "The upstream of big sent a reply of more than 33554432 bytes."
    await until(server.cut_off.is_set)


async def test_of_a_huge_error_the_status_is_said(connect: Connect, server: StandInServer) -> None:
    server.says(Reply([b"x" * (1 << 20)] * 20, status=500))
    error = await failure(whole, connect(num_retries=0))
    assert error.message == "The upstream of big answered 500: HTTP status 500"


SLOWLY = [piece for byte in HALF for piece in (bytes([byte]), 0.02)]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(before=[HANG]),
        Reply([HANG], headers=JSON, chunked=True),
        Reply([HALF[:9], HANG], headers=JSON, chunked=True),
        Reply(SLOWLY, headers=JSON),
        Reply([HANG], status=500, chunked=True),
    ],
    ids=["no status", "no body", "half a body", "byte by byte", "an error without body"],
)
async def test_a_late_answer_is_a_timeout_and_not_tried_again(
    connect: Connect, server: StandInServer, reply: Reply
) -> None:
    server.says(reply)
    error = await failure(whole, connect(timeout=0.2))
    assert isinstance(error, UpstreamTimeout)
    assert (error.status, error.code) == (504, "upstream_timeout")
    assert error.message == "The upstream of big gave no answer within 0.2 seconds."
    await until(server.cut_off.is_set)
    assert len(server.requests) == 1


async def test_a_stream_may_take_longer_than_the_time_between_its_events(
    connect: Connect, server: StandInServer
) -> None:
    pauses = [piece for _ in range(6) for piece in (0.1, chunk("a"))]
    server.says(events(*pauses))
    assert len(await streamed(connect(timeout=0.4))) == 6


@pytest.mark.parametrize("pieces", [[], [chunk("a")]])
async def test_a_stream_that_stops_is_a_timeout(
    connect: Connect, server: StandInServer, pieces: list[dict[str, Any]]
) -> None:
    server.says(events(*pieces, HANG))
    error = await failure(streamed, connect(timeout=0.2))
    assert isinstance(error, UpstreamTimeout)
    await until(server.cut_off.is_set)


# --- clients that go away ------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize(
    "reply",
    [Reply(before=[HANG]), Reply([HANG], status=500, chunked=True), events(HANG)],
    ids=["no status", "no error", "no event"],
)
async def test_a_cancelled_request_closes_its_connection(
    connect: Connect, server: StandInServer, ask: Ask, reply: Reply
) -> None:
    server.says(reply)
    upstream = connect(max_parallel=1)
    asking = asyncio.create_task(ask(upstream))
    await until(lambda: server.answering)
    asking.cancel()
    await asyncio.wait({asking})
    await until(server.cut_off.is_set)
    assert upstream.servers[0].outstanding == 0
    server.says(good(ask))
    assert await ask(upstream)  # it left its place, too


async def test_a_stream_that_is_closed_closes_its_connection(
    connect: Connect, server: StandInServer
) -> None:
    server.says(events(chunk("a"), HANG))
    upstream = connect()
    running = await upstream.stream(PATH, BODY)
    assert await anext(aiter(running)) == chunk("a")
    await running.aclose()
    await until(server.cut_off.is_set)
    assert upstream.servers[0].breaker.state == "closed"


async def test_a_request_that_is_cancelled_while_it_waits_for_another_try_ends(
    connect: Connect, server: StandInServer
) -> None:
    server.says(failing(503, retry_after="15"))
    upstream = connect(max_parallel=1)
    asking = asyncio.create_task(whole(upstream))
    await until(lambda: server.requests)
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait({asking})
    assert await whole(upstream)
