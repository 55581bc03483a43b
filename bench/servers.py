"""Servers as their own processes, and a client that times their streams."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.demo import POLYMATH

__all__ = ["Stream", "llama_server", "polymath_server", "read_stream"]

START_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Stream:
    """When the pieces of one streamed answer came, in seconds from its request.

    Attributes:
        seconds: until the end of the stream.
    """

    arrivals: tuple[float, ...]
    seconds: float
    text: str

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0]


@contextmanager
def polymath_server(config: Path) -> Iterator[str]:
    """`polymath serve` on a free port; its URL."""
    port = _free_port()
    command = [POLYMATH, "serve", "-c", str(config)]
    with _running([*command, "--port", str(port)]):
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/readyz")
        yield url


@contextmanager
def llama_server(
    python: Path,
    model: Path,
    adapter: Path | None,
    threads: int,
    every_logit: bool = False,
    one_by_one: bool = False,
) -> Iterator[str]:
    """llama-cpp-python's OpenAI server; its URL.

    Args:
        every_logit: keep those of the prompt too, for `echo` with `logprobs`.
        one_by_one: read a prompt token by token, as it generates. Its kernels for a batch and for
            one token differ by up to 0.2 nats, so that else an answer depends on what is cached.
    """
    port = _free_port()
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--port", str(port), "--n_ctx", "2048", "--n_threads", str(threads)]
    command += ["--n_threads_batch", str(threads)]
    command += ["--lora_path", str(adapter)] if adapter else []
    command += ["--logits_all", "true"] if every_logit else []
    command += ["--n_batch", "1"] if one_by_one else []
    with _running(command):
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/v1/models")
        yield url


def read_stream(url: str, body: dict[str, Any]) -> Stream:
    """Ask for a streamed answer and note when each piece of text comes."""
    arrivals, text = [], []
    start = time.perf_counter()
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=300
    ) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and (piece := choices[0]["delta"].get("content")):
                arrivals.append(time.perf_counter() - start)
                text.append(piece)
    return Stream(tuple(arrivals), time.perf_counter() - start, "".join(text))


@contextmanager
def _running(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer within {START_SECONDS} s")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
