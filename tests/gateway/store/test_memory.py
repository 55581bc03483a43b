"""Windows in the memory of a process, held against a model that keeps everything and looks it up.

Times are multiples of 1/8, which floating point adds exactly.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.gateway.store import Admission, Limits, MemoryStore, Refused, Verdict
from polymath.gateway.store.protocol import KEYS
from tests.gateway.stores import RECORD, Clock, admission, knowing_app, settlement

WINDOW, LEASE = 4.0, 2.5
TICK = 0.125


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key `app` is known."""
    folder = tmp_path_factory.mktemp("known")
    asyncio.run(knowing_app(MemoryStore(folder)))
    return folder


@dataclass(slots=True)
class Admitted:
    at: float
    tokens: int
    lease: str
    ends: float
    runs: bool = True


@dataclass(slots=True)
class NaiveLimits:
    """Everything that was ever let in, of which each question counts what is to be counted."""

    limits: Limits
    admitted: list[Admitted] = field(default_factory=list)
    spent: int = 0

    def within(self, now: float) -> list[Admitted]:
        return [one for one in self.admitted if one.at > now - WINDOW]

    def lose(self, now: float) -> None:
        """Whoever was not renewed in time has lost its lease once somebody else asks."""
        for one in self.admitted:
            one.runs = one.runs and now < one.ends

    def refusal(self, tokens: int, now: float) -> Refused | None:
        limits, used = self.limits, self.within(now)
        running = sum(one.runs for one in self.admitted)
        if limits.budget is not None and self.spent >= limits.budget:
            return "budget"
        if limits.requests is not None and len(used) + 1 > limits.requests:
            return "requests"
        if limits.tokens is not None and sum(o.tokens for o in used) + tokens > limits.tokens:
            return "tokens"
        if limits.concurrent is not None and running + 1 > limits.concurrent:
            return "concurrent"
        return None

    def wait(self, tokens: int, now: float) -> float:
        """The shortest after which the window has room: it has more only when one leaves."""
        for one in self.within(now):
            if self.refusal(tokens, one.at + WINDOW) not in ("requests", "tokens"):
                return one.at + WINDOW - now
        return 0.0

    def admit(self, asked: Admission, now: float) -> Verdict:
        self.lose(now)
        refused = self.refusal(asked.tokens, now)
        if refused is None:
            self.admitted.append(Admitted(now, asked.tokens, asked.lease, now + LEASE))
        used = self.within(now)
        reset = max((one.at + WINDOW - now for one in used), default=0.0)
        return Verdict(
            asked.record,
            refused,
            left(self.limits.requests, len(used)),
            left(self.limits.tokens, sum(one.tokens for one in used)),
            reset,
            reset,
            self.wait(asked.tokens, now) if refused in ("requests", "tokens") else 0.0,
        )


def left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(limit - used, 0)


Step = tuple[str, int, int]


def some_limits() -> st.SearchStrategy[Limits]:
    limit = st.none() | st.integers(0, 6)
    tokens = st.none() | st.integers(0, 30)
    return st.builds(Limits, limit, tokens, limit, st.none() | st.integers(0, 40))


def some_steps() -> st.SearchStrategy[list[Step]]:
    number = st.integers(0, 15)
    kinds = st.sampled_from(["admit"] * 4 + ["wait"] * 3 + ["settle"] * 2 + ["renew", "limit"])
    return st.lists(st.tuples(kinds, number, number), max_size=60)


@given(limits=some_limits(), other=some_limits(), steps=some_steps())
@settings(max_examples=200)
def test_windows_are_what_the_naive_model_says(
    folder: Path, limits: Limits, other: Limits, steps: list[Step]
) -> None:
    asyncio.run(compared(folder, limits, other, steps))


async def compared(folder: Path, limits: Limits, other: Limits, steps: list[Step]) -> None:
    clock = Clock()
    store = MemoryStore(folder, WINDOW, LEASE, clock)
    model = NaiveLimits(replace(limits, period="2026-11"))
    settled: set[str] = set()
    for number, (step, one, two) in enumerate(steps):
        if step == "wait":
            clock.now += one * TICK
        elif step == "admit":
            asked = Admission("app", RECORD, model.limits, one, str(number))
            assert await store.admit(asked) == model.admit(asked, clock.now)
        elif step == "limit":
            model.limits = replace(other, period="2026-11")
        elif model.admitted:
            chosen = model.admitted[-1 - one % len(model.admitted)]
            if step == "renew":
                await store.renew([("app", chosen.lease)])
                chosen.ends = clock.now + LEASE
            elif chosen.lease not in settled:
                await store.settle(settlement(chosen.lease, two, cost=1))
                settled.add(chosen.lease)
                chosen.tokens, chosen.runs = two, False
                model.spent += 1


@given(steps=some_steps(), requests=st.integers(1, 5), tokens=st.integers(15, 40))
@settings(max_examples=100)
def test_no_window_ever_holds_more_than_the_limits(
    folder: Path, steps: list[Step], requests: int, tokens: int
) -> None:
    """Whichever window of the whole history one looks at, where nothing used more than expected."""
    admitted = asyncio.run(history(folder, steps, requests, tokens))
    for start, _ in admitted:
        inside = [used for at, used in admitted if start <= at < start + WINDOW]
        assert len(inside) <= requests
        assert sum(inside) <= tokens


async def history(
    folder: Path, steps: list[Step], requests: int, tokens: int
) -> list[tuple[float, int]]:
    """When each was let in, and its tokens."""
    clock = Clock()
    store = MemoryStore(folder, WINDOW, LEASE, clock)
    admitted: list[tuple[float, int]] = []
    for step, one, _ in steps:
        if step == "admit":
            asked = admission(one, requests=requests, most_tokens=tokens)
            if (await store.admit(asked)).refused is None:
                admitted.append((clock.now, one))
        else:
            clock.now += one * TICK
    return admitted


@given(steps=some_steps(), requests=st.integers(1, 5), tokens=st.integers(0, 15))
@settings(max_examples=100)
def test_the_wait_of_a_refusal_is_the_shortest_that_helps(
    folder: Path, steps: list[Step], requests: int, tokens: int
) -> None:
    asyncio.run(waited(folder, steps, requests, tokens))


async def waited(folder: Path, steps: list[Step], requests: int, tokens: int) -> None:
    clock = Clock()
    store = MemoryStore(folder, WINDOW, LEASE, clock)
    for step, one, _ in steps:
        if step != "admit":
            clock.now += one * TICK
            continue
        asked = admission(min(one, 15), requests=requests, most_tokens=15 + tokens)
        verdict = await store.admit(asked)
        if verdict.refused is not None:
            assert verdict.retry_after > 0
            clock.now += verdict.retry_after - TICK
            assert (await store.admit(asked)).refused is not None
            clock.now += TICK
            assert (await store.admit(asked)).refused is None


async def test_a_lease_ends_when_its_time_is_over(tmp_path: Path) -> None:
    clock = Clock()
    store = await knowing_app(MemoryStore(tmp_path, WINDOW, LEASE, clock))
    await store.admit(admission())
    clock.now += LEASE - TICK
    assert (await store.admit(admission(concurrent=1))).refused == "concurrent"
    clock.now += TICK
    assert (await store.admit(admission(concurrent=1))).refused is None


async def test_what_left_the_window_is_not_kept(tmp_path: Path) -> None:
    clock = Clock()
    store = MemoryStore(tmp_path, WINDOW, LEASE, clock)
    await knowing_app(store)
    for _ in range(1000):
        await store.admit(admission(1))
        clock.now += 1
    window = store._windows["app"]
    assert len(window.entries) <= WINDOW + 1
    assert len(window.running) <= LEASE + 1


async def test_limits_do_not_outlast_the_process_but_keys_do(tmp_path: Path) -> None:
    first = MemoryStore(tmp_path)
    await first.write(KEYS, "app", RECORD)
    assert (await first.admit(admission(requests=1))).refused is None
    again = MemoryStore(tmp_path)
    assert await again.find(KEYS, "app") == RECORD
    assert (await again.admit(admission(requests=1))).refused is None
