"""Both kinds of store, each as several processes see it, for tests that hold for either."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from polymath.gateway.store import (
    Admission,
    Limits,
    MemoryStore,
    RedisStore,
    Settlement,
    Store,
)
from polymath.gateway.store.protocol import KEYS, LEASE_SECONDS, WINDOW_SECONDS

__all__ = [
    "KINDS",
    "RECORD",
    "Clock",
    "MemoryStores",
    "RedisStores",
    "Stores",
    "admission",
    "knowing_app",
    "opened",
    "settlement",
]

KINDS = ("memory", "redis")
RECORD = b'{"id":"app"}'


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MemoryStores:
    """Each has limits of its own; durable maps and logs stand in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()

    def open(self, window: float = WINDOW_SECONDS, lease: float = LEASE_SECONDS) -> Store:
        return MemoryStore(self.folder, window, lease, self.clock)

    async def wait(self, seconds: float) -> None:
        self.clock.now += seconds


class RedisStores:
    """Replicas that share everything, under names that no other test uses."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = uuid.uuid4().hex
        self._opened: list[Store] = []

    def open(self, window: float = WINDOW_SECONDS, lease: float = LEASE_SECONDS) -> Store:
        self._opened.append(RedisStore(self.url, window, lease, self.prefix))
        return self._opened[-1]

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


Stores = MemoryStores | RedisStores


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStores]:
    """Stores of a Redis server, closed at the end."""
    stores = RedisStores(url)
    yield stores
    await stores.close()


async def knowing_app(store: Store, record: bytes = RECORD) -> Store:
    """The store, which knows the key `app`."""
    await store.write(KEYS, "app", record)
    return store


def admission(
    tokens: int = 0,
    lease: str | None = None,
    /,
    *,
    requests: int | None = None,
    most_tokens: int | None = None,
    concurrent: int | None = None,
    budget: int | None = None,
) -> Admission:
    """A request of the key `app`; the rest are its limits, its budget in the period `2026-11`."""
    limits = Limits(requests, most_tokens, concurrent, budget, "2026-11")
    return Admission("app", RECORD, limits, tokens, lease or uuid.uuid4().hex)


def settlement(
    lease: str = "", tokens: int = 0, cost: int = 0, counts: Mapping[str, int] | None = None
) -> Settlement:
    """What a request of the key `app` used on a day of that month."""
    return Settlement("app", lease, tokens, cost, "2026-11", "2026-11-28", counts or {})
