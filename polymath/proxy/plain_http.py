"""HTTP/1.1 without TLS for httpx, at a fraction of the time: llhttp's parser on asyncio transports.

Upstreams that models run in stand next door and speak plain HTTP; there httpx's own transport is
what costs most of a request that is handed on. It stays in use for `https://` and for proxies.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import httptools
import httpx

__all__ = ["PlainTransport"]

EXPIRY_SECONDS = 4.0
"""An idle connection is used no longer: servers close theirs, uvicorn after 5 seconds."""
LARGEST_HEAD = 100 * 1024
"""Bytes of status line and headers, as in h11."""
HIGH_WATER = 256 * 1024
"""Bytes of a body that may wait to be read until the server is held up."""
INTERIM = range(100, 200)
"""Statuses that come before the answer (RFC 9110, section 15.2)."""
PLAIN_PORT = 80
CONTROL = re.compile(rb"[\r\n\0]")


class PlainTransport(httpx.AsyncBaseTransport):
    """Connections to one server, kept for the next request.

    Args:
        most: connections; more requests wait for one.
        most_idle: of them, kept while nothing is asked.
    """

    def __init__(self, most: int, most_idle: int) -> None:
        self._places = asyncio.Semaphore(most)
        self._most_idle = most_idle
        self._idle: deque[_Connection] = deque()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its answer, whose body is still to come.

        Raises:
            httpx.TransportError: it cannot be sent, or is not answered.
        """
        data = _head(request) + request.content
        await self._places.acquire()
        connection: _Connection | None = None
        try:
            connection = self._kept() or await _connected(request)
            await connection.ask(data)
        except BaseException:
            self._give_back(connection)
            raise
        body = _Body(self, connection)
        return httpx.Response(connection.status, headers=connection.headers, stream=body)

    async def aclose(self) -> None:
        """Close the connections that are idle."""
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> _Connection | None:
        """The connection that was used last, if the server has not closed it."""
        oldest = time.monotonic() - EXPIRY_SECONDS
        while self._idle and (self._idle[0].idle_since < oldest or self._idle[0].gone):
            self._idle.popleft().close()
        while self._idle:
            connection = self._idle.pop()
            if not connection.gone:
                return connection
        return None

    def _give_back(self, connection: _Connection | None) -> None:
        self._places.release()
        if connection is None:
            return
        if connection.reusable and len(self._idle) < self._most_idle:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()


class _Body(httpx.AsyncByteStream):
    """What follows the headers of an answer."""

    def __init__(self, transport: PlainTransport, connection: _Connection) -> None:
        self._transport = transport
        self._connection: _Connection | None = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while connection is not None and (piece := await connection.piece()):
            yield piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport._give_back(connection)


class _Connection(asyncio.Protocol):
    """One connection, with one answer at a time; its parser calls the `on_` methods.

    Attributes:
        status, headers: of the answer.
        gone: the server has closed it, or sent what nobody asked for.
        idle_since: on the monotonic clock.
    """

    status = 0
    idle_since = 0.0

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.gone = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport: Any = None
        self._waiting: asyncio.Future[None] | None = None
        self._failure: httpx.TransportError | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._paused = False
        self._head_bytes = 0
        self._kept_alive = False
        self._begun = False
        self._over = True

    @property
    def reusable(self) -> bool:
        """Whether the answer was read to its end and another request may follow."""
        return self._over and not self._pieces and self._kept_alive and not self.gone

    async def ask(self, data: bytes) -> None:
        """Send a request and wait for the headers of its answer.

        Raises:
            httpx.TransportError: there is none.
        """
        if self.gone:
            raise httpx.ReadError("the server closed the connection")
        self.headers = []
        self._head_bytes = 0
        self._begun = self._over = False
        self._transport.write(data)
        while not self._begun:
            await self._news()

    async def piece(self) -> bytes:
        """What has come of the body since the last call; nothing at its end.

        Raises:
            httpx.TransportError: it breaks off.
        """
        while not self._pieces:
            if self._over:
                return b""
            await self._news()
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        if self._paused and not self.gone:
            self._transport.resume_reading()
        self._paused = False
        return data

    def close(self) -> None:
        """End it, whatever is still to come."""
        self.gone = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(f"this is no answer in HTTP: {error}"))
            return
        if not self._begun:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self._fail(httpx.RemoteProtocolError("the headers are too large"))
        elif self._held > HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._tell()

    def eof_received(self) -> None:
        self._ended(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(error)

    def on_message_begin(self) -> None:
        if self._over:
            raise ValueError("it answers more than was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status in INTERIM:
            self.headers = []
        else:
            self._begun = True
            self._kept_alive = bool(self._parser.should_keep_alive())

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._held += len(data)

    def on_message_complete(self) -> None:
        self._over = self._begun

    async def _news(self) -> None:
        """Wait for something to come in.

        Raises:
            httpx.TransportError: the connection failed.
        """
        if self._failure is not None:
            raise self._failure
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _tell(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _ended(self, error: Exception | None) -> None:
        """The server is gone; that ends an answer of unknown length, and breaks any other."""
        self.gone = True
        if self._over:
            return
        if error is None and self._begun and not self._delimited():
            self._over = True
            self._tell()
        elif self._begun:
            self._fail(httpx.RemoteProtocolError("the answer breaks off"))
        elif error is not None:
            self._fail(httpx.ReadError(str(error)))
        else:
            self._fail(httpx.RemoteProtocolError("the server closed the connection unasked"))

    def _delimited(self) -> bool:
        """Whether the headers say where the body ends (RFC 9112, section 6.3)."""
        return any(
            name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        )

    def _fail(self, failure: httpx.TransportError) -> None:
        if self._failure is None:
            self._failure = failure
        self.close()
        self._tell()


async def _connected(request: httpx.Request) -> _Connection:
    seconds = request.extensions.get("timeout", {}).get("connect")
    host, port = request.url.raw_host.decode("ascii").strip("[]"), request.url.port or PLAIN_PORT
    try:
        async with asyncio.timeout(seconds):
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, host, port)
    except TimeoutError as error:
        raise httpx.ConnectTimeout("connecting took too long") from error
    except OSError as error:
        raise httpx.ConnectError(str(error)) from error
    return connection


def _head(request: httpx.Request) -> bytes:
    """The request line and the headers.

    Raises:
        httpx.LocalProtocolError: a header would be read as several.
    """
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    if any(CONTROL.search(line) for line in lines):
        raise httpx.LocalProtocolError("a header holds a line break")
    return b"\r\n".join([*lines, b"", b""])
