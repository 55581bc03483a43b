"""Every failure as an OpenAI error body: ours, a malformed request's, and the unexpected."""

import logging
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from polymath.errors import InvalidRequest, PolymathError, UnsupportedParameter
from polymath.gateway.json_logs import REQUEST_ID

__all__ = ["error_response", "first_problem", "handle_failures"]

logger = logging.getLogger(__name__)

MAX_MESSAGE = 600
"""Characters of a message; a client's own huge value is not sent back whole."""


class HttpError(PolymathError):
    """A failure of the HTTP layer itself: no such path, wrong method."""

    type = "invalid_request_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def handle_failures(app: FastAPI) -> None:
    """Install the handlers."""

    @app.exception_handler(PolymathError)
    async def ours(request: Request, error: PolymathError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_response(first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(HttpError(error.status_code, message))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.exception("unexpected failure", exc_info=error)
        failure = PolymathError("The server failed unexpectedly; it has been logged.")
        response = error_response(failure)
        response.headers["x-request-id"] = REQUEST_ID.get()  # no middleware sees this response
        return response


def error_response(error: PolymathError) -> Response:
    """The error as a JSON response with its status and headers."""
    body = orjson.dumps(error.body())
    return Response(body, error.status, error.headers, "application/json")


def first_problem(details: Sequence[Any], root: tuple[str, ...] = ("body",)) -> PolymathError:
    """The first of pydantic's problems with a request.

    Args:
        root: where the request stands in the locations.
    """
    detail = details[0]
    path = _param(detail["loc"][len(root) :])
    kind = detail["type"]
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {detail['ctx']['error']}.")
    if kind == "extra_forbidden":
        return UnsupportedParameter(
            f"Unsupported parameter: {path!r} is not supported.", param=path
        )
    param = detail.get("ctx", {}).get("param", path) or None
    if kind == "missing":
        missing = path or "a JSON body"
        return InvalidRequest(f"Missing required parameter: {missing!r}.", param=param)
    message = f"Invalid value for {param or 'the body'!r}: {detail['msg']}."
    return InvalidRequest(message[:MAX_MESSAGE], param=param)


def _param(location: Sequence[str | int]) -> str:
    """`messages[0].content`, as OpenAI writes it; a client's own huge key is cut."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:MAX_MESSAGE]
