"""Requests of the OpenAI chat completions API, as far as they are supported.

Field names and limits are those of the OpenAI API reference; `top_k`, `min_p`, `ignore_eos` and
`guided_*` are vLLM's. A
field that is not listed here is refused by name, never ignored. `null` means absent, as in OpenAI,
and so do the values in `NEUTRAL`, which ask for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from polymath.experts import GrammarKind, GrammarSpec

__all__ = [
    "ChatBody",
    "ChatMessage",
    "ChatRequest",
    "LoadAdapterRequest",
    "RouteRequest",
    "StreamOptions",
    "UnloadAdapterRequest",
]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Values of unsupported fields that change nothing, so that they need not be refused."""

MAX_STOPS = 4
MAX_METADATA = 16


def _content_text(value: Any) -> Any:
    """A list of text parts as one text, the parts on lines of their own as in vLLM."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            raise PydanticCustomError(
                "unsupported_part",
                "part {index} is of type {kind}; only text parts (type and text) are supported",
                {"index": index, "kind": str(kind)},
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
        raise PydanticCustomError("stop_type", "must be a non-empty string or a list of them")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop_length", f"at most {MAX_STOPS} stop strings are allowed")
    return tuple(stops)


Content = Annotated[
    str,
    BeforeValidator(_content_text),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]

Stops = Annotated[
    tuple[str, ...],
    BeforeValidator(_stop_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "maxItems": MAX_STOPS,
                },
            ]
        }
    ),
]

Bias = Annotated[float, Field(ge=-100, le=100)]


class Wire(BaseModel):
    """A JSON object from a client: exact types, no unknown field, `null` for absent.

    Attributes:
        neutral: of each unsupported field, the values that are taken for absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: given
            for name, given in value.items()
            if given is not None
            and not (name not in cls.model_fields and given in cls.neutral.get(name, ()))
        }


class ChatMessage(Wire):
    """One turn; `developer` is the newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def turn(self) -> dict[str, str]:
        """The turn in Hugging Face's chat format."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class StreamOptions(Wire):
    """What a stream carries besides the text."""

    include_usage: bool = False


class JsonSchemaFormat(Wire):
    """`json_schema` of OpenAI's structured outputs; `strict` changes nothing: it always is."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Wire):
    """What the answer must be: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_when_needed(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _disagreement(
                "response_format.json_schema", "goes with type json_schema, and only with it"
            )
        return self


class PolymathOptions(Wire):
    """What OpenAI has no word for.

    Attributes:
        attribution: say for each token which expert raised its probability most, and all weights.
        alpha: in place of the config's, of an expert that is proxy-tuned.
    """

    attribution: bool = False
    alpha: float | None = None


class ChatRequest(Wire):
    """Body of `POST /v1/chat/completions`, as the engine understands it."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[Annotated[int, Strict(False), Field(ge=0)], Bias] = Field(default_factory=dict)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = Field(default=None, min_length=1)
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, min_length=1
    )
    guided_grammar: str | None = Field(default=None, min_length=1)
    ignore_eos: bool = False
    polymath: PolymathOptions = PolymathOptions()
    user: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=MAX_METADATA)

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _disagreement("top_logprobs", "needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise _disagreement("stream_options", "is only allowed when stream is true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise _disagreement("max_tokens", "contradicts max_completion_tokens; give one of them")
        if len(specs := self._grammars()) > 1:
            first, second, *_ = specs
            raise _disagreement(second.param, f"contradicts {first.param}; give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """The longest answer that the client wants, in tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the answer must match, if anything."""
        return next(iter(self._grammars()), None)

    def _grammars(self) -> list[GrammarSpec]:
        guided: tuple[tuple[GrammarKind, str], ...] = (
            ("json_schema", "guided_json"),
            ("regex", "guided_regex"),
            ("choice", "guided_choice"),
            ("grammar", "guided_grammar"),
        )
        specs = [
            GrammarSpec(kind, getattr(self, field), field)
            for kind, field in guided
            if getattr(self, field) is not None
        ]
        wanted = self.response_format
        if wanted is not None and wanted.type != "text":
            schema = wanted.json_schema.json_schema if wanted.json_schema else {"type": "object"}
            specs.insert(0, GrammarSpec("json_schema", schema, "response_format"))
        return specs

    def conversation(self) -> list[dict[str, str]]:
        """The turns in Hugging Face's chat format."""
        return [message.turn() for message in self.messages]


class ChatBody(BaseModel):
    """Body of `POST /v1/chat/completions`, as far as must be known to choose who answers.

    What else there is goes to an upstream as it came; the engine is stricter (`ChatRequest`).
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool | None = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """That of a request to the engine, which is documented."""
        return handler(ChatRequest.__pydantic_core_schema__)


class LoadAdapterRequest(Wire):
    """Body of `POST /v1/load_lora_adapter`, vLLM's; `base_model` where there are several."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)
    lora_path: str = Field(min_length=1)
    base_model: str | None = None


class UnloadAdapterRequest(Wire):
    """Body of `POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: str


class RouteRequest(Wire):
    """Body of `POST /v1/route`: a conversation, or `input` as a single user turn."""

    model: str = "polymath"
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    input: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "RouteRequest":
        if (self.messages is None) == (self.input is None):
            raise _disagreement("messages", "give either messages or input")
        return self

    def conversation(self) -> list[dict[str, str]]:
        """The turns in Hugging Face's chat format."""
        if self.messages is None:
            return [{"role": "user", "content": self.input or ""}]
        return [message.turn() for message in self.messages]


def _disagreement(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("disagreement", "{reason}", {"param": param, "reason": message})
