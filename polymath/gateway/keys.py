"""API keys: what one may do, as records of which only a hash of the secret is kept.

A key is `pm-ID-SECRET`. The secret has 256 random bits, so that a plain SHA-256 of it cannot be
reversed by trying; it is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymath.errors import DataError, InvalidKey, StoreUnavailable
from polymath.gateway.store import Limits, Store
from polymath.gateway.store.protocol import KEYS

__all__ = ["Budget", "KeyRecord", "KeyRing", "OffTopic", "read_budget", "read_record", "split_key"]

OffTopic = Literal["refuse", "fallback", "answer"]
Period = Literal["day", "month", "total"]
Count = Annotated[int, Field(ge=0)]

FORM = re.compile(r"pm-(?P<id>[0-9a-f]{12})-(?P<secret>[A-Za-z0-9_-]{43})")
BUDGET = re.compile(r"(?P<dollars>\d+(\.\d+)?)(/(?P<period>day|month|total))?")
ID_BYTES = 6
SECRET_BYTES = 32
NANODOLLARS = 1_000_000_000
KNOWN_RECORDS = 10_000


class Budget(BaseModel):
    """Dollars that a key may spend in each period of the calendar (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dollars: float = Field(ge=0, allow_inf_nan=False)
    period: Period = "total"

    def label(self, now: datetime) -> str:
        """The name of the period that is running."""
        return {"day": f"{now:%Y-%m-%d}", "month": f"{now:%Y-%m}", "total": "total"}[self.period]


class KeyRecord(BaseModel):
    """What is kept of a key.

    Attributes:
        experts: it may ask; None is all of them.
        rpm, tpm: requests and tokens a minute.
        concurrent: requests at a time.
        allowed_domains, off_topic: in place of the gateway's topic guard.
        keep_prompts: feedback is stored with the prompt that it is about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str = Field(min_length=1, max_length=128)
    secret_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: int
    revoked: int | None = None
    experts: tuple[str, ...] | None = None
    rpm: Count | None = None
    tpm: Count | None = None
    concurrent: Count | None = None
    budget: Budget | None = None
    allowed_domains: tuple[str, ...] | None = None
    off_topic: OffTopic | None = None
    keep_prompts: bool = False

    @property
    def allowed(self) -> frozenset[str] | None:
        """Experts that may be asked; None is all."""
        return None if self.experts is None else frozenset(self.experts)

    def opens_with(self, secret: str) -> bool:
        """Whether this is the secret of the key, compared in constant time."""
        return hmac.compare_digest(_sha256(secret), self.secret_sha256)

    def limits(self, now: datetime) -> Limits:
        """What the store is to check."""
        budget = self.budget
        return Limits(
            self.rpm,
            self.tpm,
            self.concurrent,
            None if budget is None else round(budget.dollars * NANODOLLARS),
            "total" if budget is None else budget.label(now),
        )

    def about(self) -> dict[str, object]:
        """The record without the hash, to be shown."""
        return self.model_dump(mode="json", exclude={"secret_sha256"}, exclude_none=True)


class KeyRing:
    """Keys in a store: made, found, revoked."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, name: str, **rights: object) -> tuple[str, KeyRecord]:
        """A new key, which is shown this once, and its record.

        Args:
            rights: fields of `KeyRecord`.
        """
        identity, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        values = {
            **rights,
            "id": identity,
            "name": name,
            "secret_sha256": _sha256(secret),
            "created": int(time.time()),
        }
        record = KeyRecord.model_validate(values)
        await self._write(record)
        return f"pm-{identity}-{secret}", record

    async def all(self) -> list[KeyRecord]:
        """Every key that was ever made, the oldest first."""
        records = [read_record(value) for value in (await self._store.read(KEYS)).values()]
        return sorted(records, key=lambda record: (record.created, record.id))

    async def any(self) -> bool:
        """Whether keys are in use, even if all of them are revoked."""
        return bool(await self._store.read(KEYS))

    async def revoke(self, key: str) -> KeyRecord:
        """Make a key useless at once, by its id or name; its record is kept.

        Raises:
            DataError: there is none, or there are several of this name.
        """
        found = [record for record in await self.all() if key == record.id]
        found = found or [r for r in await self.all() if key == r.name and r.revoked is None]
        if len(found) != 1:
            reason = f"{len(found)} keys have this name; give an id" if found else "there is none"
            raise DataError(f"key {key!r}: {reason} (see `polymath keys list`)")
        (record,) = found
        revoked = record.model_copy(update={"revoked": record.revoked or int(time.time())})
        await self._write(revoked)
        return revoked

    async def _write(self, record: KeyRecord) -> None:
        value = orjson.dumps(record.model_dump(mode="json", exclude_none=True))
        await self._store.write(KEYS, record.id, value)


@lru_cache(KNOWN_RECORDS)
def read_record(value: bytes) -> KeyRecord:
    """A record as it is stored.

    Raises:
        StoreUnavailable: it is damaged, or of a later version.
    """
    try:
        return KeyRecord.model_validate_json(value)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "all of it"
        raise StoreUnavailable(f"A key record is damaged: {where}: {problem['msg']}.") from None


def split_key(key: str) -> tuple[str, str]:
    """The id and the secret of a key.

    Raises:
        InvalidKey: it has another form.
    """
    match = FORM.fullmatch(key)
    if match is None:
        raise incorrect(key)
    return match["id"], match["secret"]


def incorrect(key: str) -> InvalidKey:
    """The error for a key that opens nothing; only its ends are shown."""
    shown = f"{key[:6]}***{key[-4:]}" if len(key) > 20 else "***"
    shown = shown if shown.isascii() and shown.isprintable() else "***"
    return InvalidKey(f"Incorrect API key provided: {shown}.")


def read_budget(text: str) -> Budget:
    """`5.00/month`, `0.5/day` or `20` (for good).

    Raises:
        DataError: it is none of these.
    """
    match = BUDGET.fullmatch(text.strip())
    if match is None or not math.isfinite(float(match["dollars"])):
        raise DataError(f"budget {text!r}: write dollars and a period, as 5.00/month or 0.5/day")
    return Budget.model_validate(
        {"dollars": float(match["dollars"]), "period": match["period"] or "total"}
    )


def now_utc() -> datetime:
    """The present time, for budget periods."""
    return datetime.now(UTC)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
