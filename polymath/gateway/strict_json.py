"""Request bodies as strict JSON (RFC 8259): no NaN, no half characters, no surprises later."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from polymath.gateway.request_limits import check_depth

__all__ = ["strict_json_route"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def strict_json_route(max_depth: int) -> type[APIRoute]:
    """A route whose requests read their JSON by orjson, which refuses what RFC 8259 does not allow,
    and what is nested deeper than `max_depth`."""

    class StrictJsonRequest(Request):
        """A request that reads its body so."""

        async def json(self) -> Any:
            """The body as Python values; `json.JSONDecodeError` if it is not JSON."""
            body = await self.body()
            value = orjson.loads(body)
            check_depth(body, value, max_depth)
            return value

    class StrictJsonRoute(APIRoute):
        """A route that hands its endpoint such a request."""

        def get_route_handler(self) -> Handler:
            """The handler of the route around the stricter request."""
            handler = super().get_route_handler()

            async def strict(request: Request) -> Response:
                return await handler(StrictJsonRequest(request.scope, request.receive))

            return strict

    return StrictJsonRoute
