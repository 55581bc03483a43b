"""What endpoints share: their gateway, its door, JSON replies, the words of an API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from starlette.responses import Response

from polymath.errors import PolymathError
from polymath.gateway.gateway import Gateway
from polymath.gateway.json_logs import REQUEST_ID
from polymath.gateway.visit import Visit

__all__ = ["Shared", "chat_id", "entered", "in_words_of", "json_response"]

FIRST_NAME = re.compile(r"[^.\[]+")
PREFIX = re.compile(r"^(cmpl-|resp_)")


async def _gateway(request: Request) -> Gateway:  # which FastAPI calls without a thread
    gateway: Gateway = request.app.state.gateway
    return gateway


Shared = Annotated[Gateway, Depends(_gateway)]


async def entered(gateway: Gateway, asked: Mapping[str, Any], request: Request) -> Visit:
    """Let a chat request in.

    Raises:
        PolymathError: it is not let in.
    """
    return await gateway.door.enter(gateway.live, asked, request.headers, REQUEST_ID.get())


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Anything as a JSON response."""
    return Response(orjson.dumps(body), status, headers, "application/json")


def chat_id(given: str) -> str:
    """Of the chat completion behind an answer of another API: what follows that API's prefix."""
    return PREFIX.sub("", given)


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Have failures of a translated request name the field that the client gave.

    Args:
        names: field of the chat API -> what it is called in the client's.
    """
    try:
        yield
    except PolymathError as error:
        found = FIRST_NAME.match(error.param or "")
        if found is not None and found[0] in names:
            said, meant = str(error.param), names[found[0]]
            error.param = meant
            error.message = error.message.replace(repr(said), repr(meant))
            if error.message.startswith(f"{said}:"):
                error.message = meant + error.message.removeprefix(said)
        raise
