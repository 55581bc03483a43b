"""`GET /metrics`: what the engine counts, as Prometheus reads it."""

from __future__ import annotations

import time

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from polymath.experts import Engine
from polymath.gateway import Prepared
from polymath.gateway.app import Gateway, create_app
from tests.gateway.asking import DEFAULTS, ask, text, user

GAUGES = {
    "polymath_groups_running",
    "polymath_groups_waiting",
    "polymath_rows_running",
    "polymath_kv_cache_tokens",
    "polymath_prefix_cache_tokens",
    "polymath_prefix_cache_hit_rate",
    "polymath_loaded_adapters",
}
COUNTERS = {
    "polymath_prefix_cache_queried_tokens",
    "polymath_prefix_cache_hit_tokens",
    "polymath_prompt_tokens",
    "polymath_generated_tokens",
}
STORY = [user(f"{'A heron stood in the reeds. ' * 60}What stood in the reeds?")]
"""So long that what a second turn adds hardly counts."""


def read(base_url: str) -> dict[str, float]:
    """The value of every sample."""
    page = httpx.get(f"{base_url}/metrics").raise_for_status().text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def read_idle(base_url: str, engine: Engine) -> dict[str, float]:
    """The same, once nothing runs any more."""
    deadline = time.monotonic() + 10
    while engine.active and time.monotonic() < deadline:
        time.sleep(0.02)
    return read(base_url)


def test_every_metric_has_a_type_and_says_what_it_is(base_url: str) -> None:
    answer = httpx.get(f"{base_url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert {family.name for family in families if family.type == "gauge"} == GAUGES
    assert {family.name for family in families if family.type == "counter"} == COUNTERS
    for family in families:
        assert family.documentation.endswith(".")
        (sample,) = family.samples
        assert sample.value >= 0


def test_tokens_are_counted(base_url: str, client: OpenAI, engine: Engine) -> None:
    before = read_idle(base_url, engine)
    usage = ask(client, messages=[user("A prompt of which nothing is cached.")], max_tokens=5).usage
    after = read_idle(base_url, engine)
    assert usage is not None

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("polymath_generated_tokens_total") == usage.completion_tokens == 5
    assert grown("polymath_prefix_cache_queried_tokens_total") == usage.prompt_tokens
    hit = grown("polymath_prefix_cache_hit_tokens_total")
    assert grown("polymath_prompt_tokens_total") == usage.prompt_tokens - hit


def test_a_conversation_that_goes_on_finds_what_was_said_before(
    base_url: str, client: OpenAI, engine: Engine
) -> None:
    first = ask(client, model="general", messages=STORY, max_tokens=12)
    before = read_idle(base_url, engine)
    longer = [*STORY, {"role": "assistant", "content": text(first)}, user("Why?")]
    second = ask(client, model="general", messages=longer, max_tokens=2)
    after = read_idle(base_url, engine)
    assert first.usage is not None
    assert second.usage is not None
    hit, queried = (
        after[name] - before[name]
        for name in (
            "polymath_prefix_cache_hit_tokens_total",
            "polymath_prefix_cache_queried_tokens_total",
        )
    )
    assert queried == second.usage.prompt_tokens
    assert first.usage.prompt_tokens <= hit < second.usage.prompt_tokens
    assert after["polymath_prefix_cache_hit_rate"] > before["polymath_prefix_cache_hit_rate"]


def test_the_hit_rate_is_the_share_of_tokens_that_were_found(base_url: str, client: OpenAI) -> None:
    ask(client, max_tokens=1)
    found = read(base_url)
    assert found["polymath_prefix_cache_hit_rate"] == pytest.approx(
        found["polymath_prefix_cache_hit_tokens_total"]
        / found["polymath_prefix_cache_queried_tokens_total"]
    )


def test_what_runs_is_shown_while_it_runs(base_url: str, client: OpenAI, engine: Engine) -> None:
    idle = read_idle(base_url, engine)
    assert idle["polymath_groups_running"] == idle["polymath_rows_running"] == 0
    assert idle["polymath_kv_cache_tokens"] == 0
    usage = ask(client, model="both", max_tokens=1).usage
    assert usage is not None
    given = {**DEFAULTS, "model": "both", "max_tokens": 200}
    chunks = client.chat.completions.create(stream=True, **given, extra_body={"ignore_eos": True})
    next(chunks)
    while not (running := read(base_url))["polymath_groups_running"]:
        time.sleep(0.02)
    chunks.close()
    assert running["polymath_groups_running"] == 1
    assert running["polymath_rows_running"] == 2
    assert running["polymath_kv_cache_tokens"] == 2 * (usage.prompt_tokens + 200)
    assert running["polymath_loaded_adapters"] >= 2
    assert read_idle(base_url, engine)["polymath_rows_running"] == 0


async def test_before_the_models_are_loaded_there_is_nothing_to_count(demo: Prepared) -> None:
    transport = httpx.ASGITransport(create_app(Gateway(demo)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
