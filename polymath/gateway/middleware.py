"""What happens to every request before any endpoint sees it, and to every response after it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymath.errors import HeadersTooLarge, PolymathError, RequestTimeout, RequestTooLarge
from polymath.gateway.failures import error_response
from polymath.gateway.json_logs import REQUEST_ID

__all__ = ["BodyLimit", "Counted", "RequestId"]

MAX_ID = 128
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; nobody sees it but the metrics."""

SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""For a browser that is led to an API (OWASP REST Security Cheat Sheet)."""
PAGES = ("/docs", "/redoc")
"""They load scripts."""


class RequestId:
    """Gives every response the `x-request-id` that the client sent, or a new one, and the security
    headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        usable = given.isascii() and given.isprintable() and 0 < len(given) <= MAX_ID
        request_id = given if usable else f"req_{uuid.uuid4().hex}"
        REQUEST_ID.set(request_id)

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if not scope["path"].startswith(PAGES):
                    for name, value in SECURITY.items():
                        headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_id)


class Counted:
    """Tells of every response when it is over.

    Args:
        tell: method, path of the route, status, seconds.
    """

    def __init__(self, app: ASGIApp, tell: Callable[[str, str, int, float], None]) -> None:
        self._app = app
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:  # whoever called this makes an answer of it
            status = PolymathError.status
            raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "unmatched")
            self._tell(scope["method"], path, status, time.perf_counter() - started)


class BodyLimit:
    """Refuses a request whose headers or body are too large, without reading it to the end, and one
    whose body is too slow.

    Args:
        seconds: for the whole body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_header_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_header_bytes = max_header_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
            error = HeadersTooLarge(f"The headers are larger than {self._max_header_bytes} bytes.")
            return await error_response(error)(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return await error_response(self._too_large())(scope, receive, send)
        await self._watched(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        begun = whole = False
        refusal: PolymathError | None = None
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def counted() -> Message:
            nonlocal received, whole, refusal
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                refusal = RequestTimeout(f"The body took longer than {self._seconds:g} seconds.")
                return {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._max_bytes:
                refusal = self._too_large()
                return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal begun
            if refusal is None:
                begun = True
                await send(message)

        await self._app(scope, counted, unless_refused)
        if refusal is not None and not begun:
            await error_response(refusal)(scope, receive, send)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than {self._max_bytes} bytes.")
