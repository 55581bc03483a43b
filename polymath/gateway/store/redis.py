"""The shared store: a Redis server, whose clock and scripts make the limits exact for all replicas.

The windows follow the sorted-set pattern of Redis' own documentation, with the tokens of each
request beside it and their running sum, so that an admission costs what has left the window.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from polymath.errors import ConfigError, StoreUnavailable
from polymath.gateway.store.protocol import (
    KEYS,
    LEASE_SECONDS,
    WINDOW_SECONDS,
    Admission,
    Refused,
    Settlement,
    Verdict,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisStore"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PREFIX = "polymath"
TIMEOUT_SECONDS = 2.0
"""A Redis that answers later counts as gone."""
CONNECTIONS = 32
"""More requests than these wait for each other: Redis does one thing at a time anyway."""
REST_SECONDS = 0.5
"""After a failure it is not asked for so long, so that requests do not queue up for time-outs."""
REPEAT_SECONDS = 60.0
"""Until the same refusal is logged again."""
SPENT_SECONDS = 400 * 86400
USAGE_SECONDS = 100 * 86400
MICROSECONDS = 1e6
MOST_TOKENS = 2**40
"""No window has room for as many; their sum must stay an integer for Redis."""
NONE = -1
"""No limit, for the scripts."""


class RedisStore:
    """A `Store` that replicas share.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        window: seconds that limits look back on.
        prefix: of the names of all its keys.
    Raises:
        ConfigError: the URL cannot be read, or redis-py is not installed.
    """

    def __init__(
        self,
        url: str,
        window: float = WINDOW_SECONDS,
        lease: float = LEASE_SECONDS,
        prefix: str = PREFIX,
    ) -> None:
        self._redis = _client(url)
        self._window = round(window * MICROSECONDS)
        self._lease = round(lease * MICROSECONDS)
        self._prefix = prefix
        self._admit = self._redis.register_script(_script("admit"))
        self._settle = self._redis.register_script(_script("settle"))
        self._put = self._redis.register_script(_script("put"))
        self._rests_until = 0.0
        self._gone = False
        self._silent_until: dict[str, float] = {}

    async def find(self, name: str, field: str) -> bytes | None:
        value: bytes | None = await self._ask(lambda: self._redis.hget(self._key(name), field))
        return value

    async def read(self, name: str) -> dict[str, bytes]:
        values = await self._ask(lambda: self._redis.hgetall(self._key(name)))
        return {field.decode(): value for field, value in values.items()}

    async def write(self, name: str, field: str, value: bytes) -> None:
        await self._ask(lambda: self._redis.hset(self._key(name), field, value))

    async def erase(self, name: str, field: str) -> bool:
        return bool(await self._ask(lambda: self._redis.hdel(self._key(name), field)))

    async def get(self, shelf: str, name: str) -> bytes | None:
        value: bytes | None = await self._ask(
            lambda: self._redis.get(self._key("shelf", shelf, name))
        )
        return value

    async def put(self, shelf: str, name: str, value: bytes, ttl: float, most: int) -> None:
        keys = [self._key("shelf", shelf, name), self._key("shelves", shelf)]
        arguments: list[bytes | int] = [value, max(1, round(ttl * 1000)), most]
        await self._ask(lambda: self._put(keys=keys, args=arguments))

    async def append(self, log: str, entry: bytes, most: int) -> None:
        key = self._key("log", log)

        async def appended() -> None:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.lpush(key, entry)
                pipe.ltrim(key, 0, most - 1)
                await pipe.execute()

        await self._ask(appended)

    async def recent(self, log: str, most: int) -> list[bytes]:
        entries: list[bytes] = await self._ask(
            lambda: self._redis.lrange(self._key("log", log), 0, most - 1)
        )
        return entries

    async def admit(self, admission: Admission) -> Verdict:
        limits, key = admission.limits, admission.key
        names = [
            self._key(KEYS),
            self._key("window", key),
            self._key("held", key),
            self._key("leases", key),
            self._key("spent", key, limits.period),
        ]
        arguments: list[str | bytes | int] = [
            key,
            admission.record,
            self._window,
            self._lease,
            admission.lease,
            min(admission.tokens, MOST_TOKENS),
            *(
                NONE if limit is None else limit
                for limit in (limits.requests, limits.tokens, limits.concurrent, limits.budget)
            ),
        ]
        answer = await self._ask(lambda: self._admit(keys=names, args=arguments))
        if len(answer) == 1:
            return Verdict(answer[0] or None)
        refused, requests, tokens, reset, wait = (int(value) for value in answer)
        return Verdict(
            admission.record,
            _refusal(refused),
            None if limits.requests is None else max(0, limits.requests - requests),
            None if limits.tokens is None else max(0, limits.tokens - tokens),
            reset / MICROSECONDS,
            reset / MICROSECONDS,
            wait / MICROSECONDS,
        )

    async def settle(self, settlement: Settlement) -> None:
        names = [
            self._key("held", settlement.key),
            self._key("leases", settlement.key),
            self._key("spent", settlement.key, settlement.period),
            self._key("usage", settlement.day),
        ]
        counts = [part for pair in settlement.counts.items() for part in pair]
        lifetimes = [SPENT_SECONDS, USAGE_SECONDS]
        arguments: list[str | int] = [
            settlement.lease,
            settlement.tokens,
            settlement.cost,
            *lifetimes,
            *counts,
        ]
        await self._ask(lambda: self._settle(keys=names, args=arguments))

    async def renew(self, leases: Collection[tuple[str, str]]) -> None:
        if not leases:
            return

        async def renewed() -> None:
            seconds, micros = await self._redis.time()
            end = int(seconds) * round(MICROSECONDS) + int(micros) + self._lease
            async with self._redis.pipeline(transaction=False) as pipe:
                for key, lease in leases:
                    pipe.zadd(self._key("leases", key), {lease: end}, xx=True)
                    pipe.pexpire(self._key("leases", key), self._lease // 1000 + 1000)
                await pipe.execute()

        await self._ask(renewed)

    async def usage(self, day: str) -> dict[str, int]:
        counts = await self._ask(lambda: self._redis.hgetall(self._key("usage", day)))
        return {name.decode(): int(count) for name, count in counts.items()}

    async def spent(self, key: str, period: str) -> int:
        return int(await self._ask(lambda: self._redis.get(self._key("spent", key, period))) or 0)

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        from redis.exceptions import RedisError, ResponseError

        if time.monotonic() < self._rests_until:
            raise StoreUnavailable("Redis cannot be reached at present.")
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                answer = await call()
        except ResponseError as error:  # it is there: other calls may do, and need no rest
            self._refused(str(error))
            raise StoreUnavailable("Redis refuses to do this at present.") from error
        except (RedisError, OSError, TimeoutError) as error:
            self._rests_until = time.monotonic() + REST_SECONDS
            if not self._gone:
                logger.error("Redis is gone: %s", str(error) or "it does not answer")
            self._gone = True
            raise StoreUnavailable("Redis cannot be reached at present.") from error
        if self._gone:
            logger.warning("Redis is back")
        self._gone = False
        return answer

    def _refused(self, reason: str) -> None:
        what, _, _ = reason.partition(" script:")
        if time.monotonic() >= self._silent_until.get(what, 0.0):
            logger.error("Redis refuses: %s", what)
            self._silent_until[what] = time.monotonic() + REPEAT_SECONDS

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))


def _client(url: str) -> Redis:
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.exceptions import RedisError
    except ImportError:
        message = "store: redis-py is not installed; pip install 'polymath[redis]'"
        raise ConfigError([message]) from None
    try:
        pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=None, socket_timeout=None
        )
        pool.connection_class(**pool.connection_kwargs)  # which refuses what is no option
    except (ValueError, TypeError, RedisError) as error:
        raise ConfigError([f"store: {error}"]) from error
    return Redis.from_pool(pool)


def _script(name: str) -> str:
    return (files("polymath.gateway.store") / f"{name}.lua").read_text(encoding="utf-8")


def _refusal(index: int) -> Refused | None:
    """By the number that the script gives; 0 is none."""
    reasons: tuple[Refused, ...] = get_args(Refused)
    return reasons[index - 1] if index else None
