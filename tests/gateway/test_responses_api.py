"""`POST /v1/responses` over real HTTP, with the official client."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from openai.types.responses import Response, ResponseOutputMessage, ResponseOutputText
from pydantic import BaseModel

from polymath.errors import GenerationFailed, Overloaded, PolymathError
from polymath.gateway.answer_cache import CacheSettings
from polymath.gateway.app import Gateway
from polymath.gateway.response_events import ResponseEvents, whole_response
from polymath.gateway.topic_guard import TopicGuardSettings
from polymath.proxy import events_of
from tests.gateway.asking import HELLO, ask, scored_tokens, text, user
from tests.gateway.beside import beside

MOON = HELLO[0]["content"]
SUM = "A shop sells 3 pens for 2 dollars. How much do 12 pens cost?"
GREEDY: dict[str, Any] = {
    "model": "smollm2",
    "input": MOON,
    "max_output_tokens": 8,
    "temperature": 0,
}
BANKING = "Name the banking intent of this customer message: my new card has not arrived yet"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
CHANGING = ("id", "created_at", "completed_at", "polymath")


def respond(client: OpenAI, **given: Any) -> Response:
    response = client.responses.create(**{**GREEDY, **given})
    assert isinstance(response, Response)
    return response


def stream(client: OpenAI, **given: Any) -> list[Any]:
    return list(client.responses.create(stream=True, **{**GREEDY, **given}))


def part(response: Response) -> ResponseOutputText:
    (item,) = response.output
    assert isinstance(item, ResponseOutputMessage)
    (found,) = item.content
    assert isinstance(found, ResponseOutputText)
    return found


def lasting(response: Response) -> dict[str, Any]:
    """What two responses to the same request have in common."""
    body = response.to_dict()
    kept = {name: value for name, value in body.items() if name not in CHANGING}
    kept["output"] = [{**item, "id": ""} for item in body["output"]]  # type: ignore[attr-defined]
    return kept


def notes(response: Response) -> dict[str, Any]:
    return dict((response.model_extra or {}).get("polymath", {}))


def refused(client: OpenAI, **given: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        respond(client, **given)
    assert caught.value.response.json()["error"].keys() == {"message", "type", "param", "code"}
    return caught.value


# --- the same text whichever way -----------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2", "finance", "both", "polymath"])
def test_a_greedy_response_is_the_greedy_chat_answer(client: OpenAI, model: str) -> None:
    response, chat = respond(client, model=model), ask(client, model=model)
    assert response.output_text == text(chat)
    assert response.model == chat.model
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"input": "Answer with three emoji.", "max_output_tokens": 16},
        {"model": "finance", "input": BANKING, "max_output_tokens": 40},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"instructions": "Be brief.", "metadata": {"team": "blue"}, "user": "ada"},
        {"text": {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}},
    ],
)
def test_streaming_ends_with_the_whole_response(client: OpenAI, given: dict[str, Any]) -> None:
    whole, events = respond(client, **given), stream(client, **given)
    assert lasting(events[-1].response) == lasting(whole)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    logprobs = [token for event in deltas for token in event.logprobs]
    assert [token.logprob for token in logprobs] == [
        token.logprob for token in part(whole).logprobs or []
    ]


@pytest.mark.parametrize(
    "given",
    [
        [{"role": "user", "content": MOON}],
        [{"type": "message", "role": "user", "content": MOON}],
        [{"role": "user", "content": [{"type": "input_text", "text": MOON}]}],
    ],
)
def test_a_text_is_what_a_user_says(client: OpenAI, given: list[Any]) -> None:
    assert respond(client, input=given).output_text == respond(client).output_text


def test_instructions_are_a_system_message(client: OpenAI) -> None:
    told = respond(client, instructions="Speak like a pirate.")
    messages = [{"role": "system", "content": "Speak like a pirate."}, *HELLO]
    assert told.output_text == text(ask(client, messages=messages))
    assert told.instructions == "Speak like a pirate."


def test_a_responses_output_is_the_next_ones_input(client: OpenAI) -> None:
    first = respond(client, include=["message.output_text.logprobs"])
    conversation: list[Any] = [user(MOON), *first.output, user("Shorter, please.")]
    second = respond(client, input=conversation)
    turns = [user(MOON), {"role": "assistant", "content": first.output_text}]
    chat = ask(client, messages=[*turns, user("Shorter, please.")])
    assert second.output_text == text(chat)
    dumped = [item.model_dump() for item in first.output]
    again = respond(client, input=[user(MOON), *dumped, user("Shorter, please.")])
    assert again.output_text == second.output_text


def test_log_probabilities_are_those_of_the_chat_api(client: OpenAI) -> None:
    response = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    scored = scored_tokens(ask(client, logprobs=True, top_logprobs=2))
    found = part(response).logprobs
    assert found is not None
    assert [token.to_dict() for token in found] == [token.to_dict() for token in scored]


# --- events --------------------------------------------------------------------------------------


def test_events_come_in_the_official_order(client: OpenAI) -> None:
    events = stream(client, model="finance", input=BANKING, max_output_tokens=40)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-2].item.id}
    assert events[0].response.status == events[1].response.status == "in_progress"
    assert events[0].response.id == events[-1].response.id
    assert events[-1].response.status == "completed"
    assert events[-1].response.completed_at is not None


def test_every_event_has_its_name_on_the_wire(base_url: str) -> None:
    body = {**GREEDY, "stream": True}
    with httpx.stream("POST", f"{base_url}/v1/responses", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-polymath-expert"] == "smollm2"
        blocks = answer.read().decode().strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_the_clients_stream_collects_the_response(client: OpenAI) -> None:
    given = {**GREEDY, "model": "finance", "input": BANKING, "max_output_tokens": 40}
    with client.responses.stream(**given) as events:
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert final.output_text == "".join(texts)
    assert final.output_text == respond(client, **given).output_text


def test_a_cut_answer_is_incomplete(client: OpenAI) -> None:
    responses: list[Any] = [respond(client), stream(client)[-1].response]
    for response in responses:
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"
        assert response.completed_at is None
    assert stream(client)[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GenerationFailed("It broke."), "server_error"),
        (Overloaded("It broke."), "rate_limit_exceeded"),
        (PolymathError("It broke."), "server_error"),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 2])
async def test_what_breaks_on_the_way_ends_with_a_failed_response(
    error: PolymathError, code: str, after: int
) -> None:
    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        for index in range(after):
            delta = {"index": 0, "delta": {"content": f"piece {index}"}}
            yield {"id": "chat-1", "model": "math", "choices": [delta]}
        raise error

    events = [event async for event in ResponseEvents(chunks(), {"store": False}, "math")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    failed = events[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": code, "message": "It broke."}
    assert failed["response"]["model"] == "math"
    spoken = failed["response"]["output"]
    assert len(spoken) == min(after, 1)
    if spoken:
        assert spoken[0]["status"] == "incomplete"
        assert spoken[0]["content"][0]["text"] == "piece 0piece 1"[: 7 * after]


TEXT = st.none() | st.text(max_size=20)


@given(
    content=TEXT,
    refusal=TEXT,
    reason=st.sampled_from(["stop", "length", "content_filter", "tool_calls", None]),
    usage=st.none() | st.just({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
)
async def test_any_upstreams_answer_is_the_same_whole_and_streamed(
    content: str | None, refusal: str | None, reason: str | None, usage: dict[str, int] | None
) -> None:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    reply = {"id": "x", "created": 1, "model": "math", "choices": [choice], "usage": usage}
    whole = whole_response(reply, {})
    chunks = events_of(reply, {"stream_options": {"include_usage": True}})
    *_, last = [event async for event in ResponseEvents(chunks, {}, "math")]
    changing = ("completed_at",)
    assert {n: v for n, v in last["response"].items() if n not in changing} == {
        n: v for n, v in whole.items() if n not in changing
    }
    assert last["type"] == f"response.{whole['status']}"
    assert whole["output"][0]["content"][0]["text"] == (content or refusal or "")


# --- the shape of responses ----------------------------------------------------------------------


def test_a_response_says_who_answers(client: OpenAI) -> None:
    raw = client.responses.with_raw_response.create(**{**GREEDY, "model": "auto", "input": SUM})
    response = raw.parse()
    assert response.model == notes(response)["expert"] == raw.headers["x-polymath-expert"] == "math"
    events = stream(client, model="auto", input=SUM)
    assert notes(events[0].response)["expert"] == notes(events[-1].response)["expert"] == "math"


def test_what_was_asked_comes_back(client: OpenAI) -> None:
    given: dict[str, Any] = {"metadata": {"team": "blue"}, "user": "ada", "top_p": 0.5}
    response = respond(client, **given)
    assert (response.metadata, response.user, response.top_p) == ({"team": "blue"}, "ada", 0.5)
    assert response.max_output_tokens == 8
    assert response.temperature == 0


def test_nothing_is_stored_whatever_is_asked(client: OpenAI) -> None:
    for store in (True, False, openai.omit):
        extra = respond(client, store=store).model_extra or {}
        assert extra["store"] is False


@pytest.mark.parametrize("strict", [True, None])
def test_an_answer_follows_a_schema(client: OpenAI, strict: bool | None) -> None:
    form = {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": strict}
    response = respond(client, text={"format": form}, max_output_tokens=60)
    assert json.loads(response.output_text).keys() == {"ok"}


def test_the_client_parses_an_answer(client: OpenAI) -> None:
    class Verdict(BaseModel):
        ok: bool

    given = {**GREEDY, "max_output_tokens": 60}
    parsed = client.responses.parse(text_format=Verdict, **given).output_parsed
    assert isinstance(parsed, Verdict)


def test_a_json_object_can_be_asked_for(client: OpenAI) -> None:
    form = {"format": {"type": "json_object"}}
    assert respond(client, text=form, max_output_tokens=4).output_text.startswith("{")


def test_an_answer_can_be_judged_by_its_id(client: OpenAI, base_url: str) -> None:
    said = {"id": respond(client, model="math").id, "thumbs": "up"}
    assert httpx.post(f"{base_url}/v1/feedback", json=said).status_code == 200


def test_what_asks_for_nothing_is_let_through(client: OpenAI) -> None:
    neutral: dict[str, Any] = {
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "background": False,
        "parallel_tool_calls": False,
        "include": [],
        "previous_response_id": None,
        "service_tier": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
    }
    assert respond(client, **neutral).output_text == respond(client).output_text


# --- refusals ------------------------------------------------------------------------------------

IMAGE = {"type": "input_image", "image_url": "data:,"}
CALL = {"type": "function_call_output", "call_id": "1", "output": "x"}


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "Unsupported"),
        ({"conversation": "conv_1"}, "conversation", "Unsupported"),
        ({"background": True}, "background", "Unsupported"),
        ({"prompt": {"id": "p"}}, "prompt", "Unsupported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "Unsupported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "Unsupported"),
        ({"tool_choice": "required"}, "tool_choice", "Unsupported"),
        ({"truncation": "auto"}, "truncation", "Unsupported"),
        ({"max_tool_calls": 1}, "max_tool_calls", "Unsupported"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]", "logprobs"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 7}, "input", "list"),
        ({"input": [{"role": "user"}]}, "input[0].content", "Missing"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "user"),
        ({"input": [CALL]}, "input[0].type", "message"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content", "input_image"),
        ({"input": [{"role": "user", "content": [7]}]}, "input[0].content", "None"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"max_output_tokens": 10**9}, "max_output_tokens", "more than"),
        ({"temperature": 3}, "temperature", "less"),
        ({"top_logprobs": 21}, "top_logprobs", "less"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "Unsupported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "goes"),
        ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format.name", "goes"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream is true"),
        ({"extra_body": {"messages": HELLO}}, "messages", "Unsupported"),
        ({"extra_body": {"seed": 1}}, "seed", "Unsupported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: OpenAI, given: dict[str, Any], param: str, said: str
) -> None:
    error = refused(client, **given)
    assert error.status_code == 400
    assert error.param == param
    assert said in error.message


def test_a_schema_that_cannot_be_followed_names_its_field(client: OpenAI) -> None:
    form = {"type": "json_schema", "name": "it", "schema": {"type": "nothing"}}
    error = refused(client, text={"format": form})
    assert error.status_code == 400
    assert error.param == "text.format"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_is_too_long_is_no_stream(
    client: OpenAI, gateway: Gateway, streaming: bool
) -> None:
    error = refused(client, input="moon " * 9000, stream=streaming)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert error.param == "input"
    assert gateway.door.inside == 0


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    assert refused(client, model="chemistry").status_code == 404


NUMBERS = st.integers(-5, 2**64) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["input", "instructions", "text", "include", "stream", "metadata", "tools", "store", "user"]
)


@settings(max_examples=40)
@given(odd=st.dictionaries(FIELDS, JSON, max_size=3))
def test_odd_bodies_are_errors_of_the_client(base_url: str, odd: dict[str, Any]) -> None:
    body = {**GREEDY, "max_output_tokens": 1, **odd}
    answer = httpx.post(f"{base_url}/v1/responses", json=body, timeout=60)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"


# --- keys, cache, guard --------------------------------------------------------------------------


async def test_keys_hold_and_streams_are_counted(gateway: Gateway, tmp_path: Path) -> None:
    async with beside(gateway, tmp_path) as other:
        client = other.client(await other.key(rpm=2, experts=["smollm2"]))
        whole = await client.responses.create(**GREEDY)
        assert whole.usage is not None
        events = [event async for event in await client.responses.create(stream=True, **GREEDY)]
        assert events[-1].response.usage == whole.usage
        assert await other.used("completion_tokens") == 2 * whole.usage.output_tokens
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(**GREEDY)
        with pytest.raises(openai.AuthenticationError):
            await other.client("pm-wrong").responses.create(**GREEDY)


async def test_a_cached_response_is_the_first_one(gateway: Gateway, tmp_path: Path) -> None:
    async with beside(gateway, tmp_path, cache=CacheSettings(exact=True)) as other:
        client = other.client()
        first = await client.responses.with_raw_response.create(**GREEDY)
        again = await client.responses.with_raw_response.create(**GREEDY)
        caches = [raw.headers["x-polymath-cache"] for raw in (first, again)]
        assert caches == ["miss", "hit"]
        assert lasting(again.parse()) == lasting(first.parse())
        *_, last = [event async for event in await client.responses.create(stream=True, **GREEDY)]
        assert lasting(last.response) == lasting(first.parse())


async def test_the_topic_guard_refuses_in_this_format_too(gateway: Gateway, tmp_path: Path) -> None:
    guard = TopicGuardSettings(allowed_domains=("health",), refusal="Only {domains}.")
    async with beside(gateway, tmp_path, topic_guard=guard) as other:
        given: dict[str, Any] = {**GREEDY, "model": "polymath", "input": SUM}
        response = await other.client().responses.create(**given)
        assert response.output_text == "Only health."
        assert notes(response)["off_topic"] == "refuse"
        assert response.status == "completed"
        async with other.client().responses.stream(**given) as events:
            assert (await events.get_final_response()).output_text == "Only health."
