"""`POST /v1/responses`: OpenAI's newer API, for text, on top of the chat API.

Nothing is kept between requests: `store` may be given and is answered with `false`, and what needs
a kept response (`previous_response_id`, `conversation`, `background`) is refused, as are tools. The
conversation so far is sent along as `input`, in which a response's `output` may stand as it came.

The id of a response is that of the chat completion behind it with `resp_` in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from polymath.gateway.endpoint import Shared, entered, in_words_of, json_response
from polymath.gateway.middleware import CLIENT_CLOSED_REQUEST
from polymath.gateway.protocol import MAX_METADATA, Wire
from polymath.gateway.response_events import ResponseEvents, whole_response
from polymath.gateway.streaming import EventStream, unless_disconnected
from polymath.proxy import Body

__all__ = ["ResponseRequest", "create_response"]

PARTS = {
    "input_text": frozenset({"type", "text"}),
    "output_text": frozenset({"type", "text", "annotations", "logprobs"}),
}
"""Types of parts that have a text, and what else may stand in them."""
CHAT_FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def _content(value: Any) -> Any:
    """A list of text parts as one text, as in the chat API."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        known = PARTS.get(kind) if isinstance(kind, str) else None
        if known is None or not isinstance(part.get("text"), str) or not part.keys() <= known:
            raise PydanticCustomError(
                "unsupported_part",
                "part {index} is of type {kind}; only input_text and output_text are supported",
                {"index": index, "kind": str(kind)},
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _items(value: Any) -> Any:
    """A text as what a user says."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_TEXT_SCHEMA = {"type": "string"}
_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TEXT_SCHEMA,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"enum": list(PARTS)}, "text": _TEXT_SCHEMA},
                "required": ["type", "text"],
            },
        },
    ]
}
_ITEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": _CONTENT_SCHEMA,
    },
    "required": ["role", "content"],
}


class InputItem(Wire):
    """One turn; what else stands in an item of a response's `output` changes nothing."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def turn(self) -> dict[str, str]:
        """The turn in the chat API's format."""
        return {"role": self.role, "content": self.content}


class TextFormat(Wire):
    """What the answer must be: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_when_needed(self) -> TextFormat:
        for name, given in (("name", self.name), ("schema", self.json_schema)):
            if (self.type == "json_schema") != (given is not None):
                raise PydanticCustomError(
                    "disagreement",
                    "{reason}",
                    {
                        "param": f"text.format.{name}",
                        "reason": "goes with type json_schema, and only with it",
                    },
                )
        return self

    def as_given(self) -> dict[str, Any]:
        """In the words of this API."""
        return self.model_dump(by_alias=True, exclude_none=True)

    def response_format(self) -> dict[str, Any]:
        """In the words of the chat API."""
        if self.type != "json_schema":
            return {"type": self.type}
        described = self.as_given()
        return {"type": described.pop("type"), "json_schema": described}


class TextOptions(Wire):
    """How the answer's text is to be."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat = TextFormat()


class ResponseStreamOptions(Wire):
    """Streams are never padded against eavesdroppers."""

    include_obfuscation: Literal[False] = False


class ResponseRequest(Wire):
    """Body of `POST /v1/responses`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "service_tier": ("auto", "default"),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "truncation": ("disabled",),
    }

    model: str
    input: Annotated[
        list[InputItem],
        Field(min_length=1),
        BeforeValidator(_items),
        WithJsonSchema(
            {"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]}
        ),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    text: TextOptions = TextOptions()
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool = False
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    timeout: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "disagreement",
                "{reason}",
                {"param": "stream_options", "reason": "is only allowed when stream is true"},
            )
        return self

    def chat(self) -> Body:
        """The chat request."""
        told = [] if self.instructions is None else [self.instructions]
        messages = [{"role": "system", "content": text} for text in told]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages + [item.turn() for item in self.input],
            "stream": self.stream,
            **self.model_dump(
                include={"temperature", "top_p", "user", "timeout"}, exclude_none=True
            ),
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.max_output_tokens is not None:
            body["max_tokens"] = self.max_output_tokens
        if self.text.format.type != "text":
            body["response_format"] = self.text.format.response_format()
        if self.include or self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return body

    def repeated(self) -> dict[str, Any]:
        """What the response says again of the request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_logprobs": self.top_logprobs or 0,
            "text": {"format": self.text.format.as_given()},
            "metadata": self.metadata,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "prompt_cache_key": self.prompt_cache_key,
            "parallel_tool_calls": self.parallel_tool_calls,
            "background": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }


async def create_response(body: ResponseRequest, request: Request, gateway: Shared) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    with in_words_of(CHAT_FIELDS):
        visit = await entered(gateway, body.chat(), request)
        if body.stream:
            chunks = await unless_disconnected(request.receive, visit.stream())
            if chunks is not None:
                events = ResponseEvents(chunks, body.repeated(), visit.decision.expert)
                return EventStream(events, visit.headers, named=True)
        else:
            reply = await unless_disconnected(request.receive, visit.whole())
            if reply is not None:
                return json_response(whole_response(reply, body.repeated()), headers=visit.headers)
    return Response(status_code=CLIENT_CLOSED_REQUEST)
