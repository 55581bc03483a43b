"""A gateway in front of a stand-in, served over real HTTP: its config, its keys, its clients."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from polymath.gateway import load_config, prepare
from polymath.gateway.app import Gateway
from polymath.gateway.keys import KeyRing
from polymath.gateway.store import MemoryStore
from tests.conftest import serving
from tests.gateway.asking import HELLO, user
from tests.proxy.stand_in import StandInServer

__all__ = [
    "ADMIN_KEY",
    "CODING",
    "LAW",
    "MATH",
    "Running",
    "change",
    "running",
    "wait_for",
    "write_config",
]

ADMIN_KEY = "the-admin-key"
LAW, CODING, MATH = ([user(text)] for text in ("What is the law?", "sort a list", "2 + 2 = ?"))
"""Conversations of which the text router is sure."""

CONFIG = """\
server: {admin_key: ADMIN_KEY, watch_config: false, SERVER}
experts:
  law: &law
    kind: upstream
    api_base: URL
    api_key: sk-upstream
    model: m
    num_retries: 0
    timeout: 20
    price: {input: 1000, output: 3000}
  coding: {<<: *law, model: m-coding}
  math: {<<: *law, model: m-math}
  EXPERTS
router: {path: ROUTER, fallback: law, min_confidence: 0}
"""
WAIT_SECONDS = 60


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def change(config: Path, old: str, new: str) -> str:
    """Exchange a text in the file, as an editor does; the text before."""
    before = config.read_text()
    assert old in before
    fresh = config.with_suffix(".new")
    fresh.write_text(before.replace(old, new, 1))
    fresh.replace(config)
    return before


def write_config(
    folder: Path,
    router: Path,
    server: StandInServer,
    more: str = "",
    *,
    experts: str = "",
    server_keys: str = "",
) -> Path:
    """Three experts behind the stand-in; `more` are other sections."""
    values = {
        "ROUTER": str(router),
        "URL": server.url,
        "ADMIN_KEY": ADMIN_KEY,
        "EXPERTS": experts,
        "SERVER": server_keys,
    }
    text = re.sub("|".join(values), lambda match: values[match[0]], CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "polymath.yaml").write_text(text + more)
    return folder / "polymath.yaml"


class Running:
    """A gateway that serves.

    Attributes:
        config: the file, which may be changed.
        gateway: in the same process, to look into.
    """

    def __init__(self, url: str, gateway: Gateway, server: StandInServer) -> None:
        self.url = url
        self.gateway = gateway
        self.server = server
        self.config = gateway.prepared.config.path

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(
        self, body: Mapping[str, Any] | None = None, key: str | None = None, **headers: str
    ) -> httpx.Response:
        """A chat request; by default greedy and of the routed model."""
        asked = {"model": "polymath", "messages": HELLO, "temperature": 0, **(body or {})}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=asked, headers=headers, timeout=60)

    def admin(self, method: str, path: str, json: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        url = f"{self.url}/admin{path}"
        return httpx.request(method, url, json=json, headers=headers, timeout=60)

    def reload(self) -> httpx.Response:
        return self.admin("POST", "/reload")

    def create_key(self, name: str = "app", **rights: object) -> str:
        """As `polymath keys create` does while the server runs."""
        store = MemoryStore(self.gateway.settings.state_dir)
        key, _ = asyncio.run(KeyRing(store).create(name, **rights))
        return key

    def usage(self) -> dict[tuple[str | None, str], dict[str, Any]]:
        """Of today, by the key's name and the expert, when all is settled."""
        wait_for(lambda: not self.gateway.door.inside and not self.gateway.access._settling)
        rows = self.admin("GET", "/usage").raise_for_status().json()["data"]
        return {(row["name"], row["expert"]): row for row in rows}

    def decisions(self) -> list[dict[str, Any]]:
        wait_for(lambda: not self.gateway.door.inside)
        return list(self.admin("GET", "/decisions").raise_for_status().json()["data"])


@contextmanager
def running(
    config: Path, server: StandInServer, before: Callable[[Gateway], None] = lambda _: None
) -> Iterator[Running]:
    """Serve a config.

    Args:
        before: is done to the gateway before it serves.
    """
    gateway = Gateway(prepare(load_config(config, {})))
    before(gateway)
    with serving(gateway) as url:
        server.forget()
        yield Running(url, gateway, server)
