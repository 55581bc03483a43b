"""`POST /v1/embeddings` over real HTTP, with the official client."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from polymath.gateway.app import Gateway
from polymath.gateway.request_limits import RequestLimits
from polymath.router import Embedder, Router
from tests.gateway.beside import beside

TEXTS = ["My card has not arrived.", "What is 3 + 4?", "Where is my new bank card?"]


@pytest.fixture
def embedder(gateway: Gateway, base_url: str) -> Embedder:
    found = gateway.live.embedder
    assert found is not None
    return found


def embed(client: OpenAI, texts: str | list[str], **given: Any) -> list[list[float]]:
    reply = client.embeddings.create(model="polymath-encoder", input=texts, **given)
    assert [one.index for one in reply.data] == list(range(len(reply.data)))
    return [one.embedding for one in reply.data]


def refused(client: OpenAI, **given: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**{"model": "polymath", "input": "x", **given})
    assert caught.value.response.json()["error"].keys() == {"message", "type", "param", "code"}
    return caught.value


# --- the same vectors whichever way --------------------------------------------------------------


def test_an_embedding_is_the_encoders_to_the_last_bit(client: OpenAI, embedder: Embedder) -> None:
    assert np.array_equal(np.array(embed(client, TEXTS), np.float32), embedder.embed(TEXTS))


def test_base64_and_numbers_are_the_same(client: OpenAI, base_url: str) -> None:
    numbers = embed(client, TEXTS, encoding_format="float")
    assert embed(client, TEXTS) == numbers
    body = {"model": "auto", "input": TEXTS, "encoding_format": "base64"}
    data = httpx.post(f"{base_url}/v1/embeddings", json=body).json()["data"]
    for one, expected in zip(data, numbers, strict=True):
        found = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        assert found.tolist() == expected


def test_several_texts_give_each_what_it_gets_alone(client: OpenAI) -> None:
    assert embed(client, TEXTS) == [embed(client, text)[0] for text in TEXTS]


def test_a_text_is_a_list_of_one(client: OpenAI) -> None:
    assert embed(client, TEXTS[0]) == embed(client, TEXTS[:1])


def test_texts_of_several_batches_keep_their_order(client: OpenAI, embedder: Embedder) -> None:
    texts = [f"number {index % 20}" for index in range(50)]
    assert np.array_equal(np.array(embed(client, texts), np.float32), embedder.embed(texts))


@settings(max_examples=25)
@given(text=st.text(min_size=1, max_size=40))
def test_any_text_has_a_vector_of_unit_length(client: OpenAI, text: str) -> None:
    (vector,) = embed(client, text)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert embed(client, [text], encoding_format="float") == [vector]


# --- what they are good for, and what they cost --------------------------------------------------


def test_texts_that_mean_the_same_are_near(client: OpenAI) -> None:
    card, number, other_card = (np.array(vector) for vector in embed(client, TEXTS))
    assert card @ other_card > card @ number + 0.3


def test_usage_counts_the_tokens_that_are_read(client: OpenAI, embedder: Embedder) -> None:
    for texts in (TEXTS, ["card " * 1000]):
        usage = client.embeddings.create(model="auto", input=texts).usage
        assert usage.prompt_tokens == usage.total_tokens == embedder.count_tokens(texts)


@pytest.mark.parametrize("model", ["polymath-encoder", "polymath", "auto"])
def test_the_encoder_is_named(client: OpenAI, model: str) -> None:
    assert client.embeddings.create(model=model, input="x").model == "polymath-encoder"


def test_its_own_dimensions_may_be_asked_for(client: OpenAI) -> None:
    (vector,) = embed(client, "x")
    assert embed(client, "x", dimensions=len(vector)) == [vector]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"input": ""}, "input[0]", "at least 1 character"),
        ({"input": ["a", ""]}, "input[1]", "at least 1 character"),
        ({"input": []}, "input", "non-empty list"),
        ({"input": 7}, "input", "must be a string"),
        ({"input": [1, 2]}, "input", "token ids"),
        ({"input": [[1, 2]]}, "input", "token ids"),
        ({"input": ["a", {}]}, "input[1]", "valid string"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"dimensions": 100}, "dimensions", "384 dimensions"),
        ({"dimensions": 0}, "dimensions", "greater"),
        ({"encoding_format": "hex"}, "encoding_format", "base64"),
        ({"extra_body": {"truncate": True}}, "truncate", "Unsupported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: OpenAI, given: dict[str, Any], param: str, said: str
) -> None:
    error = refused(client, **given)
    assert error.status_code == 400
    assert error.param == param
    assert said in error.message


@pytest.mark.parametrize("model", ["math", "text-embedding-3-small", ""])
def test_another_model_is_404_and_says_which_there_are(client: OpenAI, model: str) -> None:
    error = refused(client, model=model)
    assert error.status_code == 404
    assert "polymath-encoder, polymath, auto" in error.message


@settings(max_examples=25)
@given(
    odd=st.dictionaries(
        st.sampled_from(["model", "input", "encoding_format", "dimensions", "user"]),
        st.none()
        | st.booleans()
        | st.integers(-5, 2**64)
        | st.text(max_size=9)
        | st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=3),
    )
)
def test_odd_bodies_are_errors_of_the_client(base_url: str, odd: dict[str, Any]) -> None:
    body = {"model": "polymath", "input": "x", **odd}
    answer = httpx.post(f"{base_url}/v1/embeddings", json=body)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_keys_and_limits_hold(gateway: Gateway, tmp_path: Path) -> None:
    limits = RequestLimits(max_characters=1000)
    async with beside(gateway, tmp_path, limits=limits) as other:
        given: Any = {"model": "polymath", "input": TEXTS}
        client = other.client(await other.key(rpm=2))
        raw = await client.embeddings.with_raw_response.create(**given)
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert await other.used("prompt_tokens") == raw.parse().usage.prompt_tokens
        with pytest.raises(openai.APIStatusError) as caught:
            await client.embeddings.create(model="polymath", input="x" * 1001)
        assert caught.value.status_code == 413
        with pytest.raises(openai.BadRequestError):
            await client.embeddings.create(**given, dimensions=3)
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(**given)
        with pytest.raises(openai.AuthenticationError):
            await other.client("pm-wrong").embeddings.create(**given)


async def test_a_router_without_an_encoder_has_no_embeddings(
    gateway: Gateway, tmp_path: Path
) -> None:
    class Blind:
        """The session's router, without what it reads with."""

        route = gateway.router.route

    router: Router = Blind()
    async with beside(gateway, tmp_path, router) as other:
        with pytest.raises(openai.NotFoundError, match="no sentence encoder"):
            await other.client().embeddings.create(model="polymath", input="x")
