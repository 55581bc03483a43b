"""One generation of the config: everything that a reload replaces, and those who still use it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.experts import Engine, ExpertSettings, adapter_sha256, build_catalog
from polymath.gateway.answer_cache import AnswerCache
from polymath.gateway.prepare import Prepared
from polymath.gateway.service import ChatService, open_engine
from polymath.gateway.store import Store
from polymath.router import Embedder, HasEmbedder

if TYPE_CHECKING:
    from polymath.experts import Expert

__all__ = ["Live", "open_live"]

logger = logging.getLogger(__name__)

KNOWN_FILES = 1000
"""Whose digests are remembered."""

Signature = tuple[tuple[str, int, int], ...]


class Live:
    """Experts, router, service and cache of one config.

    Attributes:
        catalog: experts by name; what is added to it can be asked at once.
        engine: runs the local models, and may outlive this generation.
        adapters: (base model, expert) -> the state of the adapter's files.
    """

    def __init__(
        self,
        prepared: Prepared,
        catalog: dict[str, Expert],
        service: ChatService,
        cache: AnswerCache,
        adapters: Mapping[tuple[str, str], Signature],
    ) -> None:
        self.prepared = prepared
        self.settings = prepared.settings
        self.router = prepared.router
        self.catalog = catalog
        self.service = service
        self.cache = cache
        self.adapters = adapters
        self._visits = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def engine(self) -> Engine | None:
        """Runs the local models, if there are any."""
        return self.service.engine

    @property
    def embedder(self) -> Embedder | None:
        """The router's sentence encoder, if it has one."""
        return self.router.embedder if isinstance(self.router, HasEmbedder) else None

    def enter(self) -> None:
        """A request begins to use this generation."""
        self._visits += 1
        self._empty.clear()

    def leave(self) -> None:
        """A request is over."""
        self._visits -= 1
        if not self._visits:
            self._empty.set()

    async def drained(self) -> None:
        """Wait until no request uses this generation."""
        await self._empty.wait()

    def take_over(self, previous: Live | None) -> None:
        """Exchange the adapters of an engine that the previous generation uses, too; those that are
        gone stay until nobody uses them.

        Raises:
            AdapterError: one cannot be used; nothing has changed.
        """
        if previous is not None and self.engine is not None and self.engine is previous.engine:
            _exchange(self.engine, previous.adapters, self.adapters, self.settings.experts)

    async def let_go(self, others: Collection[Live]) -> None:
        """Close what none of the other generations uses; no request may use this one any more."""
        kept = [upstream for other in others for upstream in other.service.upstreams.values()]
        for upstream in self.service.upstreams.values():
            if not any(upstream is one for one in kept):
                await upstream.close()
        if self.engine is None:
            return
        sharing = [other for other in others if other.engine is self.engine]
        if not sharing:
            await asyncio.to_thread(self.engine.close)
            return
        for base_model, name in self.adapters:
            bank = self.engine.models[base_model].adapters
            used = any((base_model, name) in other.adapters for other in sharing)
            if not used and name in bank.names:
                bank.remove(name)


def open_live(prepared: Prepared, store: Store, previous: Live | None = None) -> Live:
    """Make a config ready to answer; takes seconds if base models are to be loaded.

    Args:
        previous: its engine and connections are used again where nothing about them has changed;
            it is left as it is until `take_over`.
    """
    settings = prepared.settings
    catalog = build_catalog(settings.base_models, settings.experts)
    adapters = dict(_adapters(settings.experts))
    if previous is not None and previous.engine is not None and _alike(prepared, previous.prepared):
        engine: Engine | None = previous.engine
    else:
        engine = open_engine(prepared)
    known = None if previous is None else previous.service.upstreams
    service = ChatService(
        catalog, prepared.router, engine, settings.engine, settings.router.fallback, known
    )
    embedder = prepared.router.embedder if isinstance(prepared.router, HasEmbedder) else None
    fingerprint = _fingerprint(prepared)
    embed = None if embedder is None else embedder.embed
    cache = AnswerCache(store, settings.cache, fingerprint, embed)
    return Live(prepared, catalog, service, cache, adapters)


def _alike(prepared: Prepared, previous: Prepared) -> bool:
    """Whether the same base models run in the same way."""
    new, old = prepared.settings, previous.settings
    return (
        prepared.folders == previous.folders
        and new.engine == old.engine
        and new.base_models == old.base_models
    )


def _exchange(
    engine: Engine,
    old: Mapping[tuple[str, str], Signature],
    new: Mapping[tuple[str, str], Signature],
    experts: Mapping[str, ExpertSettings],
) -> None:
    """Add what is new or changed."""
    changed = [place for place, signature in new.items() if old.get(place) != signature]
    folders = {place: experts[place[1]].adapter for place in changed}
    for (base_model, _), folder in folders.items():
        assert folder is not None
        engine.models[base_model].adapters.check(folder)
    for (base_model, name), folder in folders.items():
        assert folder is not None
        engine.models[base_model].adapters.add(name, folder)


def _adapters(
    experts: Mapping[str, ExpertSettings],
) -> Iterator[tuple[tuple[str, str], Signature]]:
    for name, expert in experts.items():
        if expert.adapter is not None and expert.base_model is not None:
            yield (expert.base_model, name), (*_signature(expert.adapter),)


def _signature(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Of the files of a folder: whether one of them was exchanged."""
    yield str(folder), 0, 0
    for file in sorted(folder.iterdir()):
        found = file.stat()
        yield file.name, found.st_mtime_ns, found.st_size


def _fingerprint(prepared: Prepared) -> str:
    """Of everything that answers depend on; two replicas with the same files have the same."""
    settings = prepared.settings
    values = settings.model_dump_json(include={"base_models", "experts", "router", "engine"})
    weights = [
        (name, adapter_sha256(expert.adapter))
        for name, expert in settings.experts.items()
        if expert.adapter is not None
    ]
    folders = [settings.router.path, settings.router.clusters]
    folders += [expert.combiner for expert in settings.experts.values()]
    artifacts = [_folder_sha256(folder) for folder in folders if folder is not None]
    return hashlib.sha256(f"{values}{weights}{artifacts}".encode()).hexdigest()


def _folder_sha256(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    contents = [(str(file.relative_to(folder)), _file_sha256(file)) for file in files]
    return hashlib.sha256(str(contents).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    found = file.stat()
    return _sha256(file, found.st_mtime_ns, found.st_size)


@lru_cache(KNOWN_FILES)
def _sha256(file: Path, changed: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
