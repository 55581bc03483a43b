"""A new config while requests are answered: by signal, by the admin API, by the file itself."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymath.gateway import load_config, prepare
from polymath.gateway.app import Gateway
from polymath.gateway.protocol import LoadAdapterRequest
from tests.conftest import serving, write_random_adapter
from tests.gateway.asking import HELLO, ask, stream, streamed_text, text
from tests.gateway.running import ADMIN_KEY, Running, change, running, wait_for, write_config
from tests.gateway.test_server import ADDRESS, COMMAND
from tests.proxy.stand_in import Received, Reply, StandInServer, chunk, completion, events
from tests.redis_server import RedisServer

IN_FLIGHT, RELOADS = 200, 20
ANSWER_SECONDS = 2.0
MORE = "  more: {<<: *law, model: m-more, domains: [coding]}\n"
CODING = "  coding: {<<: *law, model: m-coding}\n"

BAD_FILES = {
    "yaml": ("router:", "router: [", ":15: not valid YAML"),
    "key": ("num_retries:", "num_retry:", "experts.law.num_retry: unknown key"),
    "expert": ("fallback: law", "fallback: lawyer", "router.fallback: no expert 'lawyer'"),
    "folder": ("/router,", "/rooter,", "router.path: "),
}


@pytest.fixture
def running_gateway(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    with running(write_config(tmp_path, text_router, upstream), upstream) as gate:
        yield gate


def models(url: str) -> set[str]:
    cards = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
    return {card["id"] for card in cards}


def slow(request: Received) -> Reply:
    """An answer that takes its time, whole or as a stream."""
    if request.body["stream"]:
        return events(chunk("Slow"), ANSWER_SECONDS, chunk("ly."))
    return Reply([ANSWER_SECONDS, *completion("Slowly.").pieces], headers=completion().headers)


# --- the file counts -----------------------------------------------------------------------------


def test_the_admin_api_reloads_the_file(running_gateway: Running) -> None:
    gate = running_gateway
    change(gate.config, CODING, MORE)
    answer = gate.reload()
    assert answer.json() == {"status": "reloaded", "experts": ["law", "more", "math"]}
    assert models(gate.url) == {"polymath", "law", "math", "more"}
    assert gate.post({"model": "more"}).json()["model"] == "more"
    assert gate.server.requests[-1].body["model"] == "m-more"
    assert gate.post({"model": "coding"}).status_code == 404


@pytest.mark.parametrize(("old", "new", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_changes_nothing_and_the_answer_says_why(
    running_gateway: Running, old: str, new: str, said: str
) -> None:
    gate = running_gateway
    live = gate.gateway.live
    before = change(gate.config, old, new)
    answer = gate.reload()
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]
    assert str(gate.config) in answer.json()["error"]["message"]
    assert gate.gateway.live is live
    assert gate.post({"model": "coding"}).status_code == 200
    gate.config.write_text(before)
    assert gate.reload().status_code == 200


def test_a_changed_file_is_noticed_and_a_bad_one_is_logged(
    tmp_path: Path, text_router: Path, upstream: StandInServer, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, text_router, upstream)
    config.write_text(config.read_text().replace("watch_config: false", "watch_config: true"))
    with running(config, upstream) as gate:
        change(config, CODING, MORE)
        wait_for(lambda: "more" in models(gate.url))
        live = gate.gateway.live
        change(config, "num_retries", "num_retry")
        wait_for(lambda: "num_retry: unknown key" in caplog.text)
        assert gate.gateway.live is live
        change(config, "num_retry", "num_retries")
        wait_for(lambda: gate.gateway.live is not live)
    assert caplog.text.count("the config is as it was") == 1


def test_what_takes_a_restart_is_said(
    running_gateway: Running, caplog: pytest.LogCaptureFixture
) -> None:
    gate = running_gateway
    change(gate.config, "watch_config", "max_body_bytes: 2048, watch_config")
    gate.config.write_text(gate.config.read_text() + "auth: none\n")
    with caplog.at_level(logging.WARNING):
        assert gate.reload().status_code == 200
    assert "server.max_body_bytes has changed: that takes a restart" in caplog.text
    assert "auth has changed: that takes a restart" in caplog.text


def test_what_the_command_line_gave_is_kept(
    tmp_path: Path, text_router: Path, upstream: StandInServer, caplog: pytest.LogCaptureFixture
) -> None:
    file = load_config(
        write_config(tmp_path, text_router, upstream), {}, {("server", "port"): 8099}
    )
    gateway = Gateway(prepare(file))
    with serving(gateway) as url, caplog.at_level(logging.WARNING):
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        assert httpx.post(f"{url}/admin/reload", headers=headers).status_code == 200
        assert gateway.settings.server.port == 8099
    assert "restart" not in caplog.text


def test_sighup_reloads_and_never_kills(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    config = write_config(tmp_path, text_router, upstream)
    command = [*COMMAND, "0", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        wait_for(lambda: any(ADDRESS.search(line) for line in lines))
        process.send_signal(signal.SIGHUP)
        url = next(match[1] for line in lines if (match := ADDRESS.search(line)))
        wait_for(lambda: any("ready" in line for line in lines))
        change(config, CODING, MORE)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "more" in models(url))
        change(config, "fallback: law", "fallback: lawyer")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("no expert 'lawyer'" in line for line in lines))
        assert "more" in models(url)
    finally:
        process.kill()
        process.wait()
        reading.join()


# --- nobody is dropped ---------------------------------------------------------------------------


async def test_of_200_requests_in_flight_over_20_reloads_none_fails(
    running_gateway: Running,
) -> None:
    gate = running_gateway
    gate.server.otherwise = slow
    over = asyncio.Event()
    answers: list[str] = []

    async def keep_asking(client: httpx.AsyncClient, streaming: bool) -> None:
        body = {"model": "polymath", "messages": [{"role": "user", "content": "Hi."}]}
        while not over.is_set():
            asked = {**body, "stream": streaming}
            answer = await client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 200, answer.text
            answers.append(said(answer.text) if streaming else content(answer))

    limits = httpx.Limits(max_connections=IN_FLIGHT)
    async with httpx.AsyncClient(base_url=gate.url, limits=limits, timeout=60) as client:
        asking = [asyncio.create_task(keep_asking(client, bool(i % 2))) for i in range(IN_FLIGHT)]
        await asyncio.to_thread(wait_for, lambda: gate.gateway.door.inside == IN_FLIGHT)
        for index in range(RELOADS):
            old, new = (CODING, MORE) if index % 2 == 0 else (MORE, CODING)
            change(gate.config, old, new)
            change(gate.config, f"timeout: {20 + index}", f"timeout: {21 + index}")
            assert (await asyncio.to_thread(gate.reload)).status_code == 200
            assert gate.gateway.door.inside > IN_FLIGHT / 2
        over.set()
        await asyncio.gather(*asking)
    assert len(answers) >= IN_FLIGHT
    assert set(answers) == {"Slowly."}
    assert gate.gateway.door.inside == 0
    await asyncio.to_thread(wait_for, lambda: not gate.gateway._retiring)
    assert gate.gateway._generations == [gate.gateway.live]


def content(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def said(page: str) -> str:
    lines = [line.removeprefix("data: ") for line in page.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(c["delta"].get("content") or "" for one in chunks for c in one["choices"])


def test_connections_are_used_again_unless_the_upstream_is_another(
    running_gateway: Running,
) -> None:
    gate = running_gateway
    for _ in range(2):
        assert gate.post({"model": "math"}).status_code == 200
        assert gate.reload().status_code == 200
    assert gate.server.connections == 1
    change(gate.config, "timeout: 20", "timeout: 21")
    assert gate.reload().status_code == 200
    assert gate.post({"model": "math"}).status_code == 200
    assert gate.server.connections == 2


def test_a_stream_outlives_two_reloads_of_which_the_second_drops_its_expert(
    running_gateway: Running,
) -> None:
    gate = running_gateway
    end = threading.Event()
    gate.server.says(events(chunk("a"), end, chunk("b")))
    given: dict[str, Any] = {"model": "coding", "messages": [{"role": "user", "content": "Hi."}]}
    chunks = gate.client().chat.completions.create(stream=True, **given)
    next(chunks)
    assert gate.reload().status_code == 200
    change(gate.config, CODING, "")
    assert gate.reload().status_code == 200
    assert gate.post({"model": "coding"}).status_code == 404
    end.set()
    assert [one.choices[0].delta.content for one in chunks] == ["b"]


# --- models here ---------------------------------------------------------------------------------

LOCAL = """\
server: {admin_key: the-admin-key, watch_config: false}
base_models: {tiny: {model: TINY}}
experts:
  first: {base_model: tiny, adapter: first}
  second: {base_model: tiny, adapter: second}
router: {path: ROUTER, fallback: first, min_confidence: 0}
engine: {backend: torch, dtype: float32}
cache: {exact: true}
"""
LONG = {"max_tokens": 120, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second", "third")):
        write_random_adapter(root / name, tiny_model, seed)
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the tiny model, which several threads only slow down on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def local(
    one_thread: None,
    tmp_path: Path,
    text_router: Path,
    tiny_model: Path,
    adapters: Path,
    upstream: StandInServer,
) -> Iterator[Running]:
    for name in ("first", "second", "third"):
        shutil.copytree(adapters / name, tmp_path / name)
    config = tmp_path / "polymath.yaml"
    config.write_text(LOCAL.replace("TINY", str(tiny_model)).replace("ROUTER", str(text_router)))
    with running(config, upstream) as gate:
        yield gate


def exchange(gate: Running, name: str, other: str) -> None:
    """Put another adapter into a folder, as a deployment does."""
    folder = gate.config.parent / name
    folder.rename(folder.with_name("gone"))
    shutil.copytree(gate.config.parent / other, folder)
    shutil.rmtree(folder.with_name("gone"))


def test_running_answers_end_on_the_old_adapter_and_new_ones_use_the_new(local: Running) -> None:
    client = local.client()
    old = text(ask(client, model="first", **LONG))
    short = text(ask(client, model="first"))
    given = {"model": "first", "messages": [{"role": "user", "content": "Tell me about the moon."}]}
    chunks = client.chat.completions.create(
        stream=True, temperature=0, **given, **LONG, extra_headers={"cache-control": "no-store"}
    )
    begun = [next(chunks)]
    exchange(local, "first", "third")
    assert local.reload().status_code == 200
    new = text(ask(client, model="first"))
    assert streamed_text([*begun, *chunks]) == old
    assert new != short
    assert streamed_text(stream(client, model="first")) == new
    assert local.gateway.engine.models["tiny"].adapters.names == ("second", "first")


def test_an_adapter_that_cannot_be_used_changes_nothing(local: Running) -> None:
    client, engine = local.client(), local.gateway.engine
    before = text(ask(client, model="first"))
    exchange(local, "first", "third")
    (local.config.parent / "second" / "adapter_model.safetensors").write_bytes(b"damaged")
    answer = local.reload()
    assert answer.status_code == 400
    assert "experts.second.adapter" in answer.json()["error"]["message"]
    no_store = {"extra_headers": {"cache-control": "no-store"}}
    assert text(ask(client, model="first", **no_store)) == before
    assert local.gateway.engine is engine


def test_an_adapter_that_comes_back_while_an_old_answer_runs_stays(local: Running) -> None:
    gateway = local.gateway
    old = gateway.live
    old.enter()  # as a request that lasts
    expert = "  second: {base_model: tiny, adapter: second}\n"
    change(local.config, expert, "")
    assert local.reload().status_code == 200
    assert "second" not in models(local.url)
    change(local.config, "router:", f"{expert}router:")
    assert local.reload().status_code == 200
    asyncio.run_coroutine_threadsafe(left(old), gateway_loop(gateway)).result(10)
    wait_for(lambda: not gateway._retiring)
    assert text(ask(local.client(), model="second"))


async def left(live: Any) -> None:
    live.leave()


def gateway_loop(gateway: Gateway) -> asyncio.AbstractEventLoop:
    assert gateway._flushing is not None
    return gateway._flushing.get_loop()


def test_other_base_models_bring_another_engine_and_the_old_one_ends_with_its_answers(
    local: Running,
) -> None:
    client, old = local.client(), local.gateway.engine
    given = {"model": "second", "messages": [{"role": "user", "content": "Tell me."}]}
    no_store = {"cache-control": "no-store"}
    whole = text(client.chat.completions.create(**given, **LONG, temperature=0))
    chunks = client.chat.completions.create(
        stream=True, temperature=0, **given, **LONG, extra_headers=no_store
    )
    begun = [next(chunks)]
    change(local.config, "dtype: float32", "dtype: float32, max_num_seqs: 3")
    assert local.reload().status_code == 200
    assert local.reload().status_code == 200
    assert local.gateway.engine is not old
    assert streamed_text([*begun, *chunks]) == whole
    assert text(ask(client, model="second"))
    wait_for(lambda: old._closed)
    assert not local.gateway.engine._closed


def test_an_adapter_loaded_at_run_time_stays(local: Running) -> None:
    folder = str(local.config.parent / "third")
    local.gateway.updates.load(LoadAdapterRequest(lora_name="added", lora_path=folder))
    before = text(ask(local.client(), model="added"))
    assert local.reload().status_code == 200
    no_store = {"extra_headers": {"cache-control": "no-store"}}
    assert text(ask(local.client(), model="added", **no_store)) == before
    local.gateway.updates.unload("added")
    assert local.reload().status_code == 200
    assert "added" not in models(local.url)


async def test_of_streams_over_reloads_each_has_one_adapter_from_its_first_token_to_its_last(
    local: Running,
) -> None:
    client = local.client()
    no_store = {"extra_headers": {"cache-control": "no-store"}}
    first = text(ask(client, model="first", max_tokens=40, **no_store))
    old, new = "{base_model: tiny, adapter: first}", "{base_model: tiny, adapter: third}"
    over = asyncio.Event()
    answers: list[str] = []

    async def keep_asking(client: httpx.AsyncClient) -> None:
        body = {"model": "first", "messages": HELLO, "max_tokens": 40, "temperature": 0}
        headers = {"cache-control": "no-store"}
        while not over.is_set():
            asked = {**body, "stream": True}
            answer = await client.post("/v1/chat/completions", json=asked, headers=headers)
            assert answer.status_code == 200, answer.text
            answers.append(said(answer.text))

    async with httpx.AsyncClient(base_url=local.url, timeout=60) as asking_client:
        asking = [asyncio.create_task(keep_asking(asking_client)) for _ in range(6)]
        await asyncio.to_thread(wait_for, lambda: len(answers) > 6)
        for index in range(4):
            change(local.config, *((old, new) if index % 2 == 0 else (new, old)))
            assert (await asyncio.to_thread(local.reload)).status_code == 200
            seen = len(answers)
            await asyncio.to_thread(wait_for, lambda seen=seen: len(answers) > seen)
        change(local.config, old, new)
        assert (await asyncio.to_thread(local.reload)).status_code == 200
        over.set()
        await asyncio.gather(*asking)
    third = text(ask(client, model="first", max_tokens=40, **no_store))
    assert first != third
    assert set(answers) == {first, third}


# --- replicas ------------------------------------------------------------------------------------


def test_the_reload_of_one_replica_reaches_the_others(
    tmp_path: Path, text_router: Path, upstream: StandInServer, frail_server: RedisServer
) -> None:
    store = f"store: {frail_server.url}\n"
    config = write_config(tmp_path / "shared", text_router, upstream, store)
    with running(config, upstream) as gate:
        other = Gateway(prepare(load_config(config, {})))
        with serving(other) as url:
            change(config, CODING, MORE)
            assert gate.reload().status_code == 200
            wait_for(lambda: "more" in models(url))
            assert gate.admin("DELETE", "/experts/more").status_code == 200
            wait_for(lambda: "more" not in models(url))
            audit = gate.admin("GET", "/audit").json()["data"]
            assert [entry["action"] for entry in audit] == ["remove expert", "reload"]
            live = other.live
            assert gate.reload().status_code == 200
            wait_for(lambda: other.live is not live)


def test_the_gateway_serves_on_without_redis_and_says_so_once(
    tmp_path: Path,
    text_router: Path,
    upstream: StandInServer,
    frail_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = f"store: {frail_server.url}\nauth: none\n"
    with running(write_config(tmp_path, text_router, upstream, store), upstream) as gate:
        frail_server.kill()
        wait_for(lambda: "Redis is gone" in caplog.text)
        live = gate.gateway.live
        answer = gate.reload()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert gate.gateway.live is live
        assert gate.post().status_code == 200
        frail_server.start()
        wait_for(lambda: "Redis is back" in caplog.text)
        assert gate.reload().status_code == 200
    assert caplog.text.count("Redis is gone") == 1
    assert "the config is as it was" not in caplog.text
