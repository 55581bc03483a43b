"""A Redis that replicas share: exact limits for all of them, and what happens when it is ill."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator

import pytest

from polymath.errors import ConfigError, StoreUnavailable
from polymath.gateway.store import RedisStore, Store, Verdict
from polymath.gateway.store import redis as redis_store
from tests.gateway.stores import RedisStores, admission, knowing_app, opened, settlement
from tests.redis_server import RedisServer

LOGGER = "polymath.gateway.store.redis"
LONG_SECONDS = 60.0


@pytest.fixture
async def frail(frail_server: RedisServer) -> AsyncIterator[RedisStores]:
    """Makes stores of a server that may be harmed."""
    async with opened(frail_server.url) as made:
        yield made


async def fails(store: Store) -> float:
    """Seconds until the store says that it cannot be used."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="Redis cannot be reached at present"):
        await store.find("things", "a")
    return time.monotonic() - began


async def comes_back(store: Store) -> None:
    for _ in range(200):
        try:
            await store.find("things", "a")
        except StoreUnavailable:
            await asyncio.sleep(0.05)
        else:
            return
    raise TimeoutError("the store does not come back")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message.split(":")[0]
        for record in caplog.records
        if record.name == LOGGER and record.levelno >= logging.WARNING
    ]


# --- replicas ------------------------------------------------------------------------------------


async def asked_of_all(
    replicas: RedisStores, count: int, tokens: int = 0, **limits: int
) -> list[Verdict]:
    """What four replicas say to requests that come all at once."""
    stores = [await knowing_app(replicas.open()) for _ in range(4)]
    asking = (stores[n % 4].admit(admission(tokens, **limits)) for n in range(count))
    return await asyncio.gather(*asking)


async def test_of_many_requests_at_once_exactly_the_limit_is_let_in(replicas: RedisStores) -> None:
    verdicts = await asked_of_all(replicas, 200, requests=73)
    assert [verdict.refused for verdict in verdicts].count(None) == 73
    assert {verdict.refused for verdict in verdicts} == {None, "requests"}
    admitted = sorted(v.requests_left or 0 for v in verdicts if v.refused is None)
    assert admitted == list(range(73))


async def test_of_many_tokens_at_once_exactly_the_limit_is_let_in(replicas: RedisStores) -> None:
    verdicts = await asked_of_all(replicas, 200, 7, most_tokens=500)
    assert [verdict.refused for verdict in verdicts].count(None) == 500 // 7


async def test_of_many_at_once_exactly_so_many_run(replicas: RedisStores) -> None:
    verdicts = await asked_of_all(replicas, 200, concurrent=31)
    assert [verdict.refused for verdict in verdicts].count(None) == 31


async def test_what_one_replica_settles_all_know(replicas: RedisStores) -> None:
    one, other = await knowing_app(replicas.open()), replicas.open()
    await one.admit(admission(90, "a"))
    await other.settle(settlement("a", 10, 5, {"app|math|requests": 1}))
    verdict = await one.admit(admission(0, most_tokens=100, concurrent=1))
    assert (verdict.refused, verdict.tokens_left) == (None, 90)
    assert await one.spent("app", "2026-11") == 5
    assert await one.usage("2026-11-28") == {"app|math|requests": 1}


async def test_settlements_at_once_add_up(replicas: RedisStores) -> None:
    stores = [await knowing_app(replicas.open()) for _ in range(3)]
    leases = [str(number) for number in range(120)]
    await asyncio.gather(*(stores[0].admit(admission(9, lease)) for lease in leases))
    counts = {"app|math|requests": 1, "app|math|prompt_tokens": 4}
    settling = [settlement(lease, 4, 3, counts) for lease in leases]
    await asyncio.gather(*(stores[n % 3].settle(one) for n, one in enumerate(settling)))
    assert await stores[1].spent("app", "2026-11") == 360
    assert await stores[1].usage("2026-11-28") == {
        "app|math|requests": 120,
        "app|math|prompt_tokens": 480,
    }
    verdict = await stores[2].admit(admission(0, most_tokens=1000, concurrent=1))
    assert (verdict.refused, verdict.tokens_left) == (None, 520)


async def test_no_window_of_replicas_holds_more_than_the_limit(replicas: RedisStores) -> None:
    """As seen from outside: between the first question and the last answer lies a whole window."""
    window, most = 0.25, 6
    stores = [await knowing_app(replicas.open(window)) for _ in range(3)]
    admitted: list[tuple[float, float]] = []

    async def hammer(store: Store) -> None:
        while len(admitted) < 4 * most:
            asking = time.monotonic()
            if (await store.admit(admission(requests=most))).refused is None:
                admitted.append((time.monotonic(), asking))
            await asyncio.sleep(0.002)

    await asyncio.gather(*(hammer(store) for store in stores * 2))
    admitted.sort()
    for number in range(len(admitted) - most):
        group = admitted[number : number + most + 1]
        assert group[-1][0] - min(asked for _, asked in group) >= window - 0.005


async def test_stores_of_other_prefixes_share_nothing(redis_server: RedisServer) -> None:
    async with opened(redis_server.url) as one, opened(redis_server.url) as other:
        first, second = await knowing_app(one.open()), other.open()
        assert (await second.admit(admission())).record is None
        await second.put("answers", "a", b"1", 60, 5)
        assert await first.get("answers", "a") is None


async def test_a_request_that_is_given_up_mixes_up_no_answers(replicas: RedisStores) -> None:
    """A connection with an answer that nobody awaits any more is not used again."""
    store = replicas.open()
    for number in range(50):
        await store.write("things", str(number), str(number).encode())

    async def found(number: int) -> bytes | None:
        return await store.find("things", str(number))

    for round_ in range(20):
        asked = [asyncio.create_task(found(number)) for number in range(50)]
        for _ in range(round_):
            await asyncio.sleep(0)
        for task in asked[::3]:
            task.cancel()
        await asyncio.wait(asked)
        answers = {n: task.result() for n, task in enumerate(asked) if not task.cancelled()}
        assert answers == {number: str(number).encode() for number in answers}
        assert len(answers) >= 33


async def test_nothing_of_windows_leases_and_values_stays_for_ever(
    replicas: RedisStores, redis_server: RedisServer
) -> None:
    store = await knowing_app(replicas.open())
    await store.admit(admission(1, "a"))
    await store.renew([("app", "a")])
    await store.admit(admission(1, "b"))
    await store.settle(settlement("b", 1, 1, {"n": 1}))
    await store.put("answers", "a", b"1", 60, 5)
    with redis_server.client() as client:
        names = client.keys(f"{replicas.prefix}:*")
        assert isinstance(names, list)
        lasting = {name.split(b":")[1] for name in names if client.ttl(name) == -1}
        kinds = {name.split(b":")[1] for name in names}
    assert lasting == {b"keys"}
    assert kinds == {
        b"keys", b"window", b"held", b"leases", b"spent", b"usage", b"shelf", b"shelves"
    }  # fmt: skip


async def test_a_value_with_little_time_shortens_nobody_elses(
    replicas: RedisStores, redis_server: RedisServer
) -> None:
    store = replicas.open()
    await store.put("answers", "long", b"1", 600, 5)
    await store.put("answers", "short", b"1", 1, 5)
    with redis_server.client() as client:
        left = client.pttl(f"{replicas.prefix}:shelves:answers")
    assert isinstance(left, int)
    assert left > 300_000


# --- Redis is ill --------------------------------------------------------------------------------


async def test_a_server_that_dies_is_noticed_at_once_and_told_once(
    frail: RedisStores, frail_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = await knowing_app(frail.open())
    frail_server.kill()
    assert await fails(store) < redis_store.TIMEOUT_SECONDS
    results = await asyncio.gather(
        *(store.admit(admission()) for _ in range(50)), return_exceptions=True
    )
    assert {type(result) for result in results} == {StoreUnavailable}
    await asyncio.sleep(redis_store.REST_SECONDS)
    await fails(store)
    assert said(caplog) == ["Redis is gone"]
    frail_server.start()
    await comes_back(store)
    await store.find("things", "a")
    assert said(caplog) == ["Redis is gone", "Redis is back"]
    frail_server.kill()
    await fails(store)
    assert said(caplog) == ["Redis is gone", "Redis is back", "Redis is gone"]


async def test_after_a_restart_no_dead_connection_is_used(
    frail: RedisStores, frail_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a script missed that the new server never saw."""
    store = await knowing_app(frail.open())
    await asyncio.gather(*(store.admit(admission()) for _ in range(100)))
    frail_server.kill()
    frail_server.start()
    await asyncio.sleep(0.05)
    await knowing_app(store)
    verdicts = await asyncio.gather(*(store.admit(admission(requests=40)) for _ in range(100)))
    assert [verdict.refused for verdict in verdicts].count(None) == 40
    assert said(caplog) == []


async def test_scripts_that_the_server_forgot_are_sent_again(
    frail: RedisStores, frail_server: RedisServer
) -> None:
    store = await knowing_app(frail.open())

    async def uses_each() -> str | None:
        verdict = await store.admit(admission(5, requests=2))
        await store.settle(settlement(cost=1))
        await store.put("answers", "a", b"1", 60, 5)
        return verdict.refused

    refusals = []
    for _ in range(3):
        refusals.append(await uses_each())
        with frail_server.client() as client:
            client.script_flush()
    assert refusals == [None, None, "requests"]
    assert await store.spent("app", "2026-11") == 3


async def test_a_server_that_hangs_is_given_up_in_time(
    frail: RedisStores,
    frail_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many wait for it; whoever comes then does not wait at all."""
    monkeypatch.setattr(redis_store, "REST_SECONDS", LONG_SECONDS)
    store = await knowing_app(frail.open())
    frail_server.hang()
    times = await asyncio.gather(*(fails(store) for _ in range(200)))
    assert redis_store.TIMEOUT_SECONDS - 0.1 < max(times) < 2 * redis_store.TIMEOUT_SECONDS - 0.1
    assert await fails(store) < redis_store.TIMEOUT_SECONDS / 2
    assert [record.message for record in caplog.records if record.name == LOGGER] == [
        "Redis is gone: it does not answer"
    ]


async def test_a_server_that_hung_is_used_again_and_counts_right(
    frail: RedisStores, frail_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was asked meanwhile it does once at most: it is not asked a second time."""
    store = await knowing_app(frail.open())
    frail_server.hang()
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(StoreUnavailable):
        await store.settle(settlement(cost=5))
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", LONG_SECONDS)
    frail_server.go_on()
    await comes_back(store)
    assert await store.spent("app", "2026-11") in (0, 5)


async def test_a_server_that_is_full_still_knows_the_limits(
    frail: RedisStores, frail_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers that cannot be kept are no reason to refuse requests."""
    store = await knowing_app(frail.open())
    with frail_server.client() as client:
        client.config_set("maxmemory", 1)
        for refusal in (None, None, "requests"):
            with pytest.raises(StoreUnavailable, match="Redis refuses to do this at present"):
                await store.put("answers", "a", b"1", 60, 5)
            with pytest.raises(StoreUnavailable, match="Redis refuses to do this at present"):
                await store.write("things", "a", b"1")
            assert (await store.admit(admission(1, requests=2))).refused == refusal
            await store.settle(settlement(cost=1))
        assert said(caplog) == ["Redis refuses"]
        assert "used memory > 'maxmemory'" in caplog.text
        client.config_set("maxmemory", 0)
    await store.put("answers", "a", b"1", 60, 5)
    assert await store.get("answers", "a") == b"1"


async def test_a_server_that_never_was_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    async with opened("unix:///nowhere/redis.sock") as nowhere:
        assert await fails(nowhere.open()) < redis_store.TIMEOUT_SECONDS
    assert said(caplog) == ["Redis is gone"]


# --- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis",
        "http://localhost:6379",
        "redis://localhost:port",
        "redis://localhost:99999",
        "redis://localhost?db=x",
        "redis://localhost?tmieout=3",
        "redis://localhost?protocol=9",
    ],
)
def test_a_url_that_cannot_be_read_is_an_error_of_the_config(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store: "):
        RedisStore(url)


@pytest.mark.parametrize("url", ["redis://localhost:1/3", "rediss://u:p@localhost", "unix:///x"])
async def test_a_url_that_can_be_read_connects_to_nothing_yet(url: str) -> None:
    await RedisStore(url).close()


def test_without_redis_py_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigError, match=r"pip install 'polymath\[redis\]'"):
        RedisStore("redis://localhost")
