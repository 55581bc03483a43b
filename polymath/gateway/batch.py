"""Several chat requests that are answered as one: all of them, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request

from polymath.gateway.endpoint import entered
from polymath.gateway.gateway import Gateway
from polymath.gateway.visit import Visit
from polymath.proxy import Body, Events

__all__ = ["Batch", "entered_together"]

Arrived = tuple[int, dict[str, Any]]
"""The place of a request in the batch, and a chunk of its answer."""


async def entered_together(
    gateway: Gateway, asked: Iterable[Body], request: Request, at_once: int
) -> Batch:
    """Let chat requests in.

    Args:
        at_once: so many are answered at a time; the others wait.
    Raises:
        PolymathError: one of them is not let in, and so none is.
    """
    entering = [asyncio.create_task(entered(gateway, body, request)) for body in asked]
    try:
        return Batch(await asyncio.gather(*entering), at_once)
    except BaseException:
        for outcome in await _cancelled(entering):
            if isinstance(outcome, Visit):
                outcome.end()
        raise


class Batch:
    """Requests that were let in."""

    def __init__(self, visits: Sequence[Visit], at_once: int) -> None:
        self._visits = visits
        self._at_once = at_once

    @property
    def headers(self) -> dict[str, str]:
        """What all responses say alike, and what is left of the limits in the end."""
        *others, last = [visit.headers for visit in self._visits]
        alike = {name: said for name, said in last.items() if _all_say(others, name, said)}
        return {**alike, **self._visits[-1].ticket.headers}

    async def wholes(self) -> list[dict[str, Any]]:
        """The whole answers, in the order of the requests.

        Raises:
            PolymathError: one of them has none.
        """
        turns = asyncio.Semaphore(self._at_once)

        async def whole(visit: Visit) -> dict[str, Any]:
            async with turns:
                return await visit.whole()

        answering = [asyncio.create_task(whole(visit)) for visit in self._visits]
        try:
            return await asyncio.gather(*answering)
        finally:
            await _cancelled(answering)
            self._end()

    async def stream(self) -> AsyncGenerator[Arrived, None]:
        """The chunks of all answers as they come; the first ones have begun.

        Raises:
            PolymathError: one did not begin; from the iterator, if one breaks.
        """
        chunks = self._chunks()
        await anext(chunks)  # they have begun, or this raises
        return chunks

    async def _chunks(self) -> AsyncGenerator[Arrived, None]:
        """One of no request when the first answers have begun, then the chunks."""
        turns = asyncio.Semaphore(self._at_once)

        async def begin(visit: Visit) -> Events:
            await turns.acquire()
            return await visit.stream()

        async def following(place: int) -> Arrived | None:
            chunk = await anext(await starting[place], None)
            if chunk is None:
                turns.release()
                return None
            return place, chunk

        starting = [asyncio.create_task(begin(visit)) for visit in self._visits]
        pending: set[asyncio.Task[Arrived | None]] = set()
        try:
            await asyncio.gather(*starting[: self._at_once])
            yield -1, {}
            pending = {asyncio.create_task(following(place)) for place in range(len(starting))}
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (arrived := task.result()) is not None:
                        pending.add(asyncio.create_task(following(arrived[0])))
                        yield arrived
        finally:
            await _cancelled(pending)
            for begun in await _cancelled(starting):
                if not isinstance(begun, BaseException):
                    await begun.aclose()
            self._end()

    def _end(self) -> None:
        """Settle those that nobody got to."""
        for visit in self._visits:
            visit.end()


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> list[Any]:
    """What came of tasks that need not go on."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def _all_say(responses: Sequence[Mapping[str, str]], name: str, said: str) -> bool:
    return all(headers.get(name) == said for headers in responses)
