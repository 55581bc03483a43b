"""What a store promises, whether it is the memory of one process or a Redis that replicas share.

Limits are sliding windows over the last `WINDOW_SECONDS`: a request counts from the moment it was
admitted, its tokens first as an estimate and, when it is settled, as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "KEYS",
    "LEASE_SECONDS",
    "WINDOW_SECONDS",
    "Admission",
    "Limits",
    "Refused",
    "Settlement",
    "Store",
    "Verdict",
]

WINDOW_SECONDS = 60.0
LEASE_SECONDS = 60.0
"""A request counts as running for so long, unless it is renewed: its process may have died."""

KEYS = "keys"
"""The map of the key records, which every admission looks into."""

Refused = Literal["requests", "tokens", "concurrent", "budget"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None is no limit.

    Attributes:
        requests: in a window.
        tokens: of prompts and answers, in a window.
        concurrent: requests at a time.
        budget: nanodollars in one `period`.
        period: name of the running budget period, as `2026-11`.
    """

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    budget: int | None = None
    period: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that asks to be let in.

    Attributes:
        key: id of the key.
        record: the key's record, as the asking process knows it.
        tokens: an estimate of all that it may use.
        lease: a name of its own.
    """

    key: str
    record: bytes
    limits: Limits
    tokens: int
    lease: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request was let in, and what is left.

    Attributes:
        record: the key's record as it is now; unless it is that of the admission, nothing was done.
        refused: what ran out.
        requests_left, tokens_left: in this window; None where there is no limit.
        requests_reset, tokens_reset: seconds until the window is empty.
        retry_after: seconds until the window has room for the same request, if others do not come
            first; 0 if it never has, or something else ran out.
    """

    record: bytes | None
    refused: Refused | None = None
    requests_left: int | None = None
    tokens_left: int | None = None
    requests_reset: float = 0.0
    tokens_reset: float = 0.0
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a request used in the end.

    Attributes:
        tokens: of prompt and answer.
        cost: nanodollars, spent in `period`.
        counts: what else is to be added up under `usage:DAY`, by name.
    """

    key: str
    lease: str
    tokens: int
    cost: int
    period: str
    day: str
    counts: Mapping[str, int]


class Store(Protocol):
    """Maps, shelves, logs and limits; every method is atomic.

    Each raises StoreUnavailable if the store cannot be reached or written to.
    """

    async def find(self, name: str, field: str) -> bytes | None:
        """The value of a field of a map."""
        ...

    async def read(self, name: str) -> dict[str, bytes]:
        """A whole map."""
        ...

    async def write(self, name: str, field: str, value: bytes) -> None:
        """Set a field of a map."""
        ...

    async def erase(self, name: str, field: str) -> bool:
        """Take a field out of a map; whether it was there."""
        ...

    async def get(self, shelf: str, name: str) -> bytes | None:
        """A value that was put, unless its time is over or it had to make room."""
        ...

    async def put(self, shelf: str, name: str, value: bytes, ttl: float, most: int) -> None:
        """Keep a value for `ttl` seconds; the oldest go when a shelf has more than `most`."""
        ...

    async def append(self, log: str, entry: bytes, most: int) -> None:
        """Add an entry; the oldest go when a log has more than `most`."""
        ...

    async def recent(self, log: str, most: int) -> list[bytes]:
        """The last entries, the newest first."""
        ...

    async def admit(self, admission: Admission) -> Verdict:
        """Let a request in if its key is what it was and its limits allow it."""
        ...

    async def settle(self, settlement: Settlement) -> None:
        """Put what a request used in place of its estimate, and end its lease."""
        ...

    async def renew(self, leases: Collection[tuple[str, str]]) -> None:
        """Make the leases (key, lease) of running requests last."""
        ...

    async def usage(self, day: str) -> dict[str, int]:
        """What was added up on a day (UTC, ISO 8601)."""
        ...

    async def spent(self, key: str, period: str) -> int:
        """Nanodollars that a key has spent in a budget period."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
