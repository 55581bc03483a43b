"""A new config in place of the old one, while requests are answered.

A reload is asked for by a signal, by the admin API or by a change of the file. What cannot be used
changes nothing. Requests in flight end on the generation that they began with.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from polymath.errors import PolymathError, StoreUnavailable
from polymath.gateway.config import ConfigFile, load_config
from polymath.gateway.gateway import Gateway
from polymath.gateway.live import Live, open_live
from polymath.gateway.prepare import Prepared, prepare
from polymath.gateway.settings import Settings

__all__ = ["Reloader", "as_started"]

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
FIXED: Mapping[str, tuple[str, ...]] = {
    "server": (
        "host",
        "port",
        "workers",
        "max_body_bytes",
        "allow_runtime_lora_updating",
        "shutdown_grace",
        "cors_origins",
        "log_level",
        "log_format",
    ),
    "limits": ("max_depth", "max_header_bytes", "receive_timeout"),
}
"""Keys that are read at the start alone, by section; beside them `FIXED_WHOLE`."""
FIXED_WHOLE = ("store", "state_dir", "auth", "store_failure", "tracing")

FileState = tuple[int, int, int] | None


class Reloader:
    """Reloads one gateway, one reload at a time."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._path = gateway.prepared.config.path
        self._given = gateway.prepared.config.changes
        self._lock = asyncio.Lock()
        self._seen_file = self._file_state()
        self._seen_revision: bytes | None = None

    async def reload(self, actor: str) -> None:
        """Take the config file and the changes of the admin API as they are now, here and in every
        replica.

        Raises:
            PolymathError: they cannot be used; nothing has changed.
        """
        async with self._lock:
            await self._exchange(await self._gateway.overlay.changes())
            await self._tell(actor, "reload", str(self._path))

    async def change(self, actor: str, action: str, key: tuple[str, ...], value: Any) -> None:
        """Put a value in place of the file's, here and in every replica.

        Args:
            value: None takes the key out.
        Raises:
            PolymathError: with it the config cannot be used; nothing has changed.
        """
        async with self._lock:
            overlay = self._gateway.overlay
            live = await self._opened({**await overlay.changes(), key: value})
            await self._swap(live, overlay.write(key, value))
            await self._tell(actor, action, ".".join(key))

    async def restore(self, actor: str, action: str, key: tuple[str, ...]) -> bool:
        """Have the file's value again, here and in every replica; whether there was a change.

        Raises:
            PolymathError: with it the config cannot be used; nothing has changed.
        """
        async with self._lock:
            overlay = self._gateway.overlay
            changes = await overlay.changes()
            if key not in changes:
                return False
            del changes[key]
            live = await self._opened(changes)
            await self._swap(live, overlay.erase(key))
            await self._tell(actor, action, ".".join(key))
            return True

    async def start(self) -> None:
        """Take over the changes that were made before the start, as far as they can be used."""
        try:
            self._seen_revision = await self._gateway.overlay.revision()
            changes = await self._gateway.overlay.changes()
            if changes:
                await self._exchange(changes)
        except PolymathError as error:
            logger.error("changes of the admin API are left out: %s", error.message)
        except Exception:  # the config file alone can be used, as it was until now
            logger.exception("changes of the admin API are left out")

    async def watch(self) -> None:
        """Reload when the file changes or another replica has reloaded."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._look()
            except StoreUnavailable as error:  # which the store has logged, once
                logger.debug("no news of other replicas: %s", error.message)
            except PolymathError as error:
                logger.error("the config is as it was: %s", error.message)
            except Exception:  # the watch goes on; the next change is tried again
                logger.exception("the config is as it was")

    async def _look(self) -> None:
        state = self._file_state()
        if state != self._seen_file and self._gateway.settings.server.watch_config:
            self._seen_file = state
            if state is not None:
                await self.reload("file")
            return
        revision = await self._gateway.overlay.revision()
        if revision != self._seen_revision:
            async with self._lock:
                if revision != self._seen_revision:
                    self._seen_revision = revision
                    await self._exchange(await self._gateway.overlay.changes())

    async def _exchange(self, changes: Mapping[tuple[str, ...], Any]) -> None:
        await self._swap(await self._opened(changes))

    async def _swap(self, live: Live, writing: Awaitable[Any] | None = None) -> None:
        """Put a generation in place, once what is to be written is written."""
        try:
            if writing is not None:
                await writing
            await self._gateway.swap(live)
        except BaseException:
            await self._gateway.discard(live)
            raise

    async def _opened(self, changes: Mapping[tuple[str, ...], Any]) -> Live:
        self._seen_file = self._file_state()
        prepared = await asyncio.to_thread(self._prepared, changes)
        gateway = self._gateway
        live = await asyncio.to_thread(open_live, prepared, gateway.store, gateway.live)
        try:
            await live.service.check_upstreams()
        except BaseException:
            await gateway.discard(live)
            raise
        return live

    def _prepared(self, changes: Mapping[tuple[str, ...], Any]) -> Prepared:
        config = load_config(self._path, os.environ, {**self._given, **changes})
        for name in _fixed_changes(self._gateway.settings, config.settings):
            logger.warning("%s has changed: that takes a restart", name)
        added = {
            name: expert
            for name, expert in self._gateway.added.items()
            if name not in config.settings.experts
        }
        return prepare(config.with_experts(added))

    async def _tell(self, actor: str, action: str, target: str) -> None:
        self._seen_revision = await self._gateway.overlay.ask_for_reload()
        await self._gateway.audit.write(actor, action, target)

    def _file_state(self) -> FileState:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ino, found.st_size)


def as_started(config: ConfigFile, started: Settings) -> ConfigFile:
    """With the values of the start where keys are read at the start alone."""
    values: dict[str, Any] = {name: getattr(started, name) for name in FIXED_WHOLE}
    for section, names in FIXED.items():
        fixed = {name: getattr(getattr(started, section), name) for name in names}
        values[section] = getattr(config.settings, section).model_copy(update=fixed)
    return replace(config, settings=config.settings.model_copy(update=values))


def _fixed_changes(old: Settings, new: Settings) -> Iterator[str]:
    """Keys with other values that are not read again."""
    for section, names in FIXED.items():
        for name in names:
            if getattr(getattr(old, section), name) != getattr(getattr(new, section), name):
                yield f"{section}.{name}"
    for name in FIXED_WHOLE:
        if getattr(old, name) != getattr(new, name):
            yield name
    if (old.server.admin_key is None) != (new.server.admin_key is None):
        yield "server.admin_key"
