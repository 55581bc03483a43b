"""The embedded store: limits, cache and usage in the memory of one process.

Maps and the logs that must outlast it (`DURABLE`) stand in files of one folder, which commands may
change while the server runs.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from polymath.gateway.store.files import LogFile, MapFile
from polymath.gateway.store.protocol import (
    KEYS,
    LEASE_SECONDS,
    WINDOW_SECONDS,
    Admission,
    Refused,
    Settlement,
    Verdict,
)

__all__ = ["MemoryStore"]

DURABLE = frozenset({"audit", "feedback"})
"""Logs that stand in files."""


@dataclass(slots=True)
class _Window:
    """The requests of a key.

    Attributes:
        entries: lease -> when it was admitted and its tokens, the oldest first.
        running: lease -> when it ends, the first to end first.
    """

    entries: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)
    tokens: int = 0
    running: dict[str, float] = field(default_factory=dict)

    def forget(self, before: float, now: float) -> None:
        while self.entries:
            lease, (admitted, tokens) = next(iter(self.entries.items()))
            if admitted > before:
                break
            del self.entries[lease]
            self.tokens -= tokens
        while self.running and next(iter(self.running.values())) <= now:
            del self.running[next(iter(self.running))]


class MemoryStore:
    """A `Store` for one process.

    Args:
        folder: where durable maps and logs stand; it is made when something is written.
        window: seconds that limits look back on.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        folder: Path,
        window: float = WINDOW_SECONDS,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._window = window
        self._lease = lease
        self._clock = clock
        self._maps: dict[str, MapFile] = {}
        self._logs: dict[str, LogFile] = {}
        self._fleeting: defaultdict[str, deque[bytes]] = defaultdict(deque)
        self._shelves: defaultdict[str, OrderedDict[str, tuple[float, bytes]]]
        self._shelves = defaultdict(OrderedDict)
        self._windows: defaultdict[str, _Window] = defaultdict(_Window)
        self._spent: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._usage: defaultdict[str, defaultdict[str, int]]
        self._usage = defaultdict(lambda: defaultdict(int))

    async def find(self, name: str, field: str) -> bytes | None:
        return self._map(name).values().get(field)

    async def read(self, name: str) -> dict[str, bytes]:
        return dict(self._map(name).values())

    async def write(self, name: str, field: str, value: bytes) -> None:
        self._map(name).write(field, value)

    async def erase(self, name: str, field: str) -> bool:
        return self._map(name).erase(field)

    async def get(self, shelf: str, name: str) -> bytes | None:
        ends, value = self._shelves[shelf].get(name, (0.0, b""))
        return value if self._clock() < ends else None

    async def put(self, shelf: str, name: str, value: bytes, ttl: float, most: int) -> None:
        values = self._shelves[shelf]
        values.pop(name, None)
        values[name] = (self._clock() + ttl, value)
        while len(values) > most:
            values.popitem(last=False)

    async def append(self, log: str, entry: bytes, most: int) -> None:
        if log in DURABLE:
            self._log(log).append(entry, most)
            return
        entries = self._fleeting[log]
        entries.append(entry)
        while len(entries) > most:
            entries.popleft()

    async def recent(self, log: str, most: int) -> list[bytes]:
        if log in DURABLE:
            return self._log(log).recent(most)
        return list(islice(reversed(self._fleeting[log]), most))

    async def admit(self, admission: Admission) -> Verdict:
        record = await self.find(KEYS, admission.key)
        if record != admission.record:
            return Verdict(record)
        now = self._clock()
        window = self._windows[admission.key]
        window.forget(now - self._window, now)
        spent = self._spent[admission.key, admission.limits.period]
        refused = _refusal(window, admission, spent)
        if refused is None:
            window.entries[admission.lease] = (now, admission.tokens)
            window.tokens += admission.tokens
            window.running[admission.lease] = now + self._lease
        return self._verdict(window, admission, refused, now)

    async def settle(self, settlement: Settlement) -> None:
        window = self._windows[settlement.key]
        window.running.pop(settlement.lease, None)
        if settlement.lease in window.entries:
            admitted, estimate = window.entries[settlement.lease]
            window.entries[settlement.lease] = (admitted, settlement.tokens)
            window.tokens += settlement.tokens - estimate
        self._spent[settlement.key, settlement.period] += settlement.cost
        for name, count in settlement.counts.items():
            self._usage[settlement.day][name] += count

    async def renew(self, leases: Collection[tuple[str, str]]) -> None:
        end = self._clock() + self._lease
        for key, lease in leases:
            running = self._windows[key].running
            if running.pop(lease, None) is not None:
                running[lease] = end

    async def usage(self, day: str) -> dict[str, int]:
        return dict(self._usage[day])

    async def spent(self, key: str, period: str) -> int:
        return self._spent[key, period]

    async def close(self) -> None:
        pass

    def _map(self, name: str) -> MapFile:
        if name not in self._maps:
            self._maps[name] = MapFile(self._folder / f"{name}.json")
        return self._maps[name]

    def _log(self, name: str) -> LogFile:
        if name not in self._logs:
            self._logs[name] = LogFile(self._folder / f"{name}.jsonl")
        return self._logs[name]

    def _verdict(
        self, window: _Window, admission: Admission, refused: Refused | None, now: float
    ) -> Verdict:
        limits = admission.limits
        newest = next(reversed(window.entries.values()), (now - self._window, 0))[0]
        reset = max(0.0, newest + self._window - now)
        return Verdict(
            admission.record,
            refused,
            _left(limits.requests, len(window.entries)),
            _left(limits.tokens, window.tokens),
            reset,
            reset,
            self._wait(window, admission, refused, now),
        )

    def _wait(
        self, window: _Window, admission: Admission, refused: Refused | None, now: float
    ) -> float:
        """Until enough of the oldest requests have left the window for both limits."""
        limits = admission.limits
        if refused not in ("requests", "tokens") or limits.requests == 0:
            return 0.0
        fewer, excess = 0, 0
        if limits.requests is not None:
            fewer = len(window.entries) - limits.requests + 1
        if limits.tokens is not None:
            excess = window.tokens + admission.tokens - limits.tokens
        for admitted, tokens in window.entries.values():
            fewer -= 1
            excess -= tokens
            if fewer <= 0 and excess <= 0:
                return admitted + self._window - now
        return 0.0


def _refusal(window: _Window, admission: Admission, spent: int) -> Refused | None:
    limits = admission.limits
    if limits.budget is not None and spent >= limits.budget:
        return "budget"
    if limits.requests is not None and len(window.entries) >= limits.requests:
        return "requests"
    if limits.tokens is not None and window.tokens + admission.tokens > limits.tokens:
        return "tokens"
    if limits.concurrent is not None and len(window.running) >= limits.concurrent:
        return "concurrent"
    return None


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)
