"""Another gateway over the session's engine, with a config and a store of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from polymath.gateway.app import Gateway, create_app
from polymath.gateway.keys import KeyRing, now_utc
from polymath.gateway.live import open_live
from polymath.router import Router

__all__ = ["Beside", "beside"]


class Beside:
    """The other gateway, asked without a socket."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._transport = httpx.ASGITransport(create_app(gateway))

    def client(self, key: str = "unused") -> AsyncOpenAI:
        """The official client with a key."""
        return AsyncOpenAI(
            base_url="http://beside/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx.AsyncClient(transport=self._transport),  # type: ignore[arg-type]
        )

    async def key(self, **rights: Any) -> str:
        """A new key."""
        key, _ = await KeyRing(self.gateway.store).create("test", **rights)
        return key

    async def used(self, name: str) -> int:
        """What was used of `name` today, by all keys and of all experts."""
        await self.gateway.access.settled()
        counts = await self.gateway.store.usage(f"{now_utc():%Y-%m-%d}")
        return sum(count for entry, count in counts.items() if entry.endswith(f"|{name}"))


@asynccontextmanager
async def beside(
    gateway: Gateway, folder: Path, router: Router | None = None, **changed: Any
) -> AsyncIterator[Beside]:
    """Another gateway with these settings in place of the session's."""
    prepared = gateway.prepared
    settings = prepared.settings.model_copy(update={"state_dir": folder, **changed})
    config = replace(prepared.config, settings=settings)
    prepared = replace(prepared, config=config, router=router or prepared.router)
    other = Gateway(prepared)
    await other.swap(open_live(prepared, other.store, gateway.live))
    yield Beside(other)
    await other.access.close()
    await other.store.close()
