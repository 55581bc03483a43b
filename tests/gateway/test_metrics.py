"""`GET /metrics`: what the engine counts, as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from polymath.experts import Engine
from polymath.gateway import Prepared
from polymath.gateway.app import Gateway, create_app
from tests.gateway.asking import DEFAULTS, ask, stream, streamed_text, text, user
from tests.gateway.running import LAW, MATH, Running, running, wait_for, write_config
from tests.proxy.stand_in import StandInServer, chunk, events, failing

GAUGES = {
    "polymath_build_info",
    "polymath_requests_in_flight",
    "polymath_groups_running",
    "polymath_groups_waiting",
    "polymath_rows_running",
    "polymath_kv_cache_tokens",
    "polymath_prefix_cache_tokens",
    "polymath_prefix_cache_hit_rate",
    "polymath_loaded_adapters",
}
COUNTERS = {
    "polymath_http_requests",
    "polymath_requests",
    "polymath_tokens",
    "polymath_cost_dollars",
    "polymath_cache_lookups",
    "polymath_prefix_cache_queried_tokens",
    "polymath_prefix_cache_hit_tokens",
    "polymath_prompt_tokens",
    "polymath_generated_tokens",
}
HISTOGRAMS = {
    "polymath_http_request_seconds",
    "polymath_request_seconds",
    "polymath_time_to_first_token_seconds",
    "polymath_inter_token_seconds",
    "polymath_router_confidence",
    "polymath_router_seconds",
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
    assert {family.name for family in families if family.type == "histogram"} == HISTOGRAMS
    assert len(families) == len(GAUGES | COUNTERS | HISTOGRAMS)
    for family in families:
        assert family.documentation.endswith(".")
        assert all(sample.value >= 0 for sample in family.samples)
        assert not any(sample.name.endswith("_created") for sample in family.samples)


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


async def test_before_the_models_are_loaded_there_is_no_engine_to_tell_of(demo: Prepared) -> None:
    transport = httpx.ASGITransport(create_app(Gateway(demo)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"polymath_build_info", "polymath_requests_in_flight"} <= names
    assert "polymath_groups_running" not in names


# --- requests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("metrics")
    config = write_config(folder, text_router, upstream, "cache: {exact: true}\n")
    with running(config, upstream) as gate:
        yield gate


Samples = Mapping[tuple[str, frozenset[str]], float]


def samples(gate: Running) -> Samples:
    """By name and the values of the labels, when nothing is being answered."""
    wait_for(lambda: not gate.gateway.door.inside)
    page = httpx.get(f"{gate.url}/metrics").raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(samples: Samples, name: str, *labels: str) -> float:
    return samples.get((f"polymath_{name}", frozenset(labels)), 0.0)


def test_requests_are_counted_by_who_answered_and_how_they_ended(gate: Running) -> None:
    before = samples(gate)
    gate.post({"messages": LAW})
    gate.post({"messages": LAW})
    gate.server.says(failing(500))
    gate.post({"model": "math", "messages": MATH})
    gate.post({"model": "nobody"})
    after = samples(gate)

    def grown(name: str, *labels: str) -> float:
        return value(after, name, *labels) - value(before, name, *labels)

    assert grown("requests_total", "law", "law", "encoder", "ok") == 2
    assert grown("requests_total", "math", "math", "explicit", "upstream_error") == 1
    assert grown("request_seconds_count", "law") == 2
    assert grown("tokens_total", "law", "prompt") == 3
    assert grown("tokens_total", "law", "completion") == 2
    assert grown("cost_dollars_total", "law") == pytest.approx(0.009)
    assert grown("cache_lookups_total", "miss") == 2
    assert grown("cache_lookups_total", "hit") == 1
    assert grown("router_confidence_count", "law") == 2
    assert grown("router_seconds_count") == 3
    path = "/v1/chat/completions"
    for status, count in (("200", 2), ("502", 1), ("404", 1)):
        assert grown("http_requests_total", "POST", path, status) == count
    assert grown("http_request_seconds_count", path) == 4


def test_times_of_tokens_are_those_of_streams(gate: Running) -> None:
    before = samples(gate)
    gate.server.says(events(chunk("a"), 0.05, chunk("b"), chunk("c")))
    assert streamed_text(stream(gate.client(), model="coding", temperature=1)) == "abc"
    after = samples(gate)
    for name in ("time_to_first_token_seconds", "inter_token_seconds"):
        assert value(after, f"{name}_count", "coding") == 1 + value(before, f"{name}_count")
    assert value(after, "inter_token_seconds_sum", "coding") >= 0.025
    assert value(after, "tokens_total", "coding", "completion") == 3


def test_what_is_being_answered_is_shown(gate: Running) -> None:
    end = threading.Event()
    gate.server.says(events(chunk("a"), end))
    given = {**DEFAULTS, "model": "coding", "temperature": 1}
    chunks = gate.client().chat.completions.create(stream=True, **given)
    next(chunks)
    assert read(gate.url)["polymath_requests_in_flight"] == 1
    assert value_of(gate, "upstream_outstanding_requests", "coding") == 1
    end.set()
    list(chunks)
    wait_for(lambda: read(gate.url)["polymath_requests_in_flight"] == 0)


def value_of(gate: Running, name: str, expert: str) -> float:
    page = httpx.get(f"{gate.url}/metrics").text
    (found,) = (
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == f"polymath_{name}" and sample.labels["expert"] == expert
    )
    return float(found)


def test_paths_that_anybody_makes_up_are_one(gate: Running) -> None:
    before = samples(gate)
    for name in ("a", "b", "c"):
        httpx.get(f"{gate.url}/{name}")
    grown = value(samples(gate), "http_requests_total", "GET", "unmatched", "404") - value(
        before, "http_requests_total", "GET", "unmatched", "404"
    )
    assert grown == 3
    assert read(gate.url)["polymath_build_info"] == 1
