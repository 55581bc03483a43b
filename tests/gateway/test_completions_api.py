"""`POST /v1/completions` over real HTTP, with the official client."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Completion, CompletionChoice

from polymath.gateway.answer_cache import CacheSettings
from polymath.gateway.app import Gateway
from polymath.gateway.text_tokens import TextTokens
from polymath.gateway.topic_guard import TopicGuardSettings
from tests.gateway.asking import HELLO, ask, scored_tokens, text
from tests.gateway.beside import beside

MOON = HELLO[0]["content"]
BANKING = "Name the banking intent of this customer message: my new card has not arrived yet"
SUM = "A shop sells 3 pens for 2 dollars. How much do 12 pens cost?"
GREEDY: dict[str, Any] = {"model": "smollm2", "prompt": MOON, "max_tokens": 8, "temperature": 0}


def complete(client: OpenAI, **given: Any) -> Completion:
    completion = client.completions.create(**{**GREEDY, **given})
    assert isinstance(completion, Completion)
    return completion


def stream(client: OpenAI, **given: Any) -> list[Completion]:
    return list(client.completions.create(stream=True, **{**GREEDY, **given}))


def joined(chunks: list[Completion], index: int = 0) -> str:
    return "".join(choice.text for choice in of_choice(chunks, index))


def of_choice(chunks: list[Completion], index: int = 0) -> list[CompletionChoice]:
    return [choice for chunk in chunks for choice in chunk.choices if choice.index == index]


def notes(said: Completion | CompletionChoice) -> dict[str, Any]:
    return dict((said.model_extra or {}).get("polymath", {}))


def refused(client: OpenAI, **given: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, **given)
    assert caught.value.response.json()["error"].keys() == {"message", "type", "param", "code"}
    return caught.value


# --- the same text whichever way -----------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2", "finance", "both", "polymath"])
def test_a_greedy_completion_is_the_greedy_chat_answer(client: OpenAI, model: str) -> None:
    completion, chat = complete(client, model=model), ask(client, model=model)
    assert completion.choices[0].text == text(chat)
    assert completion.choices[0].finish_reason == chat.choices[0].finish_reason
    assert completion.model == chat.model
    assert completion.usage == chat.usage


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.9, "seed": 3, "top_p": 0.9},
        {"stop": ["moon", "is"], "max_tokens": 24},
        {"prompt": "Answer with three emoji.", "max_tokens": 16, "logprobs": 3},
        {"model": "math", "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"n": 2, "temperature": 1, "seed": 5, "logprobs": 0},
    ],
)
def test_streaming_gives_the_same(client: OpenAI, given: dict[str, Any]) -> None:
    whole, chunks = complete(client, **given), stream(client, **given)
    for choice in whole.choices:
        streamed = of_choice(chunks, choice.index)
        assert "".join(piece.text for piece in streamed) == choice.text
        assert [piece.finish_reason for piece in streamed if piece.finish_reason] == [
            choice.finish_reason
        ]
        for name in ("tokens", "token_logprobs", "text_offset"):
            pieces = [getattr(piece.logprobs, name) for piece in streamed if piece.logprobs]
            whole_list = getattr(choice.logprobs, name) if choice.logprobs else []
            assert [value for piece in pieces for value in piece] == whole_list


@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts_give_each_what_it_gets_alone(client: OpenAI, n: int) -> None:
    prompts = [MOON, BANKING, SUM]
    given: dict[str, Any] = {"model": "polymath", "n": n, "temperature": 0, "seed": 1}
    together = complete(client, **{**given, "prompt": prompts})
    alone = [complete(client, **{**given, "prompt": prompt}) for prompt in prompts]
    expected = [choice.text for one in alone for choice in one.choices]
    assert [choice.index for choice in together.choices] == list(range(3 * n))
    assert [choice.text for choice in together.choices] == expected
    chunks = stream(client, **{**given, "prompt": prompts})
    assert [joined(chunks, index) for index in range(3 * n)] == expected
    assert len({chunk.id for chunk in chunks}) == 1


def test_more_prompts_than_the_engine_takes_at_once_are_answered_in_turn(client: OpenAI) -> None:
    prompts = [f"Say {number}." for number in range(100)]
    completion = complete(client, prompt=prompts, max_tokens=1)
    assert len(completion.choices) == 100
    chunks = stream(client, prompt=prompts[:40], max_tokens=1)
    for index in range(40):
        assert joined(chunks, index) == completion.choices[index].text


# --- the shape of answers ------------------------------------------------------------------------


def test_an_answer_has_sixteen_tokens_unless_asked_otherwise(client: OpenAI) -> None:
    usage = complete(client, max_tokens=openai.omit).usage
    assert usage is not None
    assert usage.completion_tokens == 16


def test_usage_is_the_sum_over_the_prompts(client: OpenAI) -> None:
    prompts = [MOON, BANKING]
    alone = [complete(client, prompt=prompt).usage for prompt in prompts]
    together = complete(client, prompt=prompts).usage
    assert together is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(together, name) == sum(getattr(one, name) for one in alone)
    chunks = stream(client, prompt=prompts, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage == together
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_log_probabilities_are_those_of_the_chat_api(client: OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    scored = scored_tokens(ask(client, logprobs=True, top_logprobs=2))
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    assert found.token_logprobs == [token.logprob for token in scored]
    assert "".join(found.tokens) == choice.text
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3


def test_without_alternatives_only_the_chosen_tokens_are_scored(client: OpenAI) -> None:
    found = complete(client, logprobs=0).choices[0].logprobs
    assert found is not None
    assert found.top_logprobs is None
    assert found.token_logprobs is not None
    assert len(found.token_logprobs) == 8


def test_one_prompt_says_who_answers_in_headers_and_body(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(**{**GREEDY, "model": "auto", "prompt": SUM})
    completion = raw.parse()
    assert completion.model == notes(completion)["expert"] == "math"
    assert raw.headers["x-polymath-expert"] == "math"
    first, *others = stream(client, model="auto", prompt=SUM)
    assert notes(first)["expert"] == "math"
    assert not any(notes(chunk) for chunk in others)


def test_of_several_prompts_each_choice_says_who_gave_it(client: OpenAI) -> None:
    prompts = [SUM, BANKING]
    raw = client.completions.with_raw_response.create(
        **{**GREEDY, "model": "auto", "prompt": prompts}
    )
    completion = raw.parse()
    assert [notes(choice)["expert"] for choice in completion.choices] == ["math", "finance"]
    assert completion.model == "auto"
    assert "x-polymath-expert" not in raw.headers
    chunks = stream(client, model="auto", prompt=prompts)
    for index, expert in enumerate(("math", "finance")):
        assert [notes(c)["expert"] for c in of_choice(chunks, index) if notes(c)] == [expert]


def test_several_prompts_of_one_expert_say_so_in_the_headers(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(**{**GREEDY, "prompt": [SUM, BANKING]})
    assert raw.parse().model == raw.headers["x-polymath-expert"] == "smollm2"


def test_attribution_stands_in_the_choices(client: OpenAI) -> None:
    extra = {"polymath": {"attribution": True}}
    completion = complete(client, model="both", max_tokens=3, extra_body=extra)
    assert len(notes(completion.choices[0])["attribution"]) == 3


def test_an_answer_can_be_judged_by_its_id(client: OpenAI, base_url: str) -> None:
    completion = complete(client, model="math", max_tokens=1)
    said = {"id": completion.id, "thumbs": "up"}
    answer = httpx.post(f"{base_url}/v1/feedback", json=said)
    assert answer.status_code == 200
    assert answer.json()["id"] == completion.id


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"prompt": [1, 2, 3]}, "prompt", "token ids are not supported"),
        ({"prompt": [[1, 2], [3]]}, "prompt", "token ids are not supported"),
        ({"prompt": []}, "prompt", "non-empty list"),
        ({"prompt": 7}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"prompt": ["a", None]}, "prompt[1]", "valid string"),
        ({"prompt": None}, "prompt", "Missing"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt", "130|65 prompts with 2 choices"),
        ({"suffix": "the end"}, "suffix", "Unsupported"),
        ({"echo": True}, "echo", "Unsupported"),
        ({"best_of": 3, "n": 2}, "best_of", "must be n"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 10**9}, "max_tokens", "more than"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logprobs": 21}, "logprobs", "less"),
        ({"n": 0}, "n", "greater"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"temperature": 3}, "temperature", "less"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "vocabulary"),
        ({"extra_body": {"messages": HELLO}}, "messages", "Unsupported"),
        ({"extra_body": {"timeout": 0}}, "timeout", "greater"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: OpenAI, given: dict[str, Any], param: str, said: str
) -> None:
    error = refused(client, **given)
    assert error.status_code == 400
    assert error.param == param
    assert any(part in error.message for part in said.split("|"))


def test_what_asks_for_nothing_is_let_through(client: OpenAI) -> None:
    plain = complete(client)
    neutral = complete(client, echo=False, suffix="", best_of=1, user="ada", logit_bias={})
    assert neutral.choices[0].text == plain.choices[0].text
    assert complete(client, logit_bias={"7": 0}).choices[0].text == plain.choices[0].text


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    assert refused(client, model="chemistry").status_code == 404


@pytest.mark.parametrize("streaming", [False, True])
def test_if_one_prompt_fails_all_do(
    client: OpenAI, gateway: Gateway, base_url: str, streaming: bool
) -> None:
    body = {**GREEDY, "prompt": [MOON, "moon " * 9000], "stream": streaming}
    answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert gateway.door.inside == 0
    _wait_until_idle(gateway)


def test_a_client_that_goes_away_ends_all_of_its_prompts(gateway: Gateway, base_url: str) -> None:
    body = {**GREEDY, "prompt": [MOON] * 20, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{base_url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        assert gateway.door.inside == 20
    _wait_until_idle(gateway)
    assert gateway.door.inside == 0


def _wait_until_idle(gateway: Gateway) -> None:
    deadline = time.monotonic() + 10
    while gateway.engine.active or gateway.door.inside:
        assert time.monotonic() < deadline
        time.sleep(0.02)


NUMBERS = st.integers(-5, 2**64) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["prompt", "n", "logprobs", "stop", "seed", "stream", "echo", "logit_bias", "user", "polymath"]
)


@settings(max_examples=40)
@given(odd=st.dictionaries(FIELDS, JSON, max_size=3))
def test_odd_bodies_are_errors_of_the_client(base_url: str, odd: dict[str, Any]) -> None:
    body = {**GREEDY, "max_tokens": 1, **odd}
    answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] in ("invalid_request_error", "rate_limit_error")


# --- keys, limits, cache, guard ------------------------------------------------------------------


async def test_every_prompt_is_a_request_of_the_key(gateway: Gateway, tmp_path: Path) -> None:
    async with beside(gateway, tmp_path) as other:
        client = other.client(await other.key(rpm=3))
        raw = await client.completions.with_raw_response.create(**{**GREEDY, "prompt": ["a", "b"]})
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert await other.used("requests") == 2
        usage = raw.parse().usage
        assert usage is not None
        assert await other.used("prompt_tokens") == usage.prompt_tokens
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(**{**GREEDY, "prompt": ["a", "b"]})
        assert other.gateway.door.inside == 0
        narrow = other.client(await other.key(experts=["smollm2"]))
        with pytest.raises(openai.PermissionDeniedError):
            await narrow.completions.create(**{**GREEDY, "model": "math"})
        with pytest.raises(openai.AuthenticationError):
            await other.client("pm-wrong").completions.create(**GREEDY)


async def test_a_cached_completion_is_the_first_one(gateway: Gateway, tmp_path: Path) -> None:
    async with beside(gateway, tmp_path, cache=CacheSettings(exact=True)) as other:
        client = other.client()
        given: dict[str, Any] = {**GREEDY, "logit_bias": {"7": -1}, "logprobs": 1}
        first = await client.completions.with_raw_response.create(**given)
        again = await client.completions.with_raw_response.create(**given)
        caches = [raw.headers["x-polymath-cache"] for raw in (first, again)]
        assert caches == ["miss", "hit"]
        assert first.parse().choices == again.parse().choices
        pieces = [piece async for piece in await client.completions.create(stream=True, **given)]
        assert joined(pieces) == first.parse().choices[0].text


async def test_the_topic_guard_refuses_in_this_format_too(gateway: Gateway, tmp_path: Path) -> None:
    guard = TopicGuardSettings(allowed_domains=("health",), refusal="Only {domains}.")
    async with beside(gateway, tmp_path, topic_guard=guard) as other:
        client = other.client()
        given: dict[str, Any] = {**GREEDY, "model": "polymath", "prompt": SUM, "logprobs": 1}
        completion = await client.completions.create(**given)
        assert completion.choices[0].text == "Only health."
        assert notes(completion)["off_topic"] == "refuse"
        pieces = [piece async for piece in await client.completions.create(stream=True, **given)]
        assert joined(pieces) == "Only health."


# --- tokens in the older format ------------------------------------------------------------------


def test_a_token_that_is_no_text_is_written_as_bytes() -> None:
    moon = "🌙".encode()
    scored: list[dict[str, Any]] = [
        {"token": "�", "bytes": list(moon[:3]), "logprob": -1.0, "top_logprobs": []},
        {"token": "�", "bytes": list(moon[3:]), "logprob": -2.0, "top_logprobs": []},
        {"token": "!", "bytes": None, "logprob": -3.0, "top_logprobs": []},
    ]
    assert TextTokens(top=1).add(scored) == {
        "tokens": [r"bytes:\xf0\x9f\x8c", r"bytes:\x99", "!"],
        "token_logprobs": [-1.0, -2.0, -3.0],
        "top_logprobs": [{r"bytes:\xf0\x9f\x8c": -1.0}, {r"bytes:\x99": -2.0}, {"!": -3.0}],
        "text_offset": [0, 0, 1],
    }


@given(words=st.lists(st.text(min_size=1), max_size=8), cut=st.integers(0, 8))
def test_offsets_are_those_of_the_text_however_it_comes(words: list[str], cut: int) -> None:
    scored = [{"token": word, "logprob": -1.0} for word in words]
    tokens = TextTokens(top=0)
    first, rest = tokens.add(scored[:cut]), tokens.add(scored[cut:])
    offsets = [len("".join(words[:index])) for index in range(len(words))]
    assert first["text_offset"] + rest["text_offset"] == offsets
