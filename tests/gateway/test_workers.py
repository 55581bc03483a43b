"""Several processes behind one address, which share a real Redis."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymath.gateway import ConfigFile, Prepared, load_config, workers
from polymath.gateway.reload import as_started
from tests.gateway.running import ADMIN_KEY, change, wait_for
from tests.gateway.test_server import ADDRESS, COMMAND
from tests.proxy.stand_in import Reply, StandInServer, completion
from tests.redis_server import RedisServer

WORKERS = 2
CHAT = "/v1/chat/completions"
BODY = {"model": "law", "messages": [{"role": "user", "content": "Hello."}]}
MOST_CONNECTIONS = 500
"""Until one of them is with another worker than the first."""
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}

CONFIG = """\
server: {workers: 2, shutdown_grace: 10, watch_config: false, admin_key: ADMIN_KEY}
experts:
  law: &law {kind: upstream, api_base: URL, model: m, num_retries: 0}
  math: *law
router: {kind: rules, fallback: law}
store: STORE
"""


class Served:
    """`polymath serve` as a process of its own, and what it says.

    Attributes:
        first: process ids of the workers that it began with.
    """

    def __init__(self, config: Path, upstream: StandInServer) -> None:
        self.config = config
        self.upstream = upstream
        self.lines: list[str] = []
        command = [*COMMAND, "0", "--config", str(config)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: ADDRESS.search(self.said()) or self.process.poll() is not None)
        found = ADDRESS.search(self.said())
        assert found is not None, self.said()
        self.url = found[1]
        wait_for(lambda: len(self.workers()) == WORKERS)
        self.first = self.workers()

    def start(self) -> None:
        """Until all workers are ready, though they are told to reload before."""
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.ready() == WORKERS)
        self.key = self.new_key("reader")

    def said(self) -> str:
        return "".join(self.lines)

    def ready(self) -> int:
        """How many workers have been ready so far."""
        return self.said().count("ready: ")

    def workers(self) -> list[int]:
        """Process ids of the children that serve. (One more tracks resources.)"""
        return [pid for pid in children(self.process.pid) if b"spawn_main" in command_of(pid)]

    def client(self, key: str | None = None) -> httpx.Client:
        """Keeps its connection, and so its worker."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def chat(self, key: str | None = None) -> int:
        """The status of a request by a connection of its own, which whatever worker may take."""
        with self.client(key) as client:
            return client.post(CHAT, json=BODY).status_code

    def admin(self, method: str, path: str, json: Any = None) -> httpx.Response:
        url = f"{self.url}/admin{path}"
        return httpx.request(method, url, json=json, headers=ADMIN, timeout=60).raise_for_status()

    def new_key(self, name: str, **rights: int) -> str:
        return str(self.admin("POST", "/keys", {"name": name, **rights}).json()["key"])

    def held(self, client: httpx.Client, end: threading.Event) -> Future[httpx.Response]:
        """A request that the upstream has, and answers at the end."""
        whole = completion()
        self.upstream.says(Reply([end, *whole.pieces], headers=whole.headers))
        answering = self.upstream.answering
        answer = ThreadPoolExecutor(1).submit(client.post, CHAT, json=BODY)
        wait_for(lambda: self.upstream.answering > answering)
        return answer

    @contextmanager
    def apart(self) -> Iterator[tuple[httpx.Client, httpx.Client]]:
        """Two clients whose connections are with different workers: one has a request in flight
        where the other has none."""
        end = threading.Event()
        with ExitStack() as stack:
            one, other = (stack.enter_context(self.client()) for _ in range(2))
            answer = self.held(one, end)
            for _ in range(MOST_CONNECTIONS):
                if not in_flight(other):
                    break
                other = stack.enter_context(self.client())
            assert not in_flight(other), "one worker takes all connections"
            end.set()
            answer.result().raise_for_status()
            yield one, other

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def in_flight(client: httpx.Client) -> int:
    """Chat requests that the worker of a connection is answering."""
    return int(metric(client, "polymath_requests_in_flight"))


def metric(client: httpx.Client, name: str) -> float:
    """The sum over all labels."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", name + "{"))
    )


def models(client: httpx.Client) -> set[str]:
    listed = client.get("/v1/models").raise_for_status().json()["data"]
    return {model["id"] for model in listed}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> bytes:
    """Empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def write(folder: Path, upstream: StandInServer, store: str) -> Path:
    """A config without a model to load."""
    text = CONFIG.replace("ADMIN_KEY", ADMIN_KEY).replace("URL", upstream.url)
    config = folder / "polymath.yaml"
    config.write_text(text.replace("STORE", store))
    return config


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, upstream: StandInServer, redis_server: RedisServer
) -> Iterator[Served]:
    config = write(tmp_path_factory.mktemp("workers"), upstream, redis_server.url)
    served = Served(config, upstream)
    served.start()
    yield served
    served.process.kill()
    served.process.wait()


def test_there_are_as_many_processes_as_workers(served: Served) -> None:
    assert len(served.workers()) == WORKERS
    assert httpx.get(f"{served.url}/readyz").status_code == 200


def test_a_reload_ends_no_worker_that_is_starting(served: Served) -> None:
    assert served.workers() == served.first


def test_what_the_command_line_gave_is_no_change_of_the_file(served: Served) -> None:
    served.admin("POST", "/reload")
    assert "server.port has changed" not in served.said()


def test_all_workers_answer(served: Served) -> None:
    with served.apart() as clients:
        for client in clients:
            client.post(CHAT, json=BODY).raise_for_status()


def test_the_limits_of_a_key_are_those_of_all_workers_together(served: Served) -> None:
    key = {"authorization": f"Bearer {served.new_key('app', rpm=3)}"}
    with served.apart() as clients:
        order = clients * 3
        found = [client.post(CHAT, json=BODY, headers=key).status_code for client in order]
    assert found == [200] * 3 + [429] * 3


def test_a_key_that_is_revoked_opens_no_worker_any_more(served: Served) -> None:
    key = {"authorization": f"Bearer {served.new_key('gone')}"}
    with served.apart() as clients:
        for client in clients:
            client.post(CHAT, json=BODY, headers=key).raise_for_status()
        served.admin("DELETE", "/keys/gone")
        found = [client.post(CHAT, json=BODY, headers=key).status_code for client in clients]
    assert found == [401] * WORKERS


@pytest.mark.parametrize("by", ["admin", "signal"])
def test_a_reload_reaches_all_workers(served: Served, by: str) -> None:
    change(served.config, "  math:", f"  by-{by}: *law\n  math:")
    with served.apart() as clients:
        if by == "admin":
            served.admin("POST", "/reload")
        else:
            served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: all(f"by-{by}" in models(client) for client in clients))


def test_the_counts_of_all_workers_are_added_up(served: Served) -> None:
    def counted() -> list[float]:
        wait_for(lambda: not any(in_flight(client) for client in clients))
        return [metric(client, "polymath_requests_total") for client in clients]

    with served.apart() as clients:
        before = counted()
        for client in clients:
            client.post(CHAT, json=BODY).raise_for_status()
        assert counted() == [before[0] + WORKERS] * WORKERS


# --- workers that are lost -----------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced_though_the_file_is_bad_by_now(served: Served) -> None:
    ready = served.ready()
    killed, *rest = served.workers()
    good = change(served.config, "fallback: law", "fallback: lawyer")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: killed not in children(served.process.pid))
    assert [served.chat() for _ in range(6)] == [200] * 6
    wait_for(lambda: served.ready() > ready)
    assert set(rest) < set(served.workers())
    assert "no expert 'lawyer'" in served.said()
    with served.apart() as clients:
        assert all("law" in models(client) for client in clients)
    served.config.write_text(good)


def test_a_worker_that_has_only_begun_is_replaced_too(served: Served) -> None:
    ready = served.ready()
    os.kill(served.workers()[-1], signal.SIGKILL)
    wait_for(lambda: served.ready() > ready)
    assert served.chat() == 200
    assert len(served.workers()) == WORKERS


def test_sigterm_ends_them_all_once_they_have_answered(served: Served) -> None:
    processes = children(served.process.pid)
    end = threading.Event()
    with served.apart() as clients:
        answers = [served.held(client, end) for client in clients]
        down = served.said().count("Shutting down")
        served.process.terminate()
        wait_for(lambda: served.said().count("Shutting down") == down + WORKERS)
        end.set()
        assert [answer.result().status_code for answer in answers] == [200] * WORKERS
    assert served.process.wait(60) == 0
    wait_for(lambda: not any(command_of(pid) for pid in processes))
    assert "Traceback" not in served.said()


def test_no_worker_outlives_the_server(
    tmp_path: Path, upstream: StandInServer, redis_server: RedisServer
) -> None:
    served = Served(write(tmp_path, upstream, redis_server.url), upstream)
    served.process.kill()
    served.process.wait()
    wait_for(lambda: not any(command_of(pid) for pid in served.first))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/healthz")


def test_a_lost_worker_takes_from_the_file_what_a_reload_would(
    tmp_path: Path, upstream: StandInServer
) -> None:
    config = write(tmp_path, upstream, "redis://first")
    started = load_config(config, {}, {("server", "port"): 8099}).settings
    change(config, "redis://first", "redis://second")
    change(config, ADMIN_KEY, "another-key")
    settings = as_started(load_config(config, {}), started).settings
    assert (settings.store, settings.server.port) == ("redis://first", 8099)
    assert settings.server.admin_key is not None
    assert settings.server.admin_key.get_secret_value() == "another-key"


# --- what cannot be served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("memory", ":1: server.workers: several processes need a store that they share"),
        ("redis://127.0.0.1:port", "store: Port could not be cast to integer value as 'port'"),
    ],
    ids=["seen by the parent", "seen by a worker"],
)
def test_a_store_that_cannot_be_used_ends_the_server_and_is_named(
    tmp_path: Path, upstream: StandInServer, store: str, said: str
) -> None:
    command = [*COMMAND, "0", "--config", str(write(tmp_path, upstream, store))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def interrupted(prepared: Prepared, listener: socket.socket) -> None:
    """As uvicorn, when Ctrl-C has ended it."""
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_worker_without_a_traceback(
    tmp_path: Path, upstream: StandInServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "set_up_logging", lambda level, form: None)
    config: ConfigFile = load_config(write(tmp_path, upstream, "redis://nowhere"), {})
    with socket.socket() as listener:
        workers._work(config, listener, interrupted)
