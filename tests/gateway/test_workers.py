"""Several processes behind one address, which share a real Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymath.errors import ConfigError
from polymath.gateway import load_config
from tests.gateway.running import ADMIN_KEY, wait_for, write_config
from tests.gateway.test_server import ADDRESS, COMMAND
from tests.proxy.stand_in import StandInServer
from tests.redis_server import RedisServer

WORKERS = 2
BODY = {"model": "law", "messages": [{"role": "user", "content": "Hello."}]}


class Served:
    """`polymath serve` as a process of its own, and what it says."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.lines: list[str] = []
        command = [*COMMAND, "0", "--config", str(config)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: ADDRESS.search(self.said()) or self.process.poll() is not None)
        found = ADDRESS.search(self.said())
        assert found is not None, self.said()
        self.url = found[1]
        wait_for(lambda: self.said().count("ready: ") == WORKERS)
        self.key = self.new_key("reader")

    def said(self) -> str:
        return "".join(self.lines)

    def workers(self) -> list[int]:
        """Process ids of the children that serve. (One more tracks resources.)"""
        return [pid for pid in children(self.process.pid) if b"spawn_main" in command_of(pid)]

    def post(self, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        """By a connection of its own, which whatever worker may take."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def new_key(self, name: str, **rights: int) -> str:
        made = self.post("/admin/keys", {"name": name, **rights}, ADMIN_KEY)
        return str(made.raise_for_status().json()["key"])

    def models(self) -> set[str]:
        """Of some worker."""
        headers = {"authorization": f"Bearer {self.key}"}
        listed = httpx.get(f"{self.url}/v1/models", headers=headers, timeout=60)
        return {model["id"] for model in listed.raise_for_status().json()["data"]}

    def all_have(self, model: str) -> bool:
        """Whether each of many connections meets a worker that has a model."""
        return all(model in self.models() for _ in range(8 * WORKERS))

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    text_router: Path,
    upstream: StandInServer,
    redis_server: RedisServer,
) -> Iterator[Served]:
    keys = f"workers: {WORKERS}, shutdown_grace: 5"
    store = f"store: {redis_server.url}\n"
    config = write_config(
        tmp_path_factory.mktemp("workers"), text_router, upstream, store, server_keys=keys
    )
    served = Served(config)
    yield served
    served.process.kill()
    served.process.wait()


def test_there_are_as_many_processes_as_workers(served: Served) -> None:
    assert len(served.workers()) == WORKERS
    assert httpx.get(f"{served.url}/readyz").status_code == 200


def test_the_limits_of_a_key_are_those_of_all_workers_together(served: Served) -> None:
    key = served.new_key("app", rpm=3)
    found = [served.post("/v1/chat/completions", BODY, key).status_code for _ in range(6)]
    assert found == [200] * 3 + [429] * 3


def test_a_key_that_is_revoked_opens_no_worker_any_more(served: Served) -> None:
    key = served.new_key("gone")
    assert served.post("/v1/chat/completions", BODY, key).status_code == 200
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    httpx.delete(f"{served.url}/admin/keys/gone", headers=headers).raise_for_status()
    found = [served.post("/v1/chat/completions", BODY, key).status_code for _ in range(6)]
    assert found == [401] * 6


@pytest.mark.parametrize("by", ["admin", "signal"])
def test_a_reload_reaches_all_workers(served: Served, by: str) -> None:
    text = served.config.read_text()
    served.config.write_text(text.replace("  math:", f"  by-{by}: *law\n  math:"))
    if by == "admin":
        served.post("/admin/reload", key=ADMIN_KEY).raise_for_status()
    else:
        served.process.send_signal(signal.SIGHUP)
    wait_for(lambda: served.all_have(f"by-{by}"))


def test_the_counts_of_all_workers_are_added_up(served: Served) -> None:
    def answered() -> float:
        text = httpx.get(f"{served.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("polymath_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = answered()
    for _ in range(8):
        served.post("/v1/chat/completions", BODY, served.key).raise_for_status()
    wait_for(lambda: answered() == before + 8)


def test_a_worker_that_is_killed_is_replaced_though_the_file_is_bad_by_now(served: Served) -> None:
    good = served.config.read_text()
    ready = served.said().count("ready: ")
    killed, *rest = served.workers()
    served.config.write_text(good.replace("fallback: law", "fallback: lawyer"))
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: served.said().count("ready: ") > ready)
    assert killed not in served.workers()
    assert set(rest) < set(served.workers())
    assert "no expert 'lawyer'" in served.said()
    assert served.all_have("law")
    served.config.write_text(good)


def test_sigterm_ends_them_all(served: Served) -> None:
    workers = served.workers()
    assert served.end() == 0
    assert not [pid for pid in workers if command_of(pid)]


def test_workers_need_a_store_that_they_share(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    config = write_config(tmp_path, text_router, upstream, server_keys="workers: 2")
    with pytest.raises(ConfigError, match=r"server\.workers: several processes need a store"):
        load_config(config, {})
