"""`POST /v1/chat/completions` over real HTTP, with the official client."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from polymath.gateway.app import Gateway
from tests.conftest import COMBINED, EXPERTS
from tests.gateway.asking import HELLO, ask, refusal, stream, streamed_text, text, user

BANKING = "Name the banking intent of this customer message: my new card has not arrived yet"


# --- the same text both ways ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.9, "seed": 3, "top_p": 0.9},
        {"stop": ["moon", "is"], "max_tokens": 24},
        {"messages": [{"role": "user", "content": "Answer with three emoji."}], "max_tokens": 16},
        {"model": "math", "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"n": 2, "temperature": 1, "seed": 5},
    ],
)
def test_streaming_gives_the_same_text(client: OpenAI, given: dict[str, Any]) -> None:
    whole, chunks = ask(client, **given), stream(client, **given)
    for index in range(given.get("n", 1)):
        assert streamed_text(chunks, index) == text(whole, index)


def test_streamed_log_probabilities_are_the_same(client: OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=2)
    chunks = stream(client, logprobs=True, top_logprobs=2)
    streamed = [
        token
        for chunk in chunks
        for choice in chunk.choices
        for token in (choice.logprobs.content or [] if choice.logprobs else [])
    ]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content


# --- who answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["polymath", "auto"])
def test_a_routed_request_is_answered_by_the_expert_of_its_domain(
    client: OpenAI, model: str
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": BANKING}], max_tokens=8, temperature=0
    )
    completion = raw.parse()
    assert completion.model == "finance"
    decision = completion.model_extra["polymath"] if completion.model_extra else {}
    assert raw.headers["x-polymath-expert"] == decision["expert"] == "finance"
    assert raw.headers["x-polymath-domain"] == decision["domain"] == "finance"
    assert raw.headers["x-polymath-source"] == decision["source"] == "encoder"
    assert float(raw.headers["x-polymath-confidence"]) == pytest.approx(
        decision["confidence"], abs=1e-4
    )
    assert sum(decision["weights"].values()) == pytest.approx(1)
    assert len(decision["why"]["nearest"]) == 3


@pytest.mark.parametrize("expert", EXPERTS)
def test_an_expert_can_be_named(client: OpenAI, expert: str) -> None:
    completion = ask(client, model=expert, max_tokens=2)
    assert completion.model == expert
    assert completion.model_extra is not None
    assert completion.model_extra["polymath"]["source"] == "explicit"


def test_the_expert_answers_as_it_was_trained_to(client: OpenAI) -> None:
    assert "card" in text(ask(client, model="finance", messages=[user(BANKING)]))
    assert text(ask(client, model="smollm2", messages=[user(BANKING)])) != text(
        ask(client, model="finance", messages=[user(BANKING)])
    )


def test_an_unknown_model_is_404_and_lists_what_there_is(client: OpenAI) -> None:
    error = refusal(client, model="chemistry")
    assert error.status_code == 404
    for name in ("polymath", *EXPERTS, *COMBINED, "smollm2"):
        assert name in error.message


def test_a_stream_says_who_answers_in_headers_and_first_chunk(base_url: str) -> None:
    body = {"model": "polymath", "messages": [user(BANKING)], "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.headers["x-polymath-expert"] == "finance"
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert '"polymath":{"expert":"finance"' in lines[0]
    assert lines[-1] == "data: [DONE]"


# --- the shape of answers ------------------------------------------------------------------------


def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_usage(client: OpenAI) -> None:
    chunks = stream(client, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == ask(client, max_tokens=4).usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_counted_with_the_models_tokenizer(client: OpenAI, gateway: Gateway) -> None:
    usage = ask(client, max_tokens=5).usage
    tokenizer = gateway.engine.models["smollm2"].tokenizer
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 5)
    assert usage.total_tokens == len(prompt) + 5


def test_max_completion_tokens_is_max_tokens(client: OpenAI) -> None:
    assert ask(client, max_tokens=openai.omit, max_completion_tokens=3).choices[
        0
    ].finish_reason == ("length")


def test_the_end_token_finishes_with_stop(client: OpenAI) -> None:
    completion = ask(client, model="finance", messages=[user(BANKING)], max_tokens=40)
    assert completion.choices[0].finish_reason == "stop"


def test_the_end_token_may_be_ignored(client: OpenAI) -> None:
    given = {"model": "finance", "messages": [user(BANKING)], "max_tokens": 40}
    ended, went_on = ask(client, **given), ask(client, **given, extra_body={"ignore_eos": True})
    assert went_on.choices[0].finish_reason == "length"
    assert went_on.usage is not None
    assert went_on.usage.completion_tokens == 40
    assert text(went_on).startswith(text(ended))


def test_choices_of_one_seed_differ_from_each_other_but_not_between_requests(
    client: OpenAI,
) -> None:
    first = ask(client, n=2, seed=11, temperature=1)
    again = ask(client, n=2, seed=11, temperature=1)
    assert text(first, 0) != text(first, 1)
    assert [text(first, i) for i in (0, 1)] == [text(again, i) for i in (0, 1)]


def test_a_bias_forbids_a_token(client: OpenAI, gateway: Gateway) -> None:
    plain = ask(client, logprobs=True, max_tokens=1)
    tokenizer = gateway.engine.models["smollm2"].tokenizer
    (token,) = tokenizer.encode(text(plain), add_special_tokens=False)
    assert text(ask(client, logit_bias={str(token): -100}, max_tokens=1)) != text(plain)


def test_log_probabilities_give_the_bytes_of_the_text(client: OpenAI) -> None:
    completion = ask(client, logprobs=True, top_logprobs=2)
    scored = completion.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    pieces = b"".join(bytes(token.bytes or []) for token in scored.content)
    assert pieces.decode() == text(completion)
    assert all(len(token.top_logprobs) == 2 for token in scored.content)


def test_text_parts_are_one_text(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "about the moon."}]
    joined = ask(client, messages=[user("Tell me\nabout the moon.")])
    assert text(ask(client, messages=[{"role": "user", "content": parts}])) == text(joined)


def test_metadata_comes_back(client: OpenAI) -> None:
    completion = ask(client, metadata={"team": "blue"}, user="ada", max_tokens=1)
    assert completion.metadata == {"team": "blue"}


def test_a_conversation_with_all_roles_is_answered(client: OpenAI) -> None:
    messages = [
        {"role": "system", "content": "You are brief."},
        user("What is 2 + 2?"),
        {"role": "assistant", "content": "4"},
        user("And 3 + 3?"),
    ]
    assert text(ask(client, messages=messages))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
        ({"extra_body": {"polymath": {"atribution": True}}}, "polymath.atribution"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: OpenAI, given: dict[str, Any], param: str
) -> None:
    error = refusal(client, **given)
    assert (error.status_code, error.code, error.param) == (400, "unsupported_parameter", param)
    assert param in error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
        ({"extra_body": {"polymath": {"attribution": "yes"}}}, "polymath.attribution"),
        ({"max_tokens": 8192}, "messages"),
        ({"messages": [{"role": "user", "content": "hi " * 9000}]}, "messages"),
    ],
)
def test_a_bad_value_is_400_and_names_the_field(
    client: OpenAI, given: dict[str, Any], param: str
) -> None:
    error = refusal(client, **given)
    assert (error.status_code, error.param) == (400, param)


HALF_A_CHARACTER = '{"model": "math", "messages": [{"role": "user", "content": "\\ud800"}]}'
NOT_A_NUMBER = '{"model": "math", "messages": [{"role": "user", "content": "x"}], "top_p": NaN}'
MALFORMED = ["{not json", "", "[]", '"text"', '{"model": "smollm2"}', "[" * 100_000]


@pytest.mark.parametrize("body", [*MALFORMED, HALF_A_CHARACTER, NOT_A_NUMBER], ids=lambda b: b[:9])
def test_a_malformed_body_is_400(base_url: str, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{base_url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_413(base_url: str) -> None:
    answer = httpx.post(f"{base_url}/v1/chat/completions", content=b"x" * (5 * 1024 * 1024))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_huge_body_without_a_length_is_413(base_url: str) -> None:
    def endless() -> Any:
        for _ in range(80):
            yield b" " * 65536

    answer = httpx.post(f"{base_url}/v1/chat/completions", content=endless())
    assert answer.status_code == 413


# --- clients that go away ------------------------------------------------------------------------


async def test_a_client_that_leaves_a_stream_stops_its_generation(
    base_url: str, gateway: Gateway
) -> None:
    client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)
    chunks = await client.chat.completions.create(
        model="smollm2",
        messages=HELLO,
        max_tokens=2000,
        stream=True,  # type: ignore[arg-type]
    )
    await anext(aiter(chunks))
    assert gateway.engine.active == 1
    await chunks.close()
    assert await engine_settles(gateway)


async def test_a_client_that_leaves_a_whole_answer_stops_its_generation(
    base_url: str, gateway: Gateway
) -> None:
    body = {"model": "smollm2", "messages": HELLO, "max_tokens": 2000, "ignore_eos": True}
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{base_url}/v1/chat/completions", json=body, timeout=0.7)
    assert await engine_settles(gateway)


async def engine_settles(gateway: Gateway) -> bool:
    deadline = time.monotonic() + 10
    while gateway.engine.active and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return gateway.engine.active == 0
