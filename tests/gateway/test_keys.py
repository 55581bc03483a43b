"""Keys: shown once, kept as hashes, found and compared without a hint, and never unmade."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from polymath.errors import DataError, InvalidKey, StoreUnavailable
from polymath.gateway import keys
from polymath.gateway.keys import (
    Budget,
    KeyRecord,
    KeyRing,
    incorrect,
    read_budget,
    read_record,
    split_key,
)
from polymath.gateway.store import Limits, Store
from polymath.gateway.store.protocol import KEYS
from tests.gateway.stores import MemoryStores, Stores

NOW = datetime(2026, 11, 28, 23, 59, tzinfo=UTC)
GOOD = "pm-0123456789ab-" + "x" * 43
HASH = "0" * 64


@pytest.fixture
def store(stores: Stores) -> Store:
    return stores.open()


@pytest.fixture
def ring(store: Store) -> KeyRing:
    return KeyRing(store)


def record(**values: Any) -> KeyRecord:
    given = {"id": "a", "name": "app", "secret_sha256": HASH, "created": 1, **values}
    return KeyRecord.model_validate(given)


# --- made and found ------------------------------------------------------------------------------


async def test_a_key_opens_its_record(ring: KeyRing, store: Store) -> None:
    key, made = await ring.create("app", rpm=60)
    identity, secret = split_key(key)
    assert identity == made.id
    kept = await store.find(KEYS, identity)
    assert kept is not None
    assert read_record(kept) == made
    assert made.opens_with(secret)
    assert not made.opens_with(secret[:-1] + ("a" if secret[-1] != "a" else "b"))
    assert not made.opens_with("")


async def test_a_key_has_256_random_bits_and_no_two_are_alike(ring: KeyRing) -> None:
    made = [await ring.create("app") for _ in range(50)]
    assert all(re.fullmatch(r"pm-[0-9a-f]{12}-[A-Za-z0-9_-]{43}", key) for key, _ in made)
    assert len({split_key(key)[1] for key, _ in made}) == 50
    assert len({one.id for _, one in made}) == 50
    assert len(await ring.all()) == 50


async def test_the_secret_is_kept_and_shown_nowhere(ring: KeyRing, stores: Stores) -> None:
    key, made = await ring.create("app", experts=("math",), budget=read_budget("5/month"))
    _, secret = split_key(key)
    revoked = await ring.revoke("app")
    kept = await stores.open().read(KEYS)
    shown = [made.about(), revoked.about(), *(one.about() for one in await ring.all())]
    for text in (*map(bytes, kept.values()), orjson.dumps(shown), repr(revoked).encode()):
        assert secret.encode() not in text
    assert made.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert all("secret_sha256" not in one for one in shown)
    if isinstance(stores, MemoryStores):
        assert all(secret.encode() not in p.read_bytes() for p in stores.folder.iterdir())


async def test_rights_come_back_as_they_were_given(ring: KeyRing) -> None:
    rights = {
        "experts": ("math", "health"),
        "rpm": 60,
        "tpm": 20_000,
        "concurrent": 4,
        "budget": Budget(dollars=5, period="month"),
        "allowed_domains": ("math",),
        "off_topic": "fallback",
        "keep_prompts": True,
    }
    _, made = await ring.create("Anwendung ü", **rights)
    (found,) = await ring.all()
    assert found == made
    assert {name: getattr(found, name) for name in rights} == rights
    assert found.about()["name"] == "Anwendung ü"


async def test_what_a_key_may_not_be_given_is_refused(ring: KeyRing) -> None:
    for name, rights in (
        ("", {}),
        ("x" * 129, {}),
        ("app", {"rpm": -1}),
        ("app", {"tpm": "many"}),
        ("app", {"requests": 1}),
        ("app", {"off_topic": "shout"}),
        ("app", {"budget": {"dollars": -1}}),
        ("app", {"budget": {"dollars": float("inf")}}),
        ("app", {"budget": {"dollars": 1, "period": "year"}}),
    ):
        with pytest.raises(ValidationError):
            await ring.create(name, **rights)
    assert not await ring.any()


async def test_rights_cannot_choose_who_a_key_is(ring: KeyRing) -> None:
    chosen = {"id": "chosen", "secret_sha256": HASH, "created": 0}
    key, made = await ring.create("app", **chosen)
    assert made.id == split_key(key)[0] != "chosen"
    assert made.opens_with(split_key(key)[1])


async def test_keys_are_listed_the_oldest_first(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, created in (("second", 2000.5), ("third", 3000.0), ("first", 1000.9)):
        monkeypatch.setattr(time, "time", lambda created=created: created)
        await ring.create(name)
    listed = await ring.all()
    assert [one.name for one in listed] == ["first", "second", "third"]
    assert [one.created for one in listed] == [1000, 2000, 3000]


async def test_each_process_sees_what_another_makes(stores: Stores) -> None:
    server, command = KeyRing(stores.open()), KeyRing(stores.open())
    assert not await server.any()
    await command.create("app")
    assert await server.any()
    await server.revoke("app")
    (found,) = await command.all()
    assert found.revoked is not None


# --- revoked -------------------------------------------------------------------------------------


async def test_a_revoked_key_stays_as_a_tombstone(ring: KeyRing) -> None:
    _, made = await ring.create("app")
    revoked = await ring.revoke(made.id)
    assert revoked.revoked is not None
    assert await ring.all() == [revoked]
    assert revoked == made.model_copy(update={"revoked": revoked.revoked})
    assert await ring.any()


async def test_a_key_revoked_again_was_revoked_the_first_time(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = await ring.create("app")
    first = await ring.revoke(made.id)
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert await ring.revoke(made.id) == first


async def test_a_name_is_that_of_the_key_in_use(ring: KeyRing) -> None:
    """A key may be replaced by one of the same name."""
    _, old = await ring.create("app")
    await ring.revoke("app")
    _, new = await ring.create("app")
    assert (await ring.revoke("app")).id == new.id
    with pytest.raises(DataError, match="there is none"):
        await ring.revoke("app")
    assert {one.id for one in await ring.all()} == {old.id, new.id}


async def test_of_several_keys_of_a_name_none_is_revoked(ring: KeyRing) -> None:
    made = [(await ring.create("app"))[1] for _ in range(2)]
    with pytest.raises(DataError, match=r"key 'app': 2 keys have this name; give an id"):
        await ring.revoke("app")
    assert all(one.revoked is None for one in await ring.all())
    await ring.revoke(made[1].id)
    assert (await ring.revoke("app")).id == made[0].id


async def test_an_id_comes_before_a_name(ring: KeyRing) -> None:
    _, first = await ring.create("app")
    await ring.create(first.id)
    assert (await ring.revoke(first.id)).id == first.id


@pytest.mark.parametrize("key", ["", "nobody", "0123456789ab", GOOD])
async def test_what_is_no_key_cannot_be_revoked(ring: KeyRing, key: str) -> None:
    await ring.create("app")
    with pytest.raises(DataError, match=r"there is none \(see `polymath keys list`\)"):
        await ring.revoke(key)


# --- compared ------------------------------------------------------------------------------------


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of one length, by the function made for it, whatever the secret."""
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def spy(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    kept = record(secret_sha256=hashlib.sha256(b"secret").hexdigest())
    assert [kept.opens_with(secret) for secret in ("secret", "secreT", "")] == [True, False, False]
    assert [other for _, other in compared] == [kept.secret_sha256] * 3
    assert {len(one) for one, _ in compared} == {64}


# --- malformed -----------------------------------------------------------------------------------

MALFORMED = [
    "",
    " ",
    "x",
    "pm-",
    "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789",
    GOOD[:-1],
    GOOD + "x",
    GOOD + "\n",
    " " + GOOD,
    GOOD.upper(),
    GOOD.replace("0", "g"),
    GOOD.replace("0", "\u0660"),
    GOOD.replace("x", "ü"),
    GOOD.replace("x", "\x00"),
    GOOD.replace("x", "="),
    "pm-" * 100_000,
    "ü" * 100,
    "\ud800" * 30,
    "<script>alert(1)</script>",
    "a\r\nset-cookie: x=y; and so on for a while",
]


@pytest.mark.parametrize("key", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_key_is_an_incorrect_one(key: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        split_key(key)
    error = caught.value
    assert (error.status, error.code, error.type) == (
        401,
        "invalid_api_key",
        "invalid_request_error",
    )
    assert len(error.message) < 60
    assert error.message.isprintable()
    assert error.message.isascii()
    assert error.message.startswith("Incorrect API key provided: ")


@given(st.text(max_size=120))
def test_of_no_text_more_than_its_ends_are_shown(key: str) -> None:
    message = incorrect(key).message
    shown = message.removeprefix("Incorrect API key provided: ").removesuffix(".")
    assert shown == "***" or shown == f"{key[:6]}***{key[-4:]}"
    assert len(shown) <= 13
    assert shown == "***" or len(key) > 20


@given(st.from_regex(keys.FORM, fullmatch=True))
def test_a_well_formed_key_is_its_parts(key: str) -> None:
    identity, secret = split_key(key)
    assert key == f"pm-{identity}-{secret}"
    assert secret not in incorrect(key).message


# --- damaged records -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"id":"a","name":"app","secret_sha256":"\xc3\xbc","created":1}',
        orjson.dumps({**record().model_dump(mode="json"), "later_field": 1}),
    ],
)
async def test_a_damaged_record_is_told_without_what_it_holds(
    ring: KeyRing, store: Store, value: bytes
) -> None:
    with pytest.raises(StoreUnavailable, match="A key record is damaged") as caught:
        read_record(value)
    assert HASH not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_record_that_is_kept_reads_as_it_was() -> None:
    one = record(budget=Budget(dollars=0.1, period="day"), experts=["math"])
    assert read_record(one.model_dump_json(exclude_none=True).encode()) == one


# --- limits --------------------------------------------------------------------------------------


def test_a_record_without_limits_has_none() -> None:
    assert record().limits(NOW) == Limits(period="total")


@pytest.mark.parametrize(
    ("text", "nanodollars", "period"),
    [
        ("5.00/month", 5_000_000_000, "2026-11"),
        ("0.5/day", 500_000_000, "2026-11-28"),
        ("20", 20_000_000_000, "total"),
        ("20/total", 20_000_000_000, "total"),
        (" 0/day ", 0, "2026-11-28"),
        ("0.000000001", 1, "total"),
        ("0.1", 100_000_000, "total"),
        ("1000000", 10**15, "total"),
    ],
)
def test_a_budget_is_dollars_in_a_period(text: str, nanodollars: int, period: str) -> None:
    limits = record(rpm=1, tpm=2, concurrent=3, budget=read_budget(text)).limits(NOW)
    assert limits == Limits(1, 2, 3, nanodollars, period)


NO_BUDGETS = [
    "",
    "five",
    "-1",
    "+1",
    "1e3",
    "1.",
    ".5",
    "5/",
    "5/year",
    "5 / day",
    "$5",
    "nan",
    "inf",
]


@pytest.mark.parametrize("text", [*NO_BUDGETS, "9" * 400])
def test_what_is_no_budget_is_told_what_one_is(text: str) -> None:
    with pytest.raises(DataError, match=r"write dollars and a period, as 5\.00/month or 0\.5/day"):
        read_budget(text)


def test_periods_follow_the_calendar() -> None:
    new_year = datetime(2027, 1, 1, tzinfo=UTC)
    labels = {
        period: Budget.model_validate({"dollars": 1, "period": period}).label(new_year)
        for period in ("day", "month", "total")
    }
    assert labels == {"day": "2027-01-01", "month": "2027-01", "total": "total"}
