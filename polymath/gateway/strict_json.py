"""Request bodies as strict JSON (RFC 8259): no NaN, no half characters, no surprises later."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

__all__ = ["StrictJsonRoute"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictJsonRequest(Request):
    """A request whose JSON is read by orjson, which refuses what RFC 8259 does not allow."""

    async def json(self) -> Any:
        """The body as Python values; `json.JSONDecodeError` if it is not JSON."""
        return orjson.loads(await self.body())


class StrictJsonRoute(APIRoute):
    """A route that hands its endpoint a `StrictJsonRequest`."""

    def get_route_handler(self) -> Handler:
        """The handler of the route around the stricter request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict
