"""Gateways and what stands behind them, each its own process, for measurements of the gateway."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.canned_upstream import MODEL
from bench.demo import CONFIG, POLYMATH, demo_text

__all__ = [
    "Running",
    "canned_upstream",
    "demo_gateway",
    "litellm_proxy",
    "polymath_gateway",
    "redis",
]

START_SECONDS = 120
END_SECONDS = 30
DEMO_ROUTER = CONFIG.parent / "demo" / "router"
MASTER_KEY = "sk-of-this-benchmark-alone"
RPM, TPM = 100_000_000, 1_000_000_000
"""Limits that are checked and never reached."""
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers on `url`, up to `/v1`.

    Attributes:
        key: of its clients.
    """

    name: str
    url: str
    key: str
    pid: int

    def megabytes(self) -> float:
        """Resident memory of the process and those that it started."""
        return sum(_resident(pid) for pid in _family(self.pid)) / MEGABYTE


@contextmanager
def canned_upstream(seconds: float = 0.0) -> Iterator[Running]:
    """The upstream alone."""
    port = _free_port()
    command = [sys.executable, "-m", "bench.canned_upstream", "--port", str(port)]
    with _process([*command, "--seconds", str(seconds)]) as pid:
        url = f"http://127.0.0.1:{port}/v1"
        _wait(f"{url}/models")
        yield Running("upstream alone", url, "none", pid)


@contextmanager
def litellm_proxy(python: Path, upstream: Running, folder: Path) -> Iterator[Running]:
    """LiteLLM's proxy with one worker and a master key, without a database."""
    port = _free_port()
    target = {"model": f"openai/{MODEL}", "api_base": upstream.url, "api_key": upstream.key}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": target}],
        "general_settings": {"master_key": MASTER_KEY},
    }
    file = folder / "litellm.json"  # JSON is YAML
    file.write_text(json.dumps(config))
    command = [str(python.with_name("litellm")), "--config", str(file), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with _process(command, {**quiet, "LITELLM_MODE": "PRODUCTION"}) as pid:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health/readiness")
        yield Running("LiteLLM", f"{url}/v1", MASTER_KEY, pid)


@contextmanager
def polymath_gateway(
    name: str, folder: Path, expert: Mapping[str, Any], **sections: Any
) -> Iterator[Running]:
    """`polymath serve` with one expert of kind `upstream`, a key with limits, and metrics.

    Args:
        expert: its settings beyond the kind.
        sections: of the config.
    """
    folder.mkdir(exist_ok=True)
    config = folder / "polymath.yaml"
    config.write_text(
        json.dumps(
            {
                "experts": {MODEL: {"kind": "upstream", "model": MODEL, **expert}},
                "router": {"kind": "encoder", "path": str(DEMO_ROUTER), "fallback": MODEL},
                "state_dir": str(folder / "state"),
                **sections,
            }
        )
    )
    with _serving(name, config) as running:
        yield running


@contextmanager
def demo_gateway(name: str, folder: Path) -> Iterator[Running]:
    """`polymath serve` with the demo's own model and the settings that it has by default."""
    folder.mkdir(exist_ok=True)
    config = folder / "polymath.yaml"
    config.write_text(f"{demo_text()}\nstate_dir: {folder / 'state'}\n")
    with _serving(name, config) as running:
        yield running


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A real redis-server that writes nothing to disk; its URL."""
    port = _free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with _process([*command, "--appendonly", "no", "--dir", str(folder)]):
        _wait_for_port(port)
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _serving(name: str, config: Path) -> Iterator[Running]:
    key = _new_key(config)
    port = _free_port()
    command = [POLYMATH, "serve", "--config", str(config), "--port", str(port)]
    with _process(command) as pid:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/readyz")
        yield Running(name, f"{url}/v1", key, pid)


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str] = {}) -> Iterator[int]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _new_key(config: Path) -> str:
    """A key with limits that are never reached."""
    command = [POLYMATH, "keys", "create", "--config", str(config), "--name", "bench"]
    command += ["--rpm", str(RPM), "--tpm", str(TPM), "--concurrent", "10000"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return next(word for word in done.stdout.split() if word.startswith("pm-"))


def _wait(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=START_SECONDS).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer within {START_SECONDS} s")


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nobody listens on port {port}")


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
