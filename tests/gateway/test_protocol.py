"""Requests as OpenAI's clients send them: what is understood, and what is refused by name."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from polymath.experts import GrammarSpec
from polymath.gateway.protocol import (
    ChatMessage,
    ChatRequest,
    LoadAdapterRequest,
    RouteRequest,
    UnloadAdapterRequest,
)

HELLO = {"role": "user", "content": "Hello"}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "polymath", "messages": [HELLO], **fields})


def message(**fields: Any) -> ChatMessage:
    return ChatMessage.model_validate(fields)


def problems(model: type[BaseModel], fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Place (or the `param` that is at fault) and message of each problem."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(fields)
    return [
        (".".join(map(str, e["loc"])) or e.get("ctx", {}).get("param", ""), e["msg"])
        for e in refused.value.errors()
    ]


def refused_fields(**fields: Any) -> list[str]:
    found = problems(ChatRequest, {"model": "polymath", "messages": [HELLO], **fields})
    return [place for place, _ in found]


def test_a_request_of_nothing_but_a_message_has_the_defaults_of_openai() -> None:
    plain = request()
    assert (plain.n, plain.stream, plain.logprobs, plain.logit_bias) == (1, False, False, {})
    assert plain.limit is plain.temperature is plain.top_p is plain.stop is plain.seed is None


def test_a_text_is_the_content() -> None:
    assert message(role="user", content="Hi\n").turn() == {"role": "user", "content": "Hi\n"}


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert message(role="user", content=parts) == message(role="user", content="one\ntwo")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_parts_become_lines(texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    assert message(role="user", content=parts).content == "\n".join(texts)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "text"}, "text"),
        ({"type": "text", "text": 3}, "text"),
        ({"type": "text", "text": "a", "image": "b"}, "text"),
        ({}, "None"),
        ("a plain text", "None"),
        (None, "None"),
    ],
)
def test_a_part_that_is_no_text_is_refused_with_its_index(part: object, kind: str) -> None:
    content = [{"type": "text", "text": "look:"}, part]
    ((place, reason),) = problems(ChatMessage, {"role": "user", "content": content})
    assert place == "content"
    assert "part 1" in reason
    assert kind in reason


@pytest.mark.parametrize("content", [None, 3, {"type": "text", "text": "a"}, True])
def test_a_content_of_another_kind_is_refused(content: object) -> None:
    assert problems(ChatMessage, {"role": "user", "content": content})[0][0] == "content"


def test_developer_is_the_newer_word_for_system() -> None:
    turn = message(role="developer", content="Be brief.").turn()
    assert turn == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_other_roles_stay(role: str) -> None:
    assert message(role=role, content="x").turn()["role"] == role


@pytest.mark.parametrize("role", ["tool", "function", "User", "", None, 1])
def test_an_unknown_role_is_refused(role: object) -> None:
    assert problems(ChatMessage, {"role": role, "content": "x"})[0][0] == "role"


def test_the_conversation_keeps_its_order() -> None:
    turns = [HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    assert request(messages=turns).conversation() == turns


def test_a_request_needs_a_model_and_messages() -> None:
    assert [place for place, _ in problems(ChatRequest, {})] == ["model", "messages"]
    assert refused_fields(messages=[]) == ["messages"]


NULLABLE = [
    *(name for name in ChatRequest.model_fields if name not in ("model", "messages")),
    *("tools", "audio", "reasoning_effort", "no_such_field"),
]


@pytest.mark.parametrize("name", NULLABLE)
def test_null_means_absent(name: str) -> None:
    assert request(**{name: None}) == request()


@pytest.mark.parametrize("name", ["name", "refusal", "tool_calls", "audio", "function_call"])
def test_null_means_absent_in_a_message(name: str) -> None:
    answer = {"role": "assistant", "content": "Hi", name: None}
    assert request(messages=[answer]) == request(messages=[{"role": "assistant", "content": "Hi"}])


NEUTRAL_VALUES = [
    ("ignore_eos", False),
    ("polymath", {}),
    ("polymath", {"attribution": None}),
    ("tools", []),
    ("tool_choice", "none"),
    ("functions", []),
    ("function_call", "none"),
    ("modalities", ["text"]),
    ("service_tier", "auto"),
    ("service_tier", "default"),
    ("store", False),
]


@pytest.mark.parametrize(("name", "value"), NEUTRAL_VALUES)
def test_a_value_that_asks_for_nothing_is_accepted(name: str, value: object) -> None:
    assert request(**{name: value}) == request()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_decoding_backend", "xgrammar"),
        ("structured_outputs", {"json": {}}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
        ("store", True),
        ("reasoning_effort", "low"),
        ("best_of", 2),
        ("temprature", 0.5),
    ],
)
def test_an_unsupported_field_is_refused_by_name(name: str, value: object) -> None:
    assert refused_fields(**{name: value}) == [name]


@pytest.mark.parametrize(
    ("given", "stops"),
    [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (["a"] * 4, ("a",) * 4)],
)
def test_stop_is_a_string_or_a_list(given: object, stops: tuple[str, ...]) -> None:
    assert request(stop=given).stop == stops


@pytest.mark.parametrize("stop", ["", ["a", ""], ["a"] * 5, [1], 3, {"a": 1}, [None], [["a"]]])
def test_stops_that_are_empty_too_many_or_no_text_are_refused(stop: object) -> None:
    assert refused_fields(stop=stop) == ["stop"]


def test_the_keys_of_a_bias_are_token_ids() -> None:
    assert request(logit_bias={"50256": -100, "7": 1.5}).logit_bias == {50256: -100.0, 7: 1.5}


@pytest.mark.parametrize(
    "bias",
    [{"5": 100.5}, {"5": -101}, {"-1": 1}, {"five": 1}, {"5": "1"}, {"5": True}, {"": 1}, [], 3],
    ids=str,
)
def test_a_bias_that_is_none_is_refused(bias: object) -> None:
    (place,) = refused_fields(logit_bias=bias)
    assert place.split(".")[0] == "logit_bias"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    assert refused_fields(**fields) == [param]


def test_fields_that_need_each_other_are_accepted_together() -> None:
    assert request(logprobs=True, top_logprobs=20).top_logprobs == 20
    options = request(stream=True, stream_options={"include_usage": True}).stream_options
    assert options is not None
    assert options.include_usage


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 8}, 8),
    ],
)
def test_both_names_of_the_limit_are_known(fields: dict[str, Any], limit: int | None) -> None:
    assert request(**fields).limit == limit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", "1"),
        ("n", True),
        ("n", 1.0),
        ("n", "1"),
        ("max_tokens", 5.0),
        ("seed", 1.5),
        ("stream", 1),
        ("stream", "true"),
        ("logprobs", 5),
        ("model", 3),
        ("user", 7),
        ("messages", "Hello"),
        ("messages", {"role": "user", "content": "x"}),
        ("metadata", {"a": 1}),
    ],
)
def test_a_value_of_a_neighbouring_type_is_refused(name: str, value: object) -> None:
    (place,) = refused_fields(**{name: value})
    assert place.split(".")[0] == name


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_is_finite(name: str, value: float) -> None:
    assert refused_fields(**{name: value}) == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_is_finite(value: float) -> None:
    assert refused_fields(logit_bias={"5": value}) == ["logit_bias.5"]


@pytest.mark.parametrize(
    ("name", "least", "most", "step"),
    [
        ("temperature", 0, 2, 0.01),
        ("top_p", 0, 1, 0.01),
        ("min_p", 0, 1, 0.01),
        ("frequency_penalty", -2, 2, 0.01),
        ("presence_penalty", -2, 2, 0.01),
        ("n", 1, 128, 1),
        ("seed", -(2**63), 2**63 - 1, 1),
    ],
)
def test_limits_are_those_of_openai(name: str, least: float, most: float, step: float) -> None:
    assert getattr(request(**{name: least}), name) == least
    assert getattr(request(**{name: most}), name) == most
    assert refused_fields(**{name: least - step}) == [name]
    assert refused_fields(**{name: most + step}) == [name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("max_completion_tokens", 0), ("top_k", -1), ("top_logprobs", 21)],
)
def test_counts_have_limits(name: str, value: int) -> None:
    assert refused_fields(logprobs=True, **{name: value}) == [name]


def test_metadata_is_sixteen_texts_at_most() -> None:
    pairs = {str(index): "x" for index in range(17)}
    assert refused_fields(metadata=pairs) == ["metadata"]
    del pairs["16"]
    assert request(metadata=pairs).metadata == pairs


def test_all_problems_come_at_once() -> None:
    assert refused_fields(temperature=3, n=0, stop="") == ["temperature", "stop", "n"]


@pytest.mark.parametrize("body", [None, [], "text", 3])
@pytest.mark.parametrize("model", [ChatRequest, RouteRequest])
def test_a_body_that_is_no_object_is_refused(model: type[BaseModel], body: object) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
bodies = st.dictionaries(
    st.sampled_from([*ChatRequest.model_fields, "tools", "store"]), json_values
)


@given(bodies)
def test_any_body_is_understood_or_refused(body: dict[str, Any]) -> None:
    try:
        understood = ChatRequest.model_validate(body)
    except ValidationError:
        return
    assert understood.conversation()


SCHEMA = {"type": "object", "properties": {"a": {"default": None}}}


def of_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **fields}}


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text", "json_schema": None}}, None),
        (
            {"response_format": {"type": "json_object"}},
            GrammarSpec("json_schema", {"type": "object"}, "response_format"),
        ),
        (
            {"response_format": of_schema(schema=SCHEMA, strict=True, description="d")},
            GrammarSpec("json_schema", SCHEMA, "response_format"),
        ),
        (
            {"response_format": of_schema(schema=SCHEMA, strict=False)},
            GrammarSpec("json_schema", SCHEMA, "response_format"),
        ),
        ({"guided_json": SCHEMA}, GrammarSpec("json_schema", SCHEMA, "guided_json")),
        ({"guided_regex": "[0-9]+"}, GrammarSpec("regex", "[0-9]+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, GrammarSpec("choice", ["a", "b"], "guided_choice")),
        (
            {"guided_grammar": 'root ::= "a"'},
            GrammarSpec("grammar", 'root ::= "a"', "guided_grammar"),
        ),
        (
            {"response_format": {"type": "text"}, "guided_regex": "a"},
            GrammarSpec("regex", "a", "guided_regex"),
        ),
    ],
)
def test_every_way_to_ask_for_a_form_is_one_grammar(
    fields: dict[str, Any], spec: GrammarSpec | None
) -> None:
    """The nulls in a schema are the schema's own."""
    assert request(**fields).grammar == spec


GUIDED = {
    "response_format": {"type": "json_object"},
    "guided_json": SCHEMA,
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "start: /a/",
}


@pytest.mark.parametrize(("first", "second"), combinations(GUIDED, 2))
def test_two_forms_at_once_are_refused_by_name(first: str, second: str) -> None:
    given = {second: GUIDED[second], first: GUIDED[first]}
    (problem,) = problems(ChatRequest, {"model": "polymath", "messages": [HELLO], **given})
    assert problem == (second, f"contradicts {first}; give one of them")


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {**of_schema(schema={}), "type": "text"}}, "response_format"),
        ({"response_format": of_schema()}, "response_format.json_schema.schema"),
        ({"response_format": of_schema(schema=None)}, "response_format.json_schema.schema"),
        ({"response_format": of_schema(schema=True)}, "response_format.json_schema.schema"),
        ({"response_format": of_schema(schema={}, name="")}, "response_format.json_schema.name"),
        ({"response_format": of_schema(schema={}, extra=1)}, "response_format.json_schema.extra"),
        ({"guided_json": "{}"}, "guided_json"),
        ({"guided_json": True}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice.1"),
        ({"guided_grammar": ""}, "guided_grammar"),
    ],
    ids=str,
)
def test_a_form_that_is_none_is_refused_at_its_place(fields: dict[str, Any], place: str) -> None:
    assert refused_fields(**fields) == [place]


@pytest.mark.parametrize(
    ("name", "fits"),
    [("extra", True), ("org/extra-1.0:b", True), ("", False), ("-x", False), ("a b", False)],
)
def test_a_loaded_adapter_has_a_name_that_can_be_a_model(name: str, fits: bool) -> None:
    body = {"lora_name": name, "lora_path": "folder"}
    if fits:
        assert LoadAdapterRequest.model_validate(body).base_model is None
    else:
        assert problems(LoadAdapterRequest, body)[0][0] == "lora_name"


@pytest.mark.parametrize("model", [LoadAdapterRequest, UnloadAdapterRequest])
def test_adapter_updates_refuse_what_they_do_not_know(model: type[BaseModel]) -> None:
    body = dict.fromkeys(model.model_fields, "x") | {"lora_int_id": 1}
    assert [place for place, _ in problems(model, body)] == ["lora_int_id"]


def test_the_schema_can_be_written_down() -> None:
    properties = ChatRequest.model_json_schema()["properties"]
    assert properties.keys() == ChatRequest.model_fields.keys()


def test_routing_takes_a_text_as_one_user_turn() -> None:
    assert RouteRequest.model_validate({"input": "Hello"}).conversation() == [HELLO]


@pytest.mark.parametrize("text", ["", " "])
def test_routing_takes_an_empty_text(text: str) -> None:
    turns = RouteRequest.model_validate({"input": text}).conversation()
    assert turns == [{"role": "user", "content": text}]


def test_routing_takes_a_conversation() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, HELLO]
    assert RouteRequest.model_validate({"messages": turns}).conversation() == [
        {"role": "system", "content": "Be brief."},
        HELLO,
    ]


def test_routing_is_by_the_router_unless_a_model_is_named() -> None:
    assert RouteRequest.model_validate({"input": "x"}).model == "polymath"


@pytest.mark.parametrize("fields", [{}, {"input": "x", "messages": [HELLO]}, {"input": None}])
def test_routing_takes_one_of_both(fields: dict[str, Any]) -> None:
    assert problems(RouteRequest, fields) == [("messages", "give either messages or input")]


@pytest.mark.parametrize(
    ("fields", "place"),
    [({"input": 3}, "input"), ({"messages": []}, "messages"), ({"input": "x", "n": 1}, "n")],
)
def test_routing_refuses_what_it_does_not_know(fields: dict[str, Any], place: str) -> None:
    assert problems(RouteRequest, fields)[0][0] == place
