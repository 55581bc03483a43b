"""What a store promises, held against both: the memory of a process and a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymath.gateway.store import Admission, Limits, MemoryStore, Store, Verdict
from polymath.gateway.store.protocol import KEYS
from tests.gateway.stores import (
    RECORD,
    Clock,
    RedisStores,
    Stores,
    admission,
    knowing_app,
    settlement,
)

BYTES = bytes(range(256))
LOG = "audit"
"""One that the embedded store keeps in a file, as it does not all."""


async def refused(store: Store, asked: Admission) -> str | None:
    return (await store.admit(asked)).refused


# --- maps ----------------------------------------------------------------------------------------


async def test_a_map_holds_what_was_written(stores: Stores) -> None:
    store = stores.open()
    assert await store.read("things") == {}
    assert await store.find("things", "a") is None
    await store.write("things", "a", b'"one"')
    await store.write("things", "b", '"zwei ü"'.encode())
    await store.write("things", "a", b'"three"')
    assert await store.find("things", "a") == b'"three"'
    assert await store.read("things") == {"a": b'"three"', "b": '"zwei ü"'.encode()}
    assert await store.read("others") == {}


async def test_what_is_read_is_the_callers_own(stores: Stores) -> None:
    store = stores.open()
    await store.write("things", "a", b"1")
    (await store.read("things")).clear()
    assert await store.read("things") == {"a": b"1"}


async def test_what_is_erased_is_gone(stores: Stores) -> None:
    store = stores.open()
    await store.write("things", "a", b"1")
    await store.write("things", "b", b"2")
    assert await store.erase("things", "a")
    assert not await store.erase("things", "a")
    assert not await store.erase("others", "a")
    assert await store.read("things") == {"b": b"2"}


async def test_each_sees_at_once_what_another_changes(stores: Stores) -> None:
    """A command beside the server, or a replica."""
    server, command = stores.open(), stores.open()
    for number in range(20):
        value = str(number % 10).encode()
        await command.write("things", "a", value)
        assert await server.find("things", "a") == value
        assert await server.read("things") == {"a": value}
    assert await command.erase("things", "a")
    assert await server.find("things", "a") is None
    await server.write("things", "b", b"1")
    assert await command.read("things") == {"b": b"1"}


# --- shelves -------------------------------------------------------------------------------------


async def test_a_shelf_gives_back_every_byte(stores: Stores) -> None:
    store = stores.open()
    await store.put("answers", "a", BYTES, 60, 10)
    await store.put("answers", "empty", b"", 60, 10)
    assert await store.get("answers", "a") == BYTES
    assert await store.get("answers", "empty") == b""
    assert await store.get("answers", "b") is None
    assert await store.get("others", "a") is None


async def test_a_value_is_gone_when_its_time_is_over(stores: Stores) -> None:
    store = stores.open()
    await store.put("answers", "long", b"1", 60, 10)
    await store.put("answers", "short", b"2", 0.2, 10)
    await store.put("answers", "shortest", b"3", 0.0001, 10)
    await stores.wait(0.25)
    assert await store.get("answers", "short") is None
    assert await store.get("answers", "shortest") is None
    assert await store.get("answers", "long") == b"1"


async def test_a_value_put_again_has_its_new_time(stores: Stores) -> None:
    store = stores.open()
    await store.put("answers", "a", b"1", 0.2, 10)
    await store.put("answers", "a", b"2", 60, 10)
    await stores.wait(0.25)
    assert await store.get("answers", "a") == b"2"


async def test_the_oldest_make_room(stores: Stores) -> None:
    store = stores.open()
    for name in "abcde":
        await store.put("answers", name, name.encode(), 60, 3)
    await store.put("others", "a", b"1", 60, 3)
    left = [name for name in "abcde" if await store.get("answers", name) is not None]
    assert left == ["c", "d", "e"]
    assert await store.get("others", "a") == b"1"


async def test_a_value_put_again_is_the_newest(stores: Stores) -> None:
    store = stores.open()
    for name in "abcad":
        await store.put("answers", name, name.encode(), 60, 3)
    left = [name for name in "abcd" if await store.get("answers", name) is not None]
    assert left == ["a", "c", "d"]


async def test_a_shelf_that_became_smaller_forgets_the_rest(stores: Stores) -> None:
    store = stores.open()
    for name in "abcde":
        await store.put("answers", name, b"1", 60, 10)
    await store.put("answers", "f", b"1", 60, 2)
    left = [name for name in "abcdef" if await store.get("answers", name) is not None]
    assert left == ["e", "f"]


# --- logs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [LOG, "decisions"])
async def test_a_log_gives_the_newest_first(stores: Stores, log: str) -> None:
    store = stores.open()
    assert await store.recent(log, 5) == []
    for number in range(4):
        await store.append(log, f'{{"n":{number},"text":"ü"}}'.encode(), 10)
    assert await store.recent(log, 2) == [f'{{"n":{n},"text":"ü"}}'.encode() for n in (3, 2)]
    assert len(await store.recent(log, 10)) == 4
    assert await store.recent("others", 10) == []


@pytest.mark.parametrize("log", [LOG, "decisions"])
async def test_a_log_forgets_the_oldest(stores: Stores, log: str) -> None:
    store = stores.open()
    for number in range(25):
        await store.append(log, str(number).encode(), 5)
        newest = range(number, max(-1, number - 5), -1)
        assert await store.recent(log, 5) == [str(n).encode() for n in newest]


async def test_what_another_logs_is_read(stores: Stores) -> None:
    one, other = stores.open(), stores.open()
    for number in range(25):
        await (one, other)[number % 2].append(LOG, str(number).encode(), 5)
    expected = [str(n).encode() for n in range(24, 19, -1)]
    assert await one.recent(LOG, 5) == await other.recent(LOG, 5) == expected


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [None, b'{"id":"app","revoked":1}', b'{"id":"app"} '])
async def test_with_another_record_nothing_is_counted(
    stores: Stores, current: bytes | None
) -> None:
    store = stores.open()
    if current is not None:
        await store.write(KEYS, "app", current)
    for _ in range(3):
        assert await store.admit(admission(5, requests=1, concurrent=1)) == Verdict(current)
    await store.write(KEYS, "app", RECORD)
    verdict = await store.admit(admission(5, requests=1, most_tokens=5, concurrent=1))
    assert (verdict.record, verdict.refused) == (RECORD, None)


async def test_a_record_that_another_changed_comes_back(stores: Stores) -> None:
    store, command = await knowing_app(stores.open()), stores.open()
    assert (await store.admit(admission())).record == RECORD
    await command.write(KEYS, "app", b"changed")
    assert await store.admit(admission()) == Verdict(b"changed")
    await command.erase(KEYS, "app")
    assert await store.admit(admission()) == Verdict(None)


# --- requests and tokens -------------------------------------------------------------------------


async def test_without_limits_all_are_let_in(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    for tokens in (0, 1, 10**9, 10**30):
        verdict = await store.admit(admission(tokens))
        assert (verdict.refused, verdict.retry_after) == (None, 0.0)
        assert verdict.requests_left is None
        assert verdict.tokens_left is None


async def test_so_many_requests_are_let_in_and_no_more(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    verdicts = [await store.admit(admission(requests=3)) for _ in range(5)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests", "requests"]
    assert [verdict.requests_left for verdict in verdicts] == [2, 1, 0, 0, 0]


async def test_so_many_tokens_are_let_in_and_no_more(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    verdicts = [await store.admit(admission(n, most_tokens=10)) for n in (6, 5, 4, 1, 0)]
    assert [verdict.refused for verdict in verdicts] == [None, "tokens", None, "tokens", None]
    assert [verdict.tokens_left for verdict in verdicts] == [4, 4, 0, 0, 0]


async def test_a_refusal_counts_as_nothing(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    for _ in range(3):
        assert await refused(store, admission(11, requests=1, most_tokens=10)) == "tokens"
    assert await refused(store, admission(10, requests=1, most_tokens=10)) is None


@pytest.mark.parametrize("limit", ["requests", "concurrent", "budget"])
async def test_a_limit_of_zero_lets_nobody_in(stores: Stores, limit: str) -> None:
    store = await knowing_app(stores.open())
    verdict = await store.admit(admission(**{limit: 0}))
    assert (verdict.refused, verdict.retry_after) == (limit, 0.0)


async def test_each_key_has_limits_of_its_own(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    await store.write(KEYS, "other", RECORD)
    limits = Limits(requests=1, concurrent=1)
    for key in ("app", "other"):
        assert await refused(store, Admission(key, RECORD, limits, 0, "1")) is None
        assert await refused(store, Admission(key, RECORD, limits, 0, "2")) == "requests"


async def test_limits_that_change_count_what_went_before(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    for _ in range(4):
        await store.admit(admission(2))
    verdict = await store.admit(admission(requests=2))
    assert (verdict.refused, verdict.requests_left) == ("requests", 0)
    verdict = await store.admit(admission(2, requests=6, most_tokens=20))
    assert (verdict.requests_left, verdict.tokens_left) == (1, 10)


async def test_what_was_used_takes_the_place_of_the_estimate(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    limits = {"most_tokens": 100}
    await store.admit(admission(80, "a", **limits))
    assert await refused(store, admission(30, **limits)) == "tokens"
    await store.settle(settlement("a", 10))
    verdict = await store.admit(admission(30, "b", **limits))
    assert (verdict.refused, verdict.tokens_left) == (None, 60)
    await store.settle(settlement("b", 150))
    verdict = await store.admit(admission(1, **limits))
    assert (verdict.refused, verdict.tokens_left) == ("tokens", 0)


async def test_what_nobody_asked_for_settles_nothing(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    await store.settle(settlement("unknown", 50))
    verdict = await store.admit(admission(0, most_tokens=10))
    assert verdict.tokens_left == 10


async def test_the_window_slides(stores: Stores) -> None:
    """Also over requests that used nothing: their zero is no reason to fail."""
    store = await knowing_app(stores.open(window=0.25))
    for used in (0, 7):
        await store.admit(admission(5, "a"))
        await store.settle(settlement("a", used))
        await stores.wait(0.3)
    verdict = await store.admit(admission(3, requests=5, most_tokens=10))
    assert (verdict.refused, verdict.requests_left, verdict.tokens_left) == (None, 4, 7)


async def test_what_is_settled_after_its_window_is_not_counted_in_the_next(stores: Stores) -> None:
    store = await knowing_app(stores.open(window=0.25))
    await store.admit(admission(5, "a"))
    await stores.wait(0.3)
    await store.admit(admission(1, "b"))
    await store.settle(settlement("a", 100))
    verdict = await store.admit(admission(1, most_tokens=10**6))
    assert verdict.tokens_left is not None
    assert verdict.tokens_left >= 10**6 - 2


async def test_reset_is_when_the_window_is_empty(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    await store.admit(admission(requests=2))
    await stores.wait(0.1)
    verdict = await store.admit(admission(requests=2))
    assert verdict.requests_reset == verdict.tokens_reset == pytest.approx(60)
    await stores.wait(0.1)
    verdict = await store.admit(admission(requests=2))
    assert verdict.refused == "requests"
    assert 30 < verdict.requests_reset < 60


async def test_many_at_once_are_counted_one_by_one(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    asked = [admission(3, requests=50, most_tokens=100) for _ in range(200)]
    verdicts = await asyncio.gather(*(store.admit(one) for one in asked))
    admitted = [verdict for verdict in verdicts if verdict.refused is None]
    assert sorted(verdict.tokens_left or 0 for verdict in admitted) == list(range(1, 100, 3))
    assert {verdict.refused for verdict in verdicts} == {None, "tokens"}


# --- when to come back ---------------------------------------------------------------------------


async def waited_for(stores: Stores, store: Store, asked: Admission) -> None:
    """Let in when the refusal said, not earlier and not later, as far as a client can tell."""
    before = now(stores)
    verdict = await store.admit(asked)
    after = now(stores)
    assert verdict.refused is not None
    assert verdict.retry_after > 0
    while True:
        asking = now(stores)
        refusal = await refused(store, asked)
        if refusal is None:
            break
        assert asking <= after + verdict.retry_after + 0.01
        await stores.wait(0.015625)
    assert now(stores) >= before + verdict.retry_after - 0.01


def now(stores: Stores) -> float:
    return time.monotonic() if isinstance(stores, RedisStores) else stores.clock.now


async def test_a_request_is_let_in_when_the_refusal_said(stores: Stores) -> None:
    store = await knowing_app(stores.open(window=1.0))
    await store.admit(admission())
    await stores.wait(0.125)
    await store.admit(admission())
    await waited_for(stores, store, admission(requests=2))


async def test_tokens_are_let_in_when_the_refusal_said(stores: Stores) -> None:
    store = await knowing_app(stores.open(window=1.0))
    for tokens in (3, 3, 6):
        await store.admit(admission(tokens))
        await stores.wait(0.125)
    await waited_for(stores, store, admission(4, most_tokens=12))


async def test_both_limits_are_waited_for(stores: Stores) -> None:
    """The first to leave makes room for a request, but only the second for its tokens."""
    store = await knowing_app(stores.open(window=1.0))
    await store.admit(admission(1))
    await stores.wait(0.25)
    await store.admit(admission(9))
    await waited_for(stores, store, admission(5, requests=2, most_tokens=10))


async def test_after_a_limit_was_lowered_the_wait_is_for_as_many_as_needed(stores: Stores) -> None:
    store = await knowing_app(stores.open(window=1.0))
    await asyncio.gather(*(store.admit(admission(1)) for _ in range(150)))
    await stores.wait(0.125)
    for _ in range(3):
        await store.admit(admission(1))
        await stores.wait(0.0625)
    await waited_for(stores, store, admission(1, requests=3, most_tokens=10))


@pytest.mark.parametrize("asked", [admission(11, most_tokens=10), admission(concurrent=1)])
async def test_where_no_wait_is_known_there_is_none(stores: Stores, asked: Admission) -> None:
    store = await knowing_app(stores.open())
    await store.admit(admission(1, most_tokens=10))
    verdict = await store.admit(asked)
    assert verdict.refused is not None
    assert verdict.retry_after == 0.0


# --- running requests ----------------------------------------------------------------------------


async def test_so_many_run_at_a_time(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    assert await refused(store, admission(0, "a", concurrent=2)) is None
    assert await refused(store, admission(0, "b", concurrent=2)) is None
    assert await refused(store, admission(concurrent=2)) == "concurrent"
    await store.settle(settlement("a"))
    assert await refused(store, admission(concurrent=2)) is None
    assert await refused(store, admission(concurrent=2)) == "concurrent"


async def test_a_dead_process_does_not_hold_its_requests_for_ever(stores: Stores) -> None:
    store = await knowing_app(stores.open(lease=0.25))
    assert await refused(store, admission(concurrent=1)) is None
    await stores.wait(0.3)
    assert await refused(store, admission(concurrent=1)) is None


async def test_a_lease_that_is_renewed_lasts(stores: Stores) -> None:
    store = await knowing_app(stores.open(lease=1.5))
    await store.admit(admission(0, "a"))
    await store.admit(admission(0, "b"))
    for _ in range(3):
        await stores.wait(0.55)
        await store.renew([("app", "a"), ("app", "unknown"), ("unknown", "a")])
    assert await refused(store, admission(concurrent=1)) == "concurrent"
    await store.settle(settlement("a"))
    await store.renew([("app", "a")])
    await store.renew([])
    assert await refused(store, admission(concurrent=1)) is None


async def test_leases_that_are_renewed_out_of_turn_end_in_turn(stores: Stores) -> None:
    """The one renewed first ends first, though it was let in last."""
    store = await knowing_app(stores.open(lease=0.5))
    await store.admit(admission(0, "a"))
    await store.admit(admission(0, "b"))
    await store.renew([("app", "b")])
    await stores.wait(0.3)
    await store.renew([("app", "a")])
    await stores.wait(0.3)
    assert await refused(store, admission(concurrent=2)) is None


# --- budgets and usage ---------------------------------------------------------------------------


async def test_a_budget_that_is_spent_lets_nobody_in(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    for spent in (0, 60, 99):
        await store.settle(settlement(cost=spent - await store.spent("app", "2026-11")))
        assert await refused(store, admission(budget=100)) is None
    await store.settle(settlement(cost=1))
    verdict = await store.admit(admission(requests=0, budget=100))
    assert (verdict.refused, verdict.retry_after) == ("budget", 0.0)
    assert await refused(store, admission(budget=101)) is None


async def test_each_period_and_key_has_a_budget_of_its_own(stores: Stores) -> None:
    store = await knowing_app(stores.open())
    await store.settle(settlement(cost=10**15))
    december = Limits(budget=1, period="2026-12")
    assert await refused(store, Admission("app", RECORD, december, 0, "a")) is None
    assert await store.spent("app", "2026-11") == 10**15
    assert await store.spent("app", "2026-12") == 0
    assert await store.spent("other", "2026-11") == 0


async def test_usage_adds_up_by_the_day(stores: Stores) -> None:
    store = stores.open()
    await store.settle(settlement(counts={"app|math|requests": 1, "app|math|tokens": 30}))
    await store.settle(settlement(counts={"app|math|requests": 1, "app|ü|tokens": 5}))
    assert await store.usage("2026-11-28") == {
        "app|math|requests": 2,
        "app|math|tokens": 30,
        "app|ü|tokens": 5,
    }
    assert await store.usage("2026-11-29") == {}


async def test_a_store_that_was_closed_may_be_closed_again(stores: Stores) -> None:
    store = stores.open()
    await store.write("things", "a", b"1")
    await store.close()
    await store.close()


# --- both are one --------------------------------------------------------------------------------

Step = tuple[str, int, int]


def steps() -> st.SearchStrategy[list[Step]]:
    number = st.integers(0, 12)
    kinds = ("admit", "admit", "admit", "settle", "change", "lose")
    return st.lists(st.tuples(st.sampled_from(kinds), number, number), max_size=25)


async def played(store: Store, moves: Sequence[Step], limits: Limits) -> list[object]:
    """What a store says to a sequence of calls."""
    said: list[object] = []
    known = b"0"
    await store.write(KEYS, "app", known)
    for number, (move, one, two) in enumerate(moves):
        if move == "admit":
            verdict = await store.admit(Admission("app", known, limits, one, str(number)))
            known = verdict.record or b""
            said.append((verdict.record, verdict.refused))
            said.append((verdict.requests_left, verdict.tokens_left))
            said.append((verdict.requests_reset > 0, verdict.retry_after > 0))
        elif move == "settle":
            await store.settle(settlement(str(number - 1 - one), two, one, {f"n{one}": two}))
        elif move == "change":
            await store.write(KEYS, "app", str(one).encode())
        else:
            said.append(await store.erase(KEYS, "app"))
    said.append(await store.spent("app", "2026-11"))
    return [*said, await store.usage("2026-11-28")]


@given(moves=steps(), most=st.tuples(*[st.none() | st.integers(0, 20)] * 4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_memory_and_redis_say_the_same(
    replicas: RedisStores,
    tmp_path_factory: pytest.TempPathFactory,
    moves: list[Step],
    most: tuple[int | None, int | None, int | None, int | None],
) -> None:
    limits = Limits(*most, period="2026-11")
    memory = MemoryStore(tmp_path_factory.mktemp("memory"), clock=Clock())
    shared = RedisStores(replicas.url)
    try:
        assert await played(memory, moves, limits) == await played(shared.open(), moves, limits)
    finally:
        await shared.close()
