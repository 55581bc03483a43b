"""Against llama.cpp's server, which nobody here wrote: `make test-peers` builds and asks it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.servers import llama_server
from polymath.artifacts import package_files
from polymath.experts import Engine, EngineSettings, Expert, ExpertSettings
from polymath.gateway import ChatService
from polymath.gateway.app import Gateway

BASE = "smollm2"
ARITHMETIC = 0.3
"""Nats between llama.cpp, which rounds activations to 8 bits, and our engine, of one model."""
QUESTION = "Tom has 3 apples and buys 5 more. How many apples has he now?"
ADDED: dict[str, dict[str, Any]] = {
    "far": {"kind": "proxy_tuned", "large": "llama", "tuned": "math", "untuned": BASE},
    "single": {"kind": "proxy_tuned", "large": "llama", "tuned": "math", "untuned": BASE},
    "guided": {"kind": "guided", "guide": "health", "upstream": "llama", "guide_tokens": 24},
    "thrifty": {
        "kind": "cascade",
        "cheap": "general",
        "strong": "llama",
        "judge": {"kind": "logprob", "threshold": 0.0},
    },
}

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("LLAMA" not in os.environ, reason="`make test-peers` installs llama.cpp"),
]


@pytest.fixture(scope="module")
def url(gateway: Gateway) -> Iterator[str]:
    files = package_files(gateway.prepared.settings.base_models[BASE].model)
    gguf = next(file for file in files if file.suffix == ".gguf")
    python = Path(os.environ["LLAMA"])
    with llama_server(python, gguf, None, 2, every_logit=True, one_by_one=True) as url:
        yield f"{url}/v1"


def asked(gateway: Gateway, engine: Engine, url: str, expert: str, **given: Any) -> dict[str, Any]:
    """A whole answer."""
    catalog = dict(gateway.catalog)
    upstream = {"kind": "upstream", "api_base": url, "model": "smollm2"}
    single = {**ADDED["single"], "draft": 0}
    for name, values in {"llama": upstream, **ADDED, "single": single}.items():
        catalog[name] = Expert(name, ExpertSettings.model_validate(values), ())

    async def ask() -> dict[str, Any]:
        chats = ChatService(catalog, gateway.router, engine, EngineSettings())
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        try:
            return await chats.ask(expert).whole(
                {"model": expert, "max_tokens": 24, **body, **given}
            )
        finally:
            for one in chats.upstreams.values():
                await one.close()

    return asyncio.run(ask())


def text(reply: dict[str, Any]) -> str:
    content: str = reply["choices"][0]["message"]["content"]
    return content


def test_it_answers_as_an_upstream(gateway: Gateway, engine: Engine, url: str) -> None:
    reply = asked(gateway, engine, url, "llama")
    assert text(reply)
    assert reply["usage"]["completion_tokens"] > 0


def test_blocks_say_what_single_tokens_say(gateway: Gateway, engine: Engine, url: str) -> None:
    blocks, single = (asked(gateway, engine, url, name) for name in ("far", "single"))
    assert text(blocks) == text(single)
    calls = [reply["choices"][0]["polymath"]["steering"] for reply in (blocks, single)]
    assert calls[0]["upstream_calls"] < calls[1]["upstream_calls"] == calls[1]["tokens"]


@pytest.mark.parametrize("expert", ["far", "single"])
def test_alpha_0_is_its_own_greedy_text(
    gateway: Gateway, engine: Engine, url: str, expert: str
) -> None:
    steered = asked(gateway, engine, url, expert, polymath={"alpha": 0})
    own = asked(gateway, engine, url, "llama", repeat_penalty=1.0)  # the server's default is 1.1
    assert text(steered) == text(own)


@pytest.mark.parametrize("expert", ["far", "single"])
def test_an_answer_ends_though_the_server_does_not_list_the_end(
    gateway: Gateway, engine: Engine, url: str, expert: str
) -> None:
    given = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 48}
    steered = asked(gateway, engine, url, expert, polymath={"alpha": 0}, **given)
    own = asked(gateway, engine, url, "llama", repeat_penalty=1.0, **given)
    assert text(steered) == text(own)
    assert steered["choices"][0]["finish_reason"] == own["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("expert", ["far", "single"])
def test_on_the_base_of_the_tuned_expert_it_is_that_expert(
    gateway: Gateway, engine: Engine, url: str, expert: str
) -> None:
    """M == M-, but for llama.cpp's arithmetic: they may part where two tokens are as good."""
    steered = asked(gateway, engine, url, expert, logprobs=True)
    tuned = asked(gateway, engine, url, "math", logprobs=True, top_logprobs=5)
    for mine, its in zip(listed(steered), listed(tuned), strict=False):
        if mine["token"] != its["token"]:
            best = {token["token"]: token["logprob"] for token in its["top_logprobs"]}
            assert its["logprob"] - best[mine["token"]] < ARITHMETIC
            break


def listed(reply: dict[str, Any]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = reply["choices"][0]["logprobs"]["content"]
    return content


def test_it_is_guided_and_stands_behind_a_cascade(
    gateway: Gateway, engine: Engine, url: str
) -> None:
    assert asked(gateway, engine, url, "guided")["polymath"]["guidance"]["used"]
    assert asked(gateway, engine, url, "thrifty")["polymath"]["cascade"]["expert"] == "llama"
