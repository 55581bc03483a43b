"""Changes to the config that were made at run time, kept in the store for all replicas."""

from __future__ import annotations

import uuid
from typing import Any

import orjson

from polymath.gateway.store import Store

__all__ = ["Overlay"]

OVERLAY, RELOADS = "overlay", "reloads"
REVISION = "revision"


class Overlay:
    """Key paths of the config file and the values in their place."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def changes(self) -> dict[tuple[str, ...], Any]:
        """All of them."""
        values = await self._store.read(OVERLAY)
        return {tuple(orjson.loads(key)): orjson.loads(value) for key, value in values.items()}

    async def write(self, key: tuple[str, ...], value: Any) -> None:
        """Put a value in place of the file's; None takes it out."""
        await self._store.write(OVERLAY, _field(key), orjson.dumps(value))

    async def erase(self, key: tuple[str, ...]) -> bool:
        """Have the file's value again; whether there was a change."""
        return await self._store.erase(OVERLAY, _field(key))

    async def revision(self) -> bytes | None:
        """A name of the last reload that was asked for, anywhere."""
        return await self._store.find(RELOADS, REVISION)

    async def ask_for_reload(self) -> bytes:
        """Have every replica reload; the new revision."""
        revision = orjson.dumps(uuid.uuid4().hex)
        await self._store.write(RELOADS, REVISION, revision)
        return revision


def _field(key: tuple[str, ...]) -> str:
    return orjson.dumps(key).decode()
