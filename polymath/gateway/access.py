"""Who asks, and whether they may ask now: keys, limits and what a request used in the end."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from polymath.errors import InvalidKey, QuotaExceeded, RateLimited, StoreUnavailable
from polymath.gateway.keys import KeyRecord, KeyRing, incorrect, now_utc, read_record, split_key
from polymath.gateway.store import Admission, Limits, Settlement, Store, Verdict
from polymath.gateway.store.protocol import KEYS, LEASE_SECONDS

__all__ = ["ANYBODY", "Access", "Auth", "OnFailure", "Ticket", "Used"]

logger = logging.getLogger(__name__)

Auth = Literal["keys", "none"]
OnFailure = Literal["open", "closed"]

ANYBODY = "anybody"
"""In whose name usage is counted where no key is asked for."""
RENEWALS = 3
"""In the time that a lease lasts."""
NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header "
    "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
)


@dataclass(frozen=True, slots=True)
class Used:
    """What a request used: tokens of the prompt and of the answer, and nanodollars."""

    expert: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that was let in; to be given back, however it ends.

    Attributes:
        key: None where no key is asked for, or where limits could not be checked.
        headers: what is left of the limits, in OpenAI's words.
    """

    key: KeyRecord | None
    lease: str
    headers: Mapping[str, str]

    @property
    def experts(self) -> frozenset[str] | None:
        """Those that may be asked; None is all."""
        return None if self.key is None else self.key.allowed

    @property
    def owner(self) -> str:
        """In whose name usage is counted and answers are kept."""
        return ANYBODY if self.key is None else self.key.id


class Access:
    """Lets requests in.

    Args:
        auth: `none` asks for no keys; `keys` does as soon as there are any.
        on_failure: `open` lets known keys in without limits while the store cannot be reached.
    """

    def __init__(self, store: Store, auth: Auth = "keys", on_failure: OnFailure = "closed") -> None:
        self._store = store
        self._ring = KeyRing(store)
        self._auth = auth
        self._on_failure = on_failure
        self._known: dict[str, bytes] = {}
        self._keys_seen = False
        self._running: set[tuple[str, str]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def authenticate(self, authorization: str | None) -> KeyRecord | None:
        """The key of a request that costs nothing; None where no key is asked for.

        Raises:
            InvalidKey: there is none, or it opens nothing.
            StoreUnavailable: it cannot be checked.
        """
        if await self._open():
            return None
        identity, secret = split_key(_bearer(authorization))
        try:
            record = await self._store.find(KEYS, identity)
        except StoreUnavailable:
            record = self._remembered(identity)
        return self._checked(record, identity, secret)

    async def admit(self, authorization: str | None, tokens: int) -> Ticket:
        """Let a request in.

        Args:
            tokens: an estimate of all that it may use.
        Raises:
            InvalidKey, StoreUnavailable: as `authenticate`.
            RateLimited, QuotaExceeded: the key has used what it may.
        """
        lease = uuid.uuid4().hex
        if await self._open():
            return Ticket(None, lease, {})
        identity, secret = split_key(_bearer(authorization))
        try:
            record = self._known.get(identity) or await self._store.find(KEYS, identity)
            while True:
                key = self._checked(record, identity, secret)
                limits = key.limits(now_utc())
                assert record is not None
                asking = Admission(identity, record, limits, tokens, lease)
                verdict = await self._store.admit(asking)
                if verdict.record == record:
                    break
                record = verdict.record
        except StoreUnavailable:
            key = self._checked(self._remembered(identity), identity, secret)
            return Ticket(key, "", {})
        self._known[identity] = record
        if verdict.refused is not None:
            raise _refusal(key, limits, verdict, tokens)
        self._hold(identity, lease)
        return Ticket(key, lease, _left(limits, verdict))

    def give_back(self, ticket: Ticket, used: Used) -> None:
        """Settle what a request used; happens in the background."""
        self._running.discard((ticket.owner, ticket.lease))
        task = asyncio.get_running_loop().create_task(self._settle(ticket, used))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def settled(self) -> None:
        """Wait until everything that was given back is settled."""
        while self._settling:
            await asyncio.wait(self._settling)

    async def close(self) -> None:
        """Settle what is open."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self.settled()

    async def _open(self) -> bool:
        """Whether no key is asked for."""
        if self._auth == "none":
            return True
        if not self._keys_seen:  # keys never vanish: revoked ones are kept
            self._keys_seen = await self._ring.any()
        return not self._keys_seen

    def _remembered(self, identity: str) -> bytes:
        """The record of a key while the store is gone.

        Raises:
            StoreUnavailable: nobody is let in without the store, or the key was not seen before.
        """
        if self._on_failure == "open" and identity in self._known:
            return self._known[identity]
        raise StoreUnavailable("Keys cannot be checked at present; retry in a few seconds.")

    def _checked(self, record: bytes | None, identity: str, secret: str) -> KeyRecord:
        key = None if record is None else read_record(record)
        if key is None or not key.opens_with(secret):
            raise incorrect(f"pm-{identity}-{secret}")
        if key.revoked is not None:
            self._known.pop(identity, None)
            raise InvalidKey("This API key has been revoked.")
        return key

    def _hold(self, identity: str, lease: str) -> None:
        self._running.add((identity, lease))
        if self._renewing is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / RENEWALS)
            try:
                await self._store.renew(tuple(self._running))
            except StoreUnavailable as error:
                logger.debug("leases are not renewed: %s", error.message)

    async def _settle(self, ticket: Ticket, used: Used) -> None:
        now = now_utc()
        owner, key = ticket.owner, ticket.key
        counts = {
            "requests": 1,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "nanodollars": used.cost,
        }
        settlement = Settlement(
            owner,
            ticket.lease,
            used.prompt_tokens + used.completion_tokens,
            used.cost,
            "total" if key is None else key.limits(now).period,
            f"{now:%Y-%m-%d}",
            {f"{owner}|{used.expert}|{name}": count for name, count in counts.items() if count},
        )
        try:
            await self._store.settle(settlement)
        except StoreUnavailable as error:
            logger.warning("the usage of key %s is lost: %s", owner, error.message)


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise InvalidKey(NO_KEY)
    return key.strip()


def _left(limits: Limits, verdict: Verdict) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*` headers, of the limits that there are."""
    headers: dict[str, str] = {}
    for name, limit, left, reset in (
        ("requests", limits.requests, verdict.requests_left, verdict.requests_reset),
        ("tokens", limits.tokens, verdict.tokens_left, verdict.tokens_reset),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            headers[f"x-ratelimit-reset-{name}"] = f"{reset:.3f}s"
    return headers


def _refusal(
    key: KeyRecord, limits: Limits, verdict: Verdict, tokens: int
) -> RateLimited | QuotaExceeded:
    if verdict.refused == "budget":
        return QuotaExceeded(
            "You exceeded your current quota, please check your plan and billing details."
        )
    left = _left(limits, verdict)
    if limits.tokens is not None and tokens > limits.tokens:
        return RateLimited(
            f"Request too large for key {key.name!r} on tokens per min (TPM): Limit "
            f"{limits.tokens}, Requested {tokens}. The input or output tokens must be reduced in "
            "order to run successfully.",
            type="tokens",
            limits=left,
        )
    if verdict.refused == "concurrent":
        limited = f"concurrent requests: Limit {limits.concurrent}"
    elif verdict.refused == "requests":
        limited = f"requests per min (RPM): Limit {limits.requests}"
    else:
        used = (limits.tokens or 0) - (verdict.tokens_left or 0)
        limited = f"tokens per min (TPM): Limit {limits.tokens}, Used {used}, Requested {tokens}"
    seconds = max(1, math.ceil(verdict.retry_after))
    return RateLimited(
        f"Rate limit reached for key {key.name!r} on {limited}. Please try again in {seconds}s.",
        type="tokens" if verdict.refused == "tokens" else "requests",
        retry_after=seconds,
        limits=left,
    )
