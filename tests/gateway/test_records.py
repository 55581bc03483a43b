"""Decisions of late: kept in batches that a busy gateway cannot make large."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymath.errors import StoreUnavailable
from polymath.gateway.records import BATCH, MOST_BATCHES, DecisionLog
from polymath.gateway.report import Report
from polymath.gateway.store import MemoryStore
from polymath.router import RouteDecision


class FailingStore(MemoryStore):
    """A store that takes `room` more batches."""

    room = 0

    async def append(self, log: str, entry: bytes, most: int) -> None:
        if not self.room:
            raise StoreUnavailable("gone")
        self.room -= 1
        await super().append(log, entry, most)


def report(number: int) -> Report:
    decision = RouteDecision({"law": 1.0}, confidence=0.9, domain="law", source="encoder")
    return Report(
        id=f"chatcmpl-{number}",
        request_id=f"req-{number}",
        key="anybody",
        model="polymath",
        expert="law",
        kind="upstream",
        decision=decision,
        cache=None,
        outcome="ok",
        stream=False,
        started=0.0,
        routed=0.1,
        first_token=None,
        ended=0.2,
        prompt_tokens=1,
        completion_tokens=2,
        cost=0,
        prompt=[],
    )


def ids(entries: list[dict[str, object]]) -> list[object]:
    return [entry["id"] for entry in entries]


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1, 3 * BATCH + 2])
async def test_the_newest_come_first_however_many_there_are(tmp_path: Path, count: int) -> None:
    log = DecisionLog(MemoryStore(tmp_path), lambda: False)
    for number in range(count):
        log.observe(report(number))
    expected = [f"chatcmpl-{number}" for number in reversed(range(count))]
    assert ids(await log.recent(1000)) == expected
    assert ids(await log.recent(2)) == expected[:2]
    for number in range(count):
        found = await log.find(f"chatcmpl-{number}", "anybody")
        assert found is not None
        assert found["request_id"] == f"req-{number}"
    assert await log.find("chatcmpl-0", "somebody else") is None
    assert await log.find("chatcmpl-none", "anybody") is None


async def test_no_batch_is_large_and_there_are_not_too_many(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    log = DecisionLog(store, lambda: False)
    for number in range(BATCH * MOST_BATCHES + BATCH):
        log.observe(report(number))
        if number % 5000 == 0:
            await log.flush()
    await log.flush()
    batches = await store.recent("decisions", 2 * MOST_BATCHES)
    assert len(batches) == MOST_BATCHES
    assert sum(map(len, batches)) < 20e6
    assert await log.find("chatcmpl-1", "anybody") is None  # the oldest went first


async def test_what_cannot_be_sent_waits_in_its_order(tmp_path: Path) -> None:
    store = FailingStore(tmp_path)
    log = DecisionLog(store, lambda: False)
    for number in range(3 * BATCH):
        log.observe(report(number))
    store.room = 1
    await log.flush()
    log.observe(report(3 * BATCH))
    store.room = 10
    expected = [f"chatcmpl-{number}" for number in reversed(range(3 * BATCH + 1))]
    assert ids(await log.recent(1000)) == expected
