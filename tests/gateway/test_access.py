"""Who is let in: keys asked for as soon as there are any, limits, and what is given back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from polymath.errors import (
    InvalidKey,
    PolymathError,
    QuotaExceeded,
    RateLimited,
    StoreUnavailable,
)
from polymath.gateway import access as access_module
from polymath.gateway.access import Access, Ticket, Used
from polymath.gateway.keys import Budget, KeyRecord, KeyRing
from polymath.gateway.store import RedisStore, Store
from polymath.gateway.store.protocol import KEYS
from tests.gateway.stores import MemoryStores, RedisStores, Stores
from tests.gateway.test_keys import GOOD, MALFORMED
from tests.redis_server import RedisServer

NOTHING = Used("math")
SCHEMES = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer\t",
    "Basic abc",
    GOOD,
    f"Token {GOOD}",
    "Béarer x",
]

MakeAccess = Callable[..., Access]


@pytest.fixture
def store(stores: Stores) -> Store:
    return stores.open()


@pytest.fixture
async def make() -> AsyncIterator[MakeAccess]:
    """Makes what lets in to a store; closed at the end."""
    made: list[Access] = []

    def make(store: Store, *arguments: Any) -> Access:
        made.append(Access(store, *arguments))
        return made[-1]

    yield make
    for access in made:
        await access.close()


@pytest.fixture
def access(make: MakeAccess, store: Store) -> Access:
    return make(store)


async def key_of(store: Store, **rights: object) -> str:
    """The header of a new key."""
    key, _ = await KeyRing(store).create("app", **rights)
    return f"Bearer {key}"


def spoilt(authorization: str) -> str:
    """The same with another secret."""
    return authorization[:-3] + ("abc" if authorization[-3:] != "abc" else "cba")


async def rewritten(store: Store, **rights: object) -> KeyRecord:
    """The only key, with other rights."""
    (record,) = await KeyRing(store).all()
    changed = record.model_copy(update=rights)
    await store.write(KEYS, record.id, changed.model_dump_json(exclude_none=True).encode())
    return changed


async def settle(access: Access, ticket: Ticket, used: Used = NOTHING) -> None:
    access.give_back(ticket, used)
    await access.settled()


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


Ask = Callable[[Access, str | None], Awaitable[object]]


async def asks_for_an_answer(access: Access, authorization: str | None) -> object:
    return (await access.admit(authorization, 1)).key


async def asks_for_nothing_dear(access: Access, authorization: str | None) -> object:
    return await access.authenticate(authorization)


both_ways = pytest.mark.parametrize("ask", [asks_for_an_answer, asks_for_nothing_dear])


# --- whether a key is asked for ------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("authorization", [*SCHEMES, f"Bearer {GOOD}"])
async def test_without_keys_anybody_is_let_in(
    access: Access, ask: Ask, authorization: str | None
) -> None:
    assert await ask(access, authorization) is None


@both_ways
async def test_as_soon_as_there_is_a_key_it_is_asked_for(
    access: Access, stores: Stores, ask: Ask
) -> None:
    assert await ask(access, None) is None
    authorization = await key_of(stores.open())
    with pytest.raises(InvalidKey):
        await ask(access, None)
    assert await ask(access, authorization) is not None


@both_ways
async def test_when_all_keys_are_revoked_nobody_is_let_in(
    make: MakeAccess, store: Store, ask: Ask
) -> None:
    authorization = await key_of(store)
    await KeyRing(store).revoke("app")
    for header in (None, authorization, f"Bearer {GOOD}"):
        with pytest.raises(InvalidKey):
            await ask(make(store), header)


@both_ways
async def test_keys_that_vanish_open_nothing(access: Access, stores: Stores, ask: Ask) -> None:
    authorization = await key_of(stores.open())
    record: Any = await ask(access, authorization)
    await stores.open().erase(KEYS, record.id)
    for header in (None, authorization):
        with pytest.raises(InvalidKey):
            await ask(access, header)


@both_ways
async def test_auth_none_asks_for_no_keys(make: MakeAccess, store: Store, ask: Ask) -> None:
    authorization = await key_of(store, rpm=0)
    for header in (None, authorization, "Bearer x"):
        assert await ask(make(store, "none"), header) is None


async def test_whoever_needs_no_key_may_ask_any_expert(access: Access) -> None:
    ticket = await access.admit(None, 10**9)
    assert (ticket.key, ticket.experts, ticket.owner) == (None, None, "anybody")
    assert ticket.headers == {}


async def test_a_ticket_says_what_its_key_may(access: Access, store: Store) -> None:
    authorization = await key_of(store, experts=("math", "law"))
    ticket = await access.admit(authorization, 1)
    assert ticket.key is not None
    assert ticket.experts == frozenset({"math", "law"})
    assert ticket.owner == ticket.key.id
    await rewritten(store, experts=())
    assert (await access.admit(authorization, 1)).experts == frozenset()


# --- 401 -----------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("authorization", SCHEMES)
async def test_no_key_is_told_how_to_give_one(
    access: Access, store: Store, ask: Ask, authorization: str | None
) -> None:
    await key_of(store)
    with pytest.raises(InvalidKey, match=r"You didn't provide an API key") as caught:
        await ask(access, authorization)
    assert caught.value.status == 401
    assert "Authorization: Bearer YOUR_KEY" in caught.value.message


@both_ways
@pytest.mark.parametrize("key", [key for key in MALFORMED if key.strip()], ids=repr)
async def test_a_malformed_key_is_refused_and_not_echoed(
    access: Access, store: Store, ask: Ask, key: str
) -> None:
    authorization = await key_of(store)
    for known in (False, True):
        with pytest.raises(InvalidKey) as caught:
            await ask(access, f"Bearer {key}x")
        assert caught.value.status == 401
        assert len(key) < 8 or key not in caught.value.message
        if not known:
            await ask(access, authorization)


@both_ways
async def test_a_wrong_secret_opens_nothing(access: Access, store: Store, ask: Ask) -> None:
    """Whether or not the key was seen before, and as an unknown key does."""
    right = await key_of(store, rpm=2)
    wrong = spoilt(right)
    unknown = "Bearer pm-" + "0" * 12 + wrong[len("Bearer pm-") + 12 :]
    messages = []
    for header in (wrong, unknown):
        with pytest.raises(InvalidKey) as caught:
            await ask(access, header)
        messages.append(caught.value.message.replace(header[7:13], "START"))
    await ask(access, right)
    with pytest.raises(InvalidKey):
        await ask(access, wrong)
    assert messages[0] == messages[1] == f"Incorrect API key provided: START***{wrong[-4:]}."
    assert await access.admit(right, 1)


@both_ways
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_may_be_in_any_case(
    access: Access, store: Store, ask: Ask, scheme: str
) -> None:
    _, key = (await key_of(store)).split()
    assert await ask(access, f"{scheme}  {key} ") is not None


@both_ways
async def test_a_damaged_record_lets_nobody_in(make: MakeAccess, store: Store, ask: Ask) -> None:
    authorization = await key_of(store)
    (record,) = await KeyRing(store).all()
    access = make(store, "keys", "open")
    await store.write(KEYS, record.id, b'{"id":"a"}')
    with pytest.raises(StoreUnavailable):
        await ask(access, authorization)


# --- revoked and changed -------------------------------------------------------------------------


@both_ways
async def test_a_key_revoked_elsewhere_is_useless_at_once(
    make: MakeAccess, stores: Stores, ask: Ask
) -> None:
    server, command = make(stores.open()), stores.open()
    authorization = await key_of(command)
    await ask(server, authorization)
    await KeyRing(command).revoke("app")
    for _ in range(2):
        with pytest.raises(InvalidKey, match=r"^This API key has been revoked\.$"):
            await ask(server, authorization)


async def test_a_key_revoked_is_useless_for_every_replica(
    make: MakeAccess, replicas: RedisStores
) -> None:
    servers = [make(replicas.open()) for _ in range(3)]
    authorization = await key_of(replicas.open())
    for server in servers:
        await server.admit(authorization, 1)
    await KeyRing(replicas.open()).revoke("app")
    for server in servers:
        with pytest.raises(InvalidKey, match="revoked"):
            await server.admit(authorization, 1)


async def test_whoever_lacks_the_secret_is_not_told_that_a_key_was_revoked(
    access: Access, store: Store
) -> None:
    authorization = await key_of(store)
    await KeyRing(store).revoke("app")
    with pytest.raises(InvalidKey, match="Incorrect API key provided"):
        await access.admit(spoilt(authorization), 1)


async def test_limits_that_change_hold_at_once(make: MakeAccess, stores: Stores) -> None:
    access, command = make(stores.open()), stores.open()
    authorization = await key_of(command, rpm=1)
    await access.admit(authorization, 1)
    with pytest.raises(RateLimited):
        await access.admit(authorization, 1)
    await rewritten(command, rpm=3)
    ticket = await access.admit(authorization, 1)
    assert ticket.headers["x-ratelimit-remaining-requests"] == "1"
    await rewritten(command, rpm=None, experts=("law",))
    ticket = await access.admit(authorization, 1)
    assert ticket.headers == {}
    assert ticket.experts == frozenset({"law"})
    await rewritten(command, rpm=2)
    with pytest.raises(RateLimited):
        await access.admit(authorization, 1)


# --- limits --------------------------------------------------------------------------------------


async def test_headers_say_what_is_left(access: Access, store: Store) -> None:
    authorization = await key_of(store, rpm=3, tpm=100)
    await access.admit(authorization, 30)
    ticket = await access.admit(authorization, 25)
    assert ticket.headers == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "60.000s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "45",
        "x-ratelimit-reset-tokens": "60.000s",
    }


async def test_headers_are_of_the_limits_that_there_are(access: Access, store: Store) -> None:
    ticket = await access.admit(await key_of(store, tpm=100, concurrent=5), 30)
    assert {name.rsplit("-", 1)[1] for name in ticket.headers} == {"tokens"}


async def refusal(access: Access, authorization: str, tokens: int = 1) -> PolymathError:
    with pytest.raises((RateLimited, QuotaExceeded)) as caught:
        await access.admit(authorization, tokens)
    error = caught.value
    assert isinstance(error, PolymathError)
    assert error.status == 429
    return error


async def test_too_many_requests_are_told_when_to_come_back(
    access: Access, store: Store, stores: Stores
) -> None:
    authorization = await key_of(store, rpm=1)
    await access.admit(authorization, 1)
    error = await refusal(access, authorization)
    assert error.headers.pop("retry-after") == "60"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert 50 < float(error.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60
    assert error.body()["error"] == {
        "message": "Rate limit reached for key 'app' on requests per min (RPM): Limit 1. "
        "Please try again in 60s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    if isinstance(stores, MemoryStores):
        stores.clock.now += 58.5
        assert (await refusal(access, authorization)).headers["retry-after"] == "2"
        stores.clock.now += 1.25
        assert (await refusal(access, authorization)).headers["retry-after"] == "1"
        stores.clock.now += 0.25
        await access.admit(authorization, 1)


async def test_too_many_tokens_are_told_how_many(access: Access, store: Store) -> None:
    authorization = await key_of(store, tpm=100)
    await access.admit(authorization, 70)
    error = await refusal(access, authorization, 40)
    assert error.message == (
        "Rate limit reached for key 'app' on tokens per min (TPM): Limit 100, Used 70, "
        "Requested 40. Please try again in 60s."
    )
    assert (error.type, error.headers["retry-after"]) == ("tokens", "60")
    assert error.headers["x-ratelimit-remaining-tokens"] == "30"
    await access.admit(authorization, 30)


async def test_what_is_too_large_for_ever_is_not_asked_to_come_back(
    access: Access, store: Store
) -> None:
    authorization = await key_of(store, tpm=100, rpm=2)
    error = await refusal(access, authorization, 101)
    assert error.message.startswith(
        "Request too large for key 'app' on tokens per min (TPM): Limit 100, Requested 101."
    )
    assert error.type == "tokens"
    assert "retry-after" not in error.headers
    assert error.headers["x-ratelimit-remaining-tokens"] == "100"
    await access.admit(authorization, 50)
    await access.admit(authorization, 50)
    assert "too large" in (await refusal(access, authorization, 101)).message


async def test_too_many_at_a_time_may_come_back_soon(access: Access, store: Store) -> None:
    authorization = await key_of(store, concurrent=1)
    ticket = await access.admit(authorization, 1)
    error = await refusal(access, authorization)
    assert "on concurrent requests: Limit 1. Please try again in 1s." in error.message
    assert error.headers == {"retry-after": "1"}
    await settle(access, ticket)
    await access.admit(authorization, 1)


async def test_a_spent_budget_is_told_as_openai_does(access: Access, store: Store) -> None:
    authorization = await key_of(store, budget=Budget(dollars=0.5, period="month"))
    await settle(access, await access.admit(authorization, 1), Used("math", cost=499_999_999))
    await settle(access, await access.admit(authorization, 1), Used("math", cost=1))
    error = await refusal(access, authorization)
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert error.message.startswith("You exceeded your current quota")
    assert error.headers == {}


async def test_a_new_month_has_a_new_budget(
    access: Access, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorization = await key_of(store, budget=Budget(dollars=1, period="month"))
    last = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    monkeypatch.setattr(access_module, "now_utc", lambda: last)
    ticket = await access.admit(authorization, 1)
    await settle(access, ticket, Used("math", cost=10**9))
    await refusal(access, authorization)
    monkeypatch.setattr(access_module, "now_utc", lambda: last.replace(month=12, day=1))
    await access.admit(authorization, 1)
    assert await store.spent(ticket.owner, "2026-11") == 10**9
    assert await store.usage("2026-11-30") == {
        f"{ticket.owner}|math|requests": 1,
        f"{ticket.owner}|math|nanodollars": 10**9,
    }


async def test_a_refused_request_leaves_nothing_behind(access: Access, store: Store) -> None:
    authorization = await key_of(store, rpm=5, tpm=10, concurrent=1)
    ticket = await access.admit(authorization, 10)
    for _ in range(5):
        await refusal(access, authorization, 10)
    await settle(access, ticket)
    ticket = await access.admit(authorization, 10)
    assert ticket.headers["x-ratelimit-remaining-requests"] == "3"


async def test_replicas_let_in_exactly_what_a_key_may(
    make: MakeAccess, replicas: RedisStores
) -> None:
    servers = [make(replicas.open()) for _ in range(4)]
    authorization = await key_of(replicas.open(), rpm=37)
    asked = (servers[n % 4].admit(authorization, 1) for n in range(120))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, Ticket) for answer in answers) == 37
    assert sum(isinstance(answer, RateLimited) for answer in answers) == 83


# --- given back ----------------------------------------------------------------------------------


async def test_what_is_given_back_counts_as_it_was(access: Access, store: Store) -> None:
    authorization = await key_of(store, tpm=100, concurrent=1)
    ticket = await access.admit(authorization, 90)
    await settle(access, ticket, Used("math", 7, 5, 300))
    ticket = await access.admit(authorization, 50)
    assert ticket.headers["x-ratelimit-remaining-tokens"] == "38"
    assert await store.usage(f"{datetime.now(UTC):%Y-%m-%d}") == {
        f"{ticket.owner}|math|requests": 1,
        f"{ticket.owner}|math|prompt_tokens": 7,
        f"{ticket.owner}|math|completion_tokens": 5,
        f"{ticket.owner}|math|nanodollars": 300,
    }
    assert await store.spent(ticket.owner, "total") == 300


async def test_what_anybody_used_is_counted_too(access: Access, store: Store) -> None:
    await settle(access, await access.admit(None, 5), Used("law", 2, 3))
    usage = await store.usage(f"{datetime.now(UTC):%Y-%m-%d}")
    assert usage["anybody|law|requests"] == 1
    assert usage["anybody|law|completion_tokens"] == 3


async def test_closing_waits_for_what_was_given_back(make: MakeAccess, store: Store) -> None:
    access = make(store)
    authorization = await key_of(store)
    tickets = [await access.admit(authorization, 1) for _ in range(20)]
    for ticket in tickets:
        access.give_back(ticket, Used("math", cost=1))
    await access.close()
    await access.close()
    assert await store.spent(tickets[0].owner, "total") == 20


# --- leases --------------------------------------------------------------------------------------


async def test_a_request_that_runs_long_is_renewed_until_it_is_given_back(
    make: MakeAccess, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "LEASE_SECONDS", 0.1)
    access = make(stores.open(lease=1.5))
    authorization = await key_of(stores.open(), concurrent=1)
    ticket = await access.admit(authorization, 1)
    for _ in range(7):
        await stores.wait(0.25)
        await asyncio.sleep(0.04)
    await refusal(access, authorization)
    await settle(access, ticket)
    await access.admit(authorization, 1)


async def test_only_what_runs_is_renewed(
    access: Access, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "LEASE_SECONDS", 0.03)
    renewed: list[set[str]] = []

    async def spy(leases: Collection[tuple[str, str]]) -> None:
        renewed.append({lease for _, lease in leases})

    monkeypatch.setattr(store, "renew", spy)
    authorization = await key_of(store)
    first, second = [await access.admit(authorization, 1) for _ in range(2)]
    await until(lambda: renewed[-1:] == [{first.lease, second.lease}])
    access.give_back(first, NOTHING)
    await until(lambda: renewed[-1:] == [{second.lease}])
    access.give_back(second, NOTHING)
    await until(lambda: renewed[-1:] == [set()])


async def test_a_request_of_a_process_that_died_is_not_renewed(
    make: MakeAccess, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "LEASE_SECONDS", 0.1)
    store = stores.open(lease=0.3)
    dead = make(store)
    authorization = await key_of(store, concurrent=1)
    await dead.admit(authorization, 1)
    await dead.close()
    await stores.wait(0.35)
    await make(store).admit(authorization, 1)


# --- the store is gone ---------------------------------------------------------------------------


@pytest.fixture
async def frail(frail_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(frail_server.url)
    yield store
    await store.close()


@both_ways
async def test_closed_lets_nobody_in_without_the_store(
    make: MakeAccess, frail: RedisStore, frail_server: RedisServer, ask: Ask
) -> None:
    access = make(frail, "keys", "closed")
    authorization = await key_of(frail)
    await access.admit(authorization, 1)
    frail_server.kill()
    with pytest.raises(StoreUnavailable, match="Keys cannot be checked at present") as caught:
        await ask(access, authorization)
    assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "1"})


@both_ways
async def test_open_lets_known_keys_in_without_the_store(
    make: MakeAccess, frail: RedisStore, frail_server: RedisServer, ask: Ask
) -> None:
    """But no key it never saw, no wrong secret, and none that it knows to be revoked."""
    access = make(frail, "keys", "open")
    known = await key_of(frail, rpm=1)
    gone = await key_of(frail)
    await access.admit(known, 1)
    await access.admit(gone, 1)
    revoked = await KeyRing(frail).revoke(gone.split("-")[1])
    with pytest.raises(InvalidKey):
        await access.admit(gone, 1)
    frail_server.kill()
    for _ in range(3):
        record = await ask(access, known)
        assert isinstance(record, KeyRecord)
        assert record.id != revoked.id
    with pytest.raises(InvalidKey):
        await ask(access, spoilt(known))
    for header in (gone, f"Bearer {GOOD}"):
        with pytest.raises(StoreUnavailable):
            await ask(access, header)
    with pytest.raises(InvalidKey, match="You didn't provide"):
        await ask(access, None)


async def test_what_was_let_in_without_the_store_has_no_limits_to_tell(
    make: MakeAccess, frail: RedisStore, frail_server: RedisServer
) -> None:
    access = make(frail, "keys", "open")
    authorization = await key_of(frail, rpm=1, experts=("math",))
    await access.admit(authorization, 1)
    frail_server.kill()
    ticket = await access.admit(authorization, 1)
    assert ticket.headers == {}
    assert ticket.experts == frozenset({"math"})


@both_ways
@pytest.mark.parametrize("on_failure", ["open", "closed"])
async def test_who_starts_without_the_store_lets_nobody_in(
    make: MakeAccess, on_failure: str, ask: Ask
) -> None:
    """There may be keys: a gateway that cannot look is not open."""
    nowhere = RedisStore("unix:///nowhere/redis.sock")
    with pytest.raises(StoreUnavailable):
        await ask(make(nowhere, "keys", on_failure), None)
    assert await ask(make(nowhere, "none", on_failure), None) is None


async def test_usage_that_cannot_be_settled_is_told(
    make: MakeAccess,
    frail: RedisStore,
    frail_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    access = make(frail)
    ticket = await access.admit(await key_of(frail), 1)
    frail_server.kill()
    await settle(access, ticket)
    assert f"the usage of key {ticket.owner} is lost" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


async def test_renewing_survives_that_the_store_was_gone(
    make: MakeAccess,
    frail_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access_module, "LEASE_SECONDS", 0.03)
    monkeypatch.setattr("polymath.gateway.store.redis.REST_SECONDS", 0.01)
    renewed: list[object] = []
    store = RedisStore(frail_server.url)
    access = make(store)
    await access.admit(await key_of(store), 1)
    frail_server.kill()
    await asyncio.sleep(0.1)
    frail_server.start()
    real = store.renew

    async def spy(leases: Any) -> None:
        await real(leases)
        renewed.append(leases)

    monkeypatch.setattr(store, "renew", spy)
    await until(lambda: bool(renewed))
    await access.close()
    await store.close()


async def test_a_damaged_file_of_keys_lets_in_whom_it_may(make: MakeAccess, tmp_path: Any) -> None:
    stores = MemoryStores(tmp_path)
    opened, closed = (make(stores.open(), "keys", how) for how in ("open", "closed"))
    authorization = await key_of(stores.open())
    for access in (opened, closed):
        await access.admit(authorization, 1)
    (tmp_path / "keys.json").write_bytes(orjson.dumps([]))
    assert (await opened.admit(authorization, 1)).key is not None
    with pytest.raises(StoreUnavailable):
        await closed.admit(authorization, 1)
