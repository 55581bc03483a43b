"""`polymath serve` as a process of its own: it listens, answers, drains and ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT

COMMAND = [str(Path(sys.executable).parent / "polymath"), "serve", "--port"]
ADDRESS = re.compile(r"listening on (http://127\.0\.0\.1:\d+)/v1")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([*COMMAND, "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(match[1] for line in process.stderr if (match := ADDRESS.search(line)))
    yield process, url
    process.kill()
    process.wait()


def test_probes_answer_while_the_models_load(server: tuple[subprocess.Popen[str], str]) -> None:
    _, url = server
    assert _get(f"{url}/healthz").status_code == 200
    deadline = time.monotonic() + 120
    while _get(f"{url}/readyz").status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _get(f"{url}/readyz").status_code == 200


def test_sigterm_lets_a_running_answer_finish(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me about the moon."}],
        "max_tokens": 24,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(timeout=30) == -signal.SIGTERM  # uvicorn raises it again when it is done


def test_a_port_that_is_taken_is_named_and_nothing_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [*COMMAND, str(port)], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert result.returncode == 2
    assert f"server.port: cannot listen on 127.0.0.1:{port} (Address already in use)" in (
        result.stderr
    )


def _get(url: str) -> httpx.Response:
    deadline = time.monotonic() + 30
    while True:
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
