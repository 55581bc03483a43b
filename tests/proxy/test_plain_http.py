"""Plain HTTP/1.1 as servers speak it, well and badly, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from polymath.proxy import plain_http
from polymath.proxy.plain_http import LARGEST_HEAD, PlainTransport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSE = b""
"""In place of an answer: the connection is closed."""


@dataclass
class Scripted:
    """A server that sends what it is told to, request by request.

    Attributes:
        asked: the requests of each connection.
    """

    answers: list[bytes]
    url: str = ""
    asked: list[list[bytes]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests: list[bytes] = []
        self.asked.append(requests)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                writer.write(answer.removesuffix(b"<close>"))
                await writer.drain()
                if answer.endswith(b"<close>") or answer == CLOSE:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        self.closed.set()


@asynccontextmanager
async def scripted(*answers: bytes) -> AsyncIterator[Scripted]:
    script = Scripted(list(answers))
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1?a=b"
    try:
        yield script
    finally:
        server.close()


@asynccontextmanager
async def client_of(most: int = 10, most_idle: int = 10) -> AsyncIterator[httpx.AsyncClient]:
    timeout = httpx.Timeout(None, connect=1.0)
    async with httpx.AsyncClient(transport=PlainTransport(most, most_idle), timeout=timeout) as one:
        yield one


async def test_request_and_answer_come_whole() -> None:
    async with scripted(OK) as script, client_of() as client:
        reply = await client.post(script.url, content=b"{}", headers={"x-own": "1"})
        assert (reply.status_code, reply.content, reply.http_version) == (200, b"ok", "HTTP/1.1")
        ((request,),) = script.asked
        assert request.startswith(b"POST /v1?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nx-own: 1\r\n" in request
        assert request.endswith(b"\r\n\r\n{}")


async def test_requests_one_after_the_other_share_a_connection() -> None:
    async with scripted(OK, OK, OK) as script, client_of() as client:
        for _ in range(3):
            assert (await client.post(script.url, content=b"{}")).text == "ok"
        assert [len(requests) for requests in script.asked] == [3]


async def test_requests_at_the_same_time_do_not() -> None:
    async with scripted(*[OK] * 5) as script, client_of() as client:
        await asyncio.gather(*(client.post(script.url, content=b"{}") for _ in range(5)))
        assert [len(requests) for requests in script.asked] == [1] * 5


async def test_more_requests_than_connections_wait() -> None:
    async with scripted(*[OK] * 20) as script, client_of(most=2) as client:
        replies = await asyncio.gather(*(client.post(script.url, content=b"{}") for _ in range(20)))
        assert {reply.text for reply in replies} == {"ok"}
        assert len(script.asked) == 2


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"<close>",
        OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        OK.replace(b"1.1", b"1.0"),
        OK + b"and more",
        OK + OK,
    ],
)
async def test_a_connection_that_is_not_kept_is_not_used_again(answer: bytes) -> None:
    async with scripted(answer, OK) as script, client_of() as client:
        for _ in range(2):
            assert (await client.post(script.url, content=b"{}")).text == "ok"
            await asyncio.sleep(0.05)
        assert [len(requests) for requests in script.asked] == [1, 1]


async def test_an_old_connection_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_http, "EXPIRY_SECONDS", 0.01)
    async with scripted(OK, OK) as script, client_of() as client:
        for _ in range(2):
            await client.post(script.url, content=b"{}")
            await asyncio.sleep(0.05)
        assert [len(requests) for requests in script.asked] == [1, 1]


async def test_no_more_connections_are_kept_than_may() -> None:
    async with scripted(*[OK] * 8) as script, client_of(most_idle=1) as client:
        for _ in range(2):
            await asyncio.gather(*(client.post(script.url, content=b"{}") for _ in range(4)))
        assert sorted(len(requests) for requests in script.asked) == [1] * 6 + [2]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end<close>", b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
            b"abcde",
        ),
    ],
)
async def test_every_way_to_end_a_body(answer: bytes, body: bytes) -> None:
    async with scripted(answer) as script, client_of() as client:
        reply = await client.post(script.url, content=b"{}")
        assert reply.content == body
        assert "link" not in reply.headers


@pytest.mark.parametrize(
    "answer",
    [
        CLOSE,
        b"HTTP/1.1 200 OK\r\ncontent-le<close>",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok<close>",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n<close>",
        b"SSH-2.0-OpenSSH_9.2\r\n<close>",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (LARGEST_HEAD + 1),
    ],
)
async def test_what_is_no_answer_is_a_transport_error(answer: bytes) -> None:
    async with scripted(answer, OK) as script, client_of() as client:
        with pytest.raises(httpx.TransportError):
            await asyncio.wait_for(client.post(script.url, content=b"{}"), 5)
        assert (await client.post(script.url, content=b"{}")).text == "ok"


async def test_nobody_there_is_a_connect_error() -> None:
    async with scripted() as script, client_of() as client:
        gone = script.url
    async with client_of() as client:
        with pytest.raises(httpx.ConnectError):
            await client.post(gone, content=b"{}")


@pytest.mark.parametrize("value", [b"one\r\nx-two: 2", b"one\n", b"one\0"])
async def test_a_header_is_one_header(value: bytes) -> None:
    async with scripted(OK) as script, client_of() as client:
        with pytest.raises(httpx.LocalProtocolError):
            await client.post(script.url, content=b"{}", headers=[(b"x-one", value)])
        assert not script.asked


async def test_a_slow_reader_holds_the_server_up_and_gets_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain_http, "HIGH_WATER", 1024)
    whole = bytes(range(256)) * 20_000
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(whole), whole)
    async with scripted(answer) as script, client_of() as client:
        async with client.stream("POST", script.url, content=b"{}") as reply:
            await asyncio.sleep(0.1)
            pieces = [piece async for piece in reply.aiter_raw()]
        assert b"".join(pieces) == whole
        assert len(pieces) > 1


@pytest.mark.parametrize("leave", [lambda task: task.cancel(), None])
async def test_whoever_leaves_ends_the_connection(
    leave: Callable[[asyncio.Task[None]], object] | None,
) -> None:
    begun = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok"
    async with scripted(begun, OK) as script, client_of(most=1) as client:

        async def read() -> None:
            async with client.stream("POST", script.url, content=b"{}") as reply:
                async for _ in reply.aiter_raw():
                    if leave is None:
                        break

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        if leave is not None:
            leave(task)
        await asyncio.wait({task})
        await asyncio.wait_for(script.closed.wait(), 5)
        assert (await client.post(script.url, content=b"{}")).text == "ok"
