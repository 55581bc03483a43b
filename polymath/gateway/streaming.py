"""Answers over a connection that may go away: server-sent events, and work that ends with it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polymath.errors import PolymathError
from polymath.proxy import Events

__all__ = ["EventStream", "unless_disconnected"]

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """JSON objects as server-sent events (WHATWG HTML, section 9.2), ended by OpenAI's `[DONE]`.

    Args:
        events: the objects; a PolymathError among them becomes an error event, the last one. They
            are closed when the stream is over, however it ends.
        named: every event says its `type` on a line of its own, and no `[DONE]` ends the stream: as
            in the responses API.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        headers: Mapping[str, str],
        named: bool = False,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers})
        del self.headers["content-length"]
        self._events = events
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._encoded():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _encoded(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                name = f"event: {event['type']}\n".encode() if self._named else b""
                yield name + b"data: " + orjson.dumps(event) + b"\n\n"
        except PolymathError as error:
            yield b"data: " + orjson.dumps(error.body()) + b"\n\n"
        if not self._named:
            yield DONE


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None, and `work` ended, if the client goes away before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})  # what `work` uses can be closed now


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
