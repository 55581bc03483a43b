"""`POST /v1/embeddings`: texts as vectors of unit length, by the router's sentence encoder.

The encoder is made for prompts: of a text of more than 256 tokens it reads the start and the end
(`polymath.router.encoder`), and `usage` counts the tokens that were read.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Request
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from polymath.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
)
from polymath.gateway.access import Used
from polymath.gateway.endpoint import Shared, json_response
from polymath.gateway.middleware import CLIENT_CLOSED_REQUEST
from polymath.gateway.protocol import Wire
from polymath.gateway.request_limits import CHARACTERS_PER_TOKEN
from polymath.gateway.settings import ROUTED_MODELS
from polymath.gateway.streaming import unless_disconnected
from polymath.router import Embedder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EmbeddingRequest", "create_embeddings"]

MODEL = "polymath-encoder"
MAX_INPUTS = 2048
"""OpenAI's."""
AT_ONCE = 16
"""Texts that are encoded together; then the prompts that wait to be routed have their turn."""


def _texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise PydanticCustomError("input_type", "must be a string or a non-empty list of strings")
    if len(texts) > MAX_INPUTS:
        raise PydanticCustomError("input_length", f"at most {MAX_INPUTS} texts are allowed")
    if any(isinstance(text, int | list) for text in texts):
        raise PydanticCustomError("input_tokens", "token ids are not supported; give text")
    return texts


Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_texts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": MAX_INPUTS,
                },
            ]
        }
    ),
]


class EmbeddingRequest(Wire):
    """Body of `POST /v1/embeddings`; `dimensions` may only be those that there are."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


async def create_embeddings(body: EmbeddingRequest, request: Request, gateway: Shared) -> Response:
    """Embed texts."""
    live = gateway.live
    limits = live.settings.limits
    characters = sum(map(len, body.input))
    if characters > limits.max_characters:
        raise RequestTooLarge(
            f"input: {characters} characters are more than the {limits.max_characters} that are "
            "served here.",
            param="input",
        )
    estimate = -(-characters // CHARACTERS_PER_TOKEN)
    used, ticket = Used(MODEL), None
    gateway.door.take_place(live)
    try:
        ticket = await gateway.access.admit(request.headers.get("authorization"), estimate)
        embedder = _embedder(body.model, live.embedder)
        async with asyncio.timeout(limits.timeout):
            reply = await unless_disconnected(request.receive, _embedded(body, embedder))
        if reply is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        used = Used(MODEL, reply["usage"]["prompt_tokens"])
        return json_response(reply, headers=ticket.headers)
    except TimeoutError:
        raise DeadlineExceeded(f"It took longer than {limits.timeout:g} seconds.") from None
    finally:
        gateway.door.leave(live, ticket, used)


def _embedder(model: str, embedder: Embedder | None) -> Embedder:
    names = (MODEL, *ROUTED_MODELS)
    if model not in names:
        raise ModelNotFound(
            f"The model {model!r} does not exist, or makes no embeddings. Available models: "
            f"{', '.join(names)}.",
            param="model",
        )
    if embedder is None:
        raise ModelNotFound(
            "There are no embeddings here: the router of this gateway has no sentence encoder.",
            param="model",
        )
    return embedder


async def _embedded(body: EmbeddingRequest, embedder: Embedder) -> dict[str, Any]:
    """The list of embeddings, in the order of the texts."""
    data: list[dict[str, Any]] = []
    tokens = 0
    for start in range(0, len(body.input), AT_ONCE):
        texts = body.input[start : start + AT_ONCE]
        vectors, read = await asyncio.to_thread(_read, embedder, texts)
        if body.dimensions not in (None, vectors.shape[1]):
            raise InvalidRequest(
                f"dimensions: this model has {vectors.shape[1]} dimensions, and no others.",
                param="dimensions",
            )
        tokens += read
        for index, vector in enumerate(vectors, start):
            embedding = _written(vector, body.encoding_format)
            data.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": MODEL, "usage": usage}


def _read(embedder: Embedder, texts: list[str]) -> tuple[NDArray[np.float32], int]:
    return embedder.embed(texts), embedder.count_tokens(texts)


def _written(vector: NDArray[np.float32], form: str) -> str | list[float]:
    """Numbers, or base64 of their bytes, little-endian."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
