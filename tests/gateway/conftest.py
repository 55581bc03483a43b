"""The official client of the session's server, a Redis server, and both kinds of store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.gateway.stores import KINDS, MemoryStores, RedisStores, Stores, opened
from tests.redis_server import RedisServer


@pytest.fixture(scope="session")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The one of the session, which no test harms."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def frail_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis server of the test's own, to be harmed."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=KINDS)
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    """Makes stores that keep the same things: in turn in memory and in Redis."""
    if request.param == "memory":
        yield MemoryStores(tmp_path)
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    async with opened(server.url) as made:
        yield made


@pytest.fixture
async def replicas(redis_server: RedisServer) -> AsyncIterator[RedisStores]:
    """Makes stores of the session's Redis server."""
    async with opened(redis_server.url) as made:
        yield made
