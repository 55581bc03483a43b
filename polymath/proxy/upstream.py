"""An expert behind HTTP: its deployments, its retries, its limit.

A request goes to the deployment with the fewest outstanding ones whose circuit breaker lets it
pass. Tries are repeated only before the first byte of an answer, never after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from polymath.errors import Overloaded, UpstreamUnavailable
from polymath.experts import Deployment, ExpertSettings
from polymath.proxy.answering import Events
from polymath.proxy.failures import TryFailed
from polymath.proxy.retry import LONGEST_WAIT, backoff
from polymath.proxy.server import Server

__all__ = ["Upstream"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Upstream:
    """The servers of one expert.

    Args:
        name: of the expert.
        settings: of kind `upstream`.
    """

    def __init__(self, name: str, settings: ExpertSettings) -> None:
        self.name = name
        self.settings = settings
        own = (
            [Deployment(api_base=settings.api_base, api_key=settings.api_key)]
            if settings.api_base
            else []
        )
        self.servers = [
            Server(name, settings, deployment) for deployment in (*own, *settings.deployments)
        ]
        self._num_retries = settings.num_retries
        self._places = asyncio.Semaphore(settings.max_parallel) if settings.max_parallel else None
        self._most_waiting = (
            max(1, (settings.max_parallel or 0) // 2)
            if settings.max_waiting is None
            else settings.max_waiting
        )
        self._waiting = 0

    def check_room(self) -> None:
        """For requests that are new; what belongs to one that is being answered may wait anyhow.

        Raises:
            Overloaded: as many wait for their turn as may.
        """
        full = self._places is not None and self._places.locked()
        if full and self._waiting >= self._most_waiting:
            raise Overloaded(
                f"The upstream of {self.name} is asked as much as it may be, and its queue is full "
                f"({self._waiting} requests wait); retry later."
            )

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request.

        Args:
            body: its `model` is replaced by that of the deployment.
        Raises:
            PolymathError: the upstream refused, failed, was late or is not asked at present.
        """
        async with self._place():
            return await self._tried(lambda server: server.whole("POST", path, body))

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object of the server itself, like `/models`.

        Raises:
            PolymathError: as `post`.
        """
        return await self._tried(lambda server: server.whole("GET", path))

    async def stream(self, path: str, body: Mapping[str, Any]) -> Events:
        """The JSON objects of a stream that has begun.

        Raises:
            PolymathError: as `post`; from the iterator itself, if the stream breaks.
        """
        events = self._events(path, body)
        await anext(events)  # it has begun, or this raises
        return events

    async def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            await server.close()

    async def _events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """An empty object when the stream has begun, then the objects of the stream."""
        async with self._place():
            first, rest = await self._tried(lambda server: _begun(server, path, body))
            async with aclosing(rest):
                try:
                    yield {}
                    if first is not None:
                        yield first
                        async for event in rest:
                            yield event
                except TryFailed as failed:
                    raise failed.error from failed

    async def _tried(self, attempt: Callable[[Server], Awaitable[Result]]) -> Result:
        asked: list[Server] = []
        while True:
            server = self._free_server(asked)
            asked.append(server)
            tries = len(asked)
            try:
                return await attempt(server)
            except TryFailed as failed:
                wait = backoff(tries) if failed.retry_after is None else failed.retry_after
                if self._has_other(asked):
                    wait = min(wait, backoff(tries))  # that one did not ask to be left alone
                hopeless = failed.failure in ("broken", "refused") or wait > LONGEST_WAIT
                if hopeless or tries > self._num_retries:
                    logger.warning("%s: %s", server.api_base, failed.error.message)
                    raise failed.error from failed
                logger.info("%s: %s Again in %.1f s.", server.api_base, failed, wait)
                await asyncio.sleep(wait)

    def _has_other(self, asked: Sequence[Server]) -> bool:
        """Whether a server may be asked that was not asked yet."""
        return any(server.breaker.lets_pass for server in self.servers if server not in asked)

    def _free_server(self, asked: Sequence[Server]) -> Server:
        """The least busy one that may be asked, rather one that was not asked yet."""
        free = [server for server in self.servers if server.breaker.lets_pass]
        if not free:
            seconds = min(server.breaker.seconds_left for server in self.servers)
            raise UpstreamUnavailable(
                f"The upstream of {self.name} failed often of late and is left alone for "
                f"{seconds:.0f} seconds more.",
                retry_after=max(1, round(seconds)),
            )
        return min(free, key=lambda server: (asked.count(server), server.outstanding))

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._places is None:
            yield
            return
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()


async def _begun(
    server: Server, path: str, body: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, AsyncGenerator[dict[str, Any], None]]:
    """The first object of a stream and the iterator of the others."""
    events = server.events(path, body)
    return await anext(events, None), events
