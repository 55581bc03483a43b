"""What a client is told of an upstream's refusal, and what it is never told: our keys."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from polymath.errors import PolymathError, UpstreamRefused
from polymath.proxy import Upstream
from tests.proxy.conftest import Connect
from tests.proxy.stand_in import Reply, StandInServer, chunk, events, failing, sends, unused_port

PATH = "/chat/completions"
BODY: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "Hi."}]}
KEY = "sk-the-key-of-the-gateway"
HEADER = "the-header-of-the-gateway"


async def refused(upstream: Upstream, stream: bool = False) -> PolymathError:
    with pytest.raises(PolymathError) as caught:
        await (streamed(upstream) if stream else upstream.post(PATH, BODY))
    return caught.value


async def streamed(upstream: Upstream) -> list[dict[str, Any]]:
    return [event async for event in await upstream.stream(PATH, BODY)]


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422])
async def test_what_is_wrong_with_the_request_comes_through(
    connect: Connect, server: StandInServer, status: int
) -> None:
    server.says(failing(status, "Too many tokens."))
    error = await refused(connect())
    assert isinstance(error, UpstreamRefused)
    assert error.status == status
    assert error.body()["error"] == {
        "message": "Too many tokens.",
        "type": "their_type",
        "code": "their_code",
        "param": "their_param",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "No.", "code": None}}, "No."),
        ({"error": "No."}, "No."),
        ({"message": "No."}, "No."),
        ({"object": "error", "message": "No.", "type": "BadRequestError", "code": 400}, "No."),
        ({"detail": "No."}, "No."),
        ({"detail": [{"loc": ["body"], "msg": "No."}]}, "[{'loc': ['body'], 'msg': 'No.'}]"),
        ({"error": None}, "None"),
        ({"error": {"message": {"deep": 1}}}, "{'deep': 1}"),
        ({}, "HTTP status 400"),
        ([], "HTTP status 400"),
        ("No.", "HTTP status 400"),
    ],
)
async def test_errors_of_another_form_are_understood(
    connect: Connect, server: StandInServer, body: Any, message: str
) -> None:
    server.says(sends(body, 400))
    error = (await refused(connect())).body()["error"]
    assert error["message"] == message
    assert all(isinstance(error[key], str) for key in ("type", "code"))


@pytest.mark.parametrize("data", [b"<html>Bad gateway</html>", b"", b"\xff\xfe", b'{"error": '])
async def test_an_error_that_is_no_json_is_its_status(
    connect: Connect, server: StandInServer, data: bytes
) -> None:
    server.says(Reply([data], 400))
    assert (await refused(connect())).message == "HTTP status 400"


async def test_a_long_message_is_cut(connect: Connect, server: StandInServer) -> None:
    server.says(failing(400, "x" * 5000))
    assert (await refused(connect())).message == "x" * 500


@pytest.mark.parametrize("status", [401, 403, 407])
async def test_that_our_key_is_refused_is_no_fault_of_the_client(
    connect: Connect, server: StandInServer, status: int
) -> None:
    server.says(failing(status, f"Incorrect API key provided: {KEY[:8]}***."))
    error = await refused(connect(api_key=KEY))
    assert (error.status, error.code) == (502, "upstream_error")
    assert error.message == (
        f"The upstream of big answered {status}; check its api_key and headers in the config."
    )


async def test_a_redirection_is_not_followed(connect: Connect, server: StandInServer) -> None:
    """The key would go to whoever the upstream names."""
    server.says(Reply(status=307, headers={"location": f"{server.url}/elsewhere"}))
    error = await refused(connect(api_key=KEY))
    assert error.status == 502
    assert "check its api_base" in error.message
    assert len(server.requests) == 1


ECHO = f"Bearer {KEY} and {HEADER} are wrong"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "reply",
    [
        *(failing(status, ECHO) for status in (302, 400, 401, 403, 404, 408, 429, 500, 503)),
        sends({"error": {"message": "No.", "type": ECHO, "code": ECHO, "param": ECHO}}, 400),
        sends({"error": {ECHO: ECHO}}, 400),
        sends({"detail": [ECHO]}, 422),
        sends({"error": {"message": "x" * 480 + ECHO}}, 400),
        sends({"error": ECHO}),
        sends({"error": {"message": [ECHO]}}),
        Reply([b"{}"], headers={"content-type": ECHO}),
        Reply([ECHO.encode()], headers={"content-type": "application/json"}),
        events(chunk("a"), {"error": {"message": ECHO}}),
        events(f"data: {ECHO}\n\n".encode()),
        Reply(status=0),
    ],
)
async def test_keys_are_in_no_error_and_no_log(
    connect: Connect,
    server: StandInServer,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
    stream: bool,
) -> None:
    caplog.set_level(logging.DEBUG, "polymath")
    server.says(reply, reply)
    error = await refused(connect(api_key=KEY, headers={"x-key": HEADER}, num_retries=1), stream)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    for text in (str(error.body()), repr(error), str(error.headers), caplog.text):
        assert KEY[:10] not in text
        assert HEADER[:10] not in text


async def test_keys_are_not_in_what_is_said_of_a_refused_connection(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "polymath")
    dead = f"http://127.0.0.1:{unused_port()}/v1"
    error = await refused(connect(dead, api_key=KEY, num_retries=1))
    assert KEY not in f"{error.body()} {caplog.text}"


async def test_keys_are_not_shown_by_the_settings(connect: Connect) -> None:
    upstream = connect(api_key=KEY, headers={"x-key": HEADER})
    assert KEY not in f"{vars(upstream)}"
    assert "Bearer" not in f"{vars(upstream)}"


async def test_nobody_is_asked_before_the_first_request(
    connect: Connect, server: StandInServer
) -> None:
    upstream = connect()
    await upstream.close()
    assert server.connections == 0
