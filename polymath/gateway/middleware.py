"""What happens to every request before any endpoint sees it: an id, and a limit to its body."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymath.errors import RequestTooLarge
from polymath.gateway.failures import error_response

__all__ = ["BodyLimit", "RequestId"]

MAX_ID = 128


class RequestId:
    """Gives every response the `x-request-id` that the client sent, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        usable = given.isascii() and given.isprintable() and 0 < len(given) <= MAX_ID
        request_id = given if usable else f"req_{uuid.uuid4().hex}"

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


class BodyLimit:
    """Refuses a body of more than `max_bytes` with 413, without reading it to the end."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "0")
        received = int(declared) if declared.isdigit() else 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self._max_bytes else message

        async def unless_too_large(message: Message) -> None:
            if received <= self._max_bytes:
                await send(message)

        if received <= self._max_bytes:
            received = 0
            await self._app(scope, counted, unless_too_large)
        if received > self._max_bytes:
            error = RequestTooLarge(f"The request body is larger than {self._max_bytes} bytes.")
            await error_response(error)(scope, receive, send)
