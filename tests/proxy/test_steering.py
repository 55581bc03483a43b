"""Proxy-tuning of a model behind HTTP: what it must be equal to, in blocks and token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from bench.scoring_server import BASE, ScoringServer
from polymath.errors import InvalidRequest, ModelSourceError, UpstreamFailed
from polymath.experts import Engine, EngineSettings, Expert, ExpertSettings
from polymath.gateway import ChatService
from polymath.gateway.app import Gateway

QUESTION = "Tom has 3 apples and buys 5 more. How many apples has he now?"
WIDE = 1000
"""A support that covers all that matters."""


@pytest.fixture(scope="module", params=[True, False], ids=["ids", "texts"])
def upstream(request: pytest.FixtureRequest, engine: Engine) -> ScoringServer:
    return ScoringServer(engine, by_id=request.param)


@pytest.fixture(scope="module")
def url(upstream: ScoringServer) -> Iterator[str]:
    with upstream.serving() as url:
        yield url


@pytest.fixture
def by_id(engine: Engine) -> Iterator[tuple[ScoringServer, str]]:
    stand_in = ScoringServer(engine, by_id=True)
    with stand_in.serving() as url:
        yield stand_in, url


def service(gateway: Gateway, engine: Engine, url: str, **steered: Any) -> ChatService:
    """The session's experts, `big` behind HTTP, and `far`, which steers it by math."""
    added = {
        "big": {"kind": "upstream", "api_base": url, "model": "big", "num_retries": 0},
        "far": {
            "kind": "proxy_tuned",
            "large": "big",
            "tuned": "math",
            "untuned": BASE,
            "support": WIDE,
            **steered,
        },
    }
    catalog = dict(gateway.catalog)
    for name, values in added.items():
        catalog[name] = Expert(name, ExpertSettings.model_validate(values), ())
    return ChatService(catalog, gateway.router, engine, EngineSettings())


def asked(
    gateway: Gateway, engine: Engine, url: str, expert: str = "far", **given: Any
) -> dict[str, Any]:
    """The first choice of an answer; `steered` is what the config says of `far`."""
    steered = given.pop("steered", {})

    async def ask() -> dict[str, Any]:
        chats = service(gateway, engine, url, **steered)
        body = {
            "model": expert,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 16,
            **given,
        }
        try:
            reply = await chats.ask(expert).whole(body)
        finally:
            for one in chats.upstreams.values():
                await one.close()
        choice: dict[str, Any] = reply["choices"][0]
        return choice

    return asyncio.run(ask())


def text(choice: dict[str, Any]) -> str:
    content: str = choice["message"]["content"]
    return content


@pytest.mark.parametrize("draft", [0, 4, None])
def test_alpha_0_is_the_upstream(
    gateway: Gateway, engine: Engine, url: str, draft: int | None
) -> None:
    steered = asked(gateway, engine, url, steered={"alpha": 0, "draft": draft})
    assert text(steered) == text(asked(gateway, engine, url, BASE))


@pytest.mark.parametrize("draft", [0, 4, None])
def test_with_equal_bases_it_is_the_tuned_expert(
    gateway: Gateway, engine: Engine, url: str, draft: int | None
) -> None:
    """M == M-, alpha = 1: s_M + (s_M+ - s_M-) is s_M+ on a support that covers it."""
    steered = asked(gateway, engine, url, steered={"draft": draft})
    assert text(steered) == text(asked(gateway, engine, url, "math"))


@pytest.mark.parametrize("alpha", [0.5, 1.5])
@pytest.mark.parametrize("support", [5, 20])
def test_blocks_say_what_single_tokens_say(
    gateway: Gateway, engine: Engine, url: str, alpha: float, support: int
) -> None:
    single = {"alpha": alpha, "support": support, "draft": 0}
    blocks = {**single, "draft": 6}
    one = asked(gateway, engine, url, steered=single, logprobs=True)
    other = asked(gateway, engine, url, steered=blocks, logprobs=True)
    assert text(one) == text(other)
    for mine, its in zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=True):
        assert mine["logprob"] == pytest.approx(its["logprob"], abs=1e-3)


def test_blocks_take_fewer_calls(gateway: Gateway, engine: Engine, url: str) -> None:
    single = asked(gateway, engine, url, steered={"draft": 0})["polymath"]["steering"]
    blocks = asked(gateway, engine, url)["polymath"]["steering"]
    assert single["upstream_calls"] == single["tokens"]
    assert blocks["tokens"] == single["tokens"]
    assert blocks["upstream_calls"] <= 0.5 * blocks["tokens"]


def test_the_missing_mass_is_told(gateway: Gateway, engine: Engine, url: str) -> None:
    narrow = asked(gateway, engine, url, steered={"support": 1})["polymath"]["steering"]
    wide = asked(gateway, engine, url)["polymath"]["steering"]
    assert 0 <= wide["missing_mass"] < narrow["missing_mass"] < 1


def test_the_alpha_of_a_request_wins(gateway: Gateway, engine: Engine, url: str) -> None:
    asked_for = asked(gateway, engine, url, polymath={"alpha": 0})
    assert text(asked_for) == text(asked(gateway, engine, url, BASE))


def test_alpha_is_refused_where_nothing_is_steered(
    gateway: Gateway, engine: Engine, url: str
) -> None:
    with pytest.raises(InvalidRequest, match="not proxy-tuned"):
        asked(gateway, engine, url, "math", polymath={"alpha": 2})


def test_alpha_of_a_request_steers_local_models_too(
    gateway: Gateway, engine: Engine, url: str
) -> None:
    plain = asked(gateway, engine, url, "twin", polymath={"alpha": 0})
    assert text(plain) == text(asked(gateway, engine, url, BASE))


def test_each_token_says_who_raised_it(gateway: Gateway, engine: Engine, url: str) -> None:
    choice = asked(gateway, engine, url, polymath={"attribution": True}, max_tokens=6)
    told = choice["polymath"]["attribution"]
    assert len(told) == 6
    assert {token["expert"] for token in told} <= {"big", "math", BASE}
    assert told[0]["weights"] == {"big": 1.0, "math": 1.0, BASE: -1.0}


def test_a_seed_draws_the_same_answer(gateway: Gateway, engine: Engine, url: str) -> None:
    texts = [
        text(asked(gateway, engine, url, temperature=1.0, seed=seed, max_tokens=12))
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_is_left_running(gateway: Gateway, engine: Engine, url: str) -> None:
    asked(gateway, engine, url, n=2, max_tokens=5)
    asyncio.run(asyncio.sleep(0.2))
    assert engine.active == 0


def test_another_tokenizer_is_told_with_the_place(
    gateway: Gateway, engine: Engine, by_id: tuple[ScoringServer, str]
) -> None:
    stand_in, url = by_id
    third = engine.models[BASE].tokenizer.encode("Tokens of naïve cafés")[2]
    stand_in.retold = {f"token_id:{third}": "token_id:7"}
    with pytest.raises(ModelSourceError, match=r"tokenizer: at token 2 of the probe text"):
        asked(gateway, engine, url)


def test_an_upstream_without_log_probabilities_cannot_be_steered(
    gateway: Gateway, engine: Engine
) -> None:
    with pytest.raises(UpstreamFailed, match="cannot be reached"):
        asked(gateway, engine, "http://127.0.0.1:9/v1")
