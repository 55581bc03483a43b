"""A real HTTP server that stands in for a model provider: it answers, and fails, as a test says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "HANG",
    "Received",
    "Reply",
    "StandInServer",
    "chunk",
    "completion",
    "events",
    "failing",
    "sends",
    "unused_port",
]

HANG = threading.Event()
"""A piece that never comes."""

Piece = bytes | float | threading.Event
"""Of a body: bytes, seconds to wait, or what to wait for."""

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    data: bytes

    @property
    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.data))


@dataclass(frozen=True, slots=True)
class Reply:
    """One response.

    Attributes:
        status: 0 is none: the connection is cut in its place.
        before: what comes before the status line; no bytes.
        chunked: whether each of the pieces is a chunk, or the length is declared.
        drop: whether the connection is cut in place of the end.
    """

    pieces: Sequence[Piece] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Sequence[Piece] = ()
    chunked: bool = False
    drop: bool = False

    def head(self) -> bytes:
        size = sum(len(piece) for piece in self.pieces if isinstance(piece, bytes))
        length = {"content-length": str(size + 100 * self.drop)}
        framing = {"transfer-encoding": "chunked"} if self.chunked else length
        lines = [f"{name}: {value}" for name, value in {**framing, **self.headers}.items()]
        return "\r\n".join([f"HTTP/1.1 {self.status} Said", *lines, "", ""]).encode()


def sends(value: Any, status: int = 200, **headers: str) -> Reply:
    """JSON; `retry_after` as a keyword is the header `retry-after`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(
        [json.dumps(value).encode()], status, {"content-type": "application/json", **named}
    )


def completion(content: str | None = "Hello.", **message: Any) -> Reply:
    """A whole answer."""
    said = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
    return sends(
        {
            "id": "chatcmpl-theirs",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "their-model-2026",
            "choices": [choice],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
    )


def failing(status: int, message: str = "Not now.", **headers: str) -> Reply:
    """An OpenAI error object."""
    error = {"message": message, "type": "their_type", "code": "their_code", "param": "their_param"}
    return sends({"error": error}, status, **headers)


def chunk(content: str, **more: Any) -> dict[str, Any]:
    """One chunk of a streamed answer."""
    return {
        "id": "chatcmpl-theirs",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "their-model-2026",
        "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}],
        **more,
    }


def events(*pieces: dict[str, Any] | Piece, done: bool = True, drop: bool = False) -> Reply:
    """A stream of server-sent events; an object among the pieces is one of them."""
    encoded = [
        f"data: {json.dumps(piece)}\n\n".encode() if isinstance(piece, dict) else piece
        for piece in pieces
    ]
    return Reply(
        [*encoded, DONE] if done else encoded,
        headers={"content-type": "text/event-stream"},
        chunked=True,
        drop=drop,
    )


class StandInServer:
    """Serves on a free port from a thread of its own.

    Attributes:
        requests: what it received.
        connections: how many were opened.
        cut_off: set once a client has gone before it had all of its reply.
        answering: replies that are being sent.
        most: the most of them at a time.
        otherwise: what it answers where no reply is left.
    """

    def __init__(self) -> None:
        self._replies: deque[Reply] = deque()
        self.answering = 0
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(10)
        self.forget()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def says(self, *replies: Reply) -> None:
        """The next replies; after them it says hello."""
        self._replies.extend(replies)

    def forget(self) -> None:
        self._replies.clear()
        while self.answering:
            time.sleep(0.005)
        self.requests: list[Received] = []
        self.connections = self.most = 0
        self.otherwise: Callable[[Received], Reply] = lambda _: completion()
        self.cut_off = threading.Event()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        async def listen() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self._port = server.sockets[0].getsockname()[1]
            self._listening.set()

        self._loop.run_until_complete(listen())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        following = asyncio.ensure_future(reader.read(1))
        try:
            while first := await following:
                self.requests.append(await _read(first, reader))
                following = asyncio.ensure_future(reader.read(1))
                reply = (
                    self._replies.popleft() if self._replies else self.otherwise(self.requests[-1])
                )
                if not await self._sent(reply, writer, following):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.cut_off.set()
        finally:
            following.cancel()
            writer.close()

    async def _sent(
        self, reply: Reply, writer: asyncio.StreamWriter, gone: asyncio.Future[bytes]
    ) -> bool:
        """Whether the connection can be used again."""
        self.answering += 1
        self.most = max(self.most, self.answering)
        sending = asyncio.ensure_future(_send(reply, writer))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self.cut_off.set()
                return False
            return sending.result()
        finally:
            sending.cancel()
            self.answering -= 1


async def _read(first: bytes, reader: asyncio.StreamReader) -> Received:
    head = (first + await reader.readuntil(b"\r\n\r\n")).decode()
    start, *lines = head.strip().split("\r\n")
    method, path, _ = start.split(" ")
    pairs = (line.split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in pairs}
    data = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, path, headers, data)


async def _send(reply: Reply, writer: asyncio.StreamWriter) -> bool:
    async for _ in _in_time(reply.before):
        raise AssertionError("no bytes come before the status line")
    if not reply.status:
        writer.transport.abort()
        return False
    writer.write(reply.head())
    async for piece in _in_time(reply.pieces):
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if reply.chunked else piece)
        await writer.drain()
    if reply.drop:
        return False
    if reply.chunked:
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


async def _in_time(pieces: Iterable[Piece]) -> Any:
    """The bytes among the pieces, when their time has come."""
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        elif isinstance(piece, threading.Event):
            while not piece.is_set():
                await asyncio.sleep(0.005)
        else:
            await asyncio.sleep(piece)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
