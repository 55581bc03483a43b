"""One request to the experts, from the door to the bill.

It is let in, routed within what its key allows, answered from the cache or by the expert, and
settled once, however it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymath.errors import DeadlineExceeded, InvalidRequest, Overloaded, PolymathError
from polymath.experts import Expert
from polymath.gateway.access import Access, Ticket, Used
from polymath.gateway.answer_cache import CacheQuery, CacheStatus, Replay
from polymath.gateway.completion import (
    ExplainedEvents,
    decision_headers,
    explained,
    noting_first_token,
)
from polymath.gateway.folding import Folding
from polymath.gateway.live import Live
from polymath.gateway.report import (
    ANSWERED,
    CANCELLED,
    OFF_TOPIC,
    REMOTE,
    Observer,
    Report,
)
from polymath.gateway.request_limits import check_request, estimated_tokens
from polymath.gateway.topic_guard import Refusal, guard_of, off_topic
from polymath.proxy import Answering, Body, Events, notes_of, wants_usage
from polymath.router import RouteDecision

__all__ = ["Door", "Visit"]

NANODOLLARS_PER_TOKEN = 1000
"""Of a price of one dollar for a million tokens."""


class Door:
    """Lets requests in and sends them on their way.

    Args:
        observers: hear of every request when it is over.
    """

    def __init__(self, access: Access, observers: Sequence[Observer]) -> None:
        self.access = access
        self._observers = observers
        self._inside = 0

    @property
    def inside(self) -> int:
        """Requests that are being answered."""
        return self._inside

    def take_place(self, live: Live) -> None:
        """Of one request; to be left.

        Raises:
            Overloaded: as many are inside as may be.
        """
        if self._inside >= live.settings.limits.max_in_flight:
            raise Overloaded("The server answers as many requests as it can; try again soon.")
        self._inside += 1
        live.enter()

    async def enter(
        self, live: Live, asked: Body, headers: Mapping[str, str], request_id: str = ""
    ) -> Visit:
        """Let a chat request in and decide who answers; to be ended, or answered.

        Raises:
            PolymathError: it is too large, not allowed, or nobody is called so.
        """
        arrived = _Arrival(time.time(), time.perf_counter(), request_id, headers.get("traceparent"))
        check_request(asked, live.settings.limits)
        estimate = estimated_tokens(asked, live.settings.engine.max_tokens)
        self.take_place(live)
        ticket = None
        try:
            ticket = await self.access.admit(headers.get("authorization"), estimate)
            decision, answering = await _decided(live, asked, headers, ticket)
            visit = Visit(self, live, ticket, decision, answering, asked, arrived)
            await visit.ask_cache(headers.get("cache-control"))
        except BaseException:
            self.leave(live, ticket, Used("none"))
            raise
        return visit

    def leave(self, live: Live, ticket: Ticket | None, used: Used) -> None:
        """Settle a request that is over."""
        self._inside -= 1
        live.leave()
        if ticket is not None:
            self.access.give_back(ticket, used)

    def tell(self, report: Report) -> None:
        """Let everybody know who wants to."""
        for observer in self._observers:
            observer(report)


@dataclass(frozen=True, slots=True)
class _Arrival:
    started: float
    clock: float
    request_id: str
    parent: str | None

    def elapsed(self) -> float:
        return time.perf_counter() - self.clock


class Visit:
    """A request that was let in.

    Attributes:
        headers: of the response: the decision, what is left of the limits, the cache.
    """

    def __init__(
        self,
        door: Door,
        live: Live,
        ticket: Ticket,
        decision: RouteDecision,
        answering: Answering,
        asked: Body,
        arrival: _Arrival,
    ) -> None:
        self.ticket = ticket
        self.decision = decision
        self.headers = {**decision_headers(decision), **ticket.headers}
        self._door = door
        self._live = live
        self._answering = answering
        self._body = {name: value for name, value in asked.items() if name != "timeout"}
        self._arrival = arrival
        self._routed = arrival.elapsed()
        self._deadline = arrival.clock + _seconds(asked, live.settings.limits.timeout)
        self._query: CacheQuery | None = None
        self._cache: CacheStatus | None = None
        self._first_token: float | None = None
        self._over = False

    async def ask_cache(self, cache_control: str | None) -> None:
        """Have the cache answer, if it can."""
        if isinstance(self._answering, Refusal):
            return
        cache = self._live.cache
        self._query = cache.query(self._body, self.decision, self.ticket.owner, cache_control)
        if self._query is None:
            return
        found = await cache.find(self._query)
        self._cache = "miss"
        if found is not None:
            reply, self._cache = found
            self._answering = Replay(reply)
        self.headers["x-polymath-cache"] = self._cache

    async def whole(self) -> dict[str, Any]:
        """The whole answer, in the name of the expert.

        Raises:
            PolymathError: there is none.
        """
        reply: dict[str, Any] = {}
        outcome = CANCELLED
        try:
            async with asyncio.timeout(self._deadline - time.perf_counter()):
                with noting_first_token(self._note_first):
                    reply = await self._answering.whole(self._body)
                await self._keep(reply)
            outcome = self._answered()
        except TimeoutError:
            outcome = DeadlineExceeded.code
            raise self._late() from None
        except PolymathError as error:
            outcome = error.code
            raise
        except Exception:
            outcome = PolymathError.code
            raise
        finally:
            self._end(reply, outcome)
        return explained(reply, self.decision)

    async def stream(self) -> Events:
        """The chunks of an answer that has begun.

        Raises:
            PolymathError: it did not begin; from the iterator, if it breaks.
        """
        chunks = self._chunks()
        await anext(chunks)  # it has begun, or this raises
        return chunks

    def end(self) -> None:
        """Settle a request that nobody wants an answer to any more."""
        self._end({}, CANCELLED)

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """An empty object when the stream has begun, then its chunks."""
        folding = Folding()
        outcome = CANCELLED
        body = self._with_usage()
        events: Events | None = None
        try:
            async with asyncio.timeout(self._deadline - time.perf_counter()):
                events = await self._answering.stream(body)
            explained_events = ExplainedEvents(events, self.decision)
            yield {}
            while True:
                async with asyncio.timeout(self._deadline - time.perf_counter()):
                    chunk = await anext(explained_events, None)
                if chunk is None:
                    break
                folding.add(chunk)
                if folding.pieces:
                    self._note_first()
                if body is self._body:
                    yield chunk
                elif (rest := _without_usage(chunk)) is not None:
                    yield rest
            outcome = self._answered()
            if (whole := folding.whole()) is not None:
                await self._keep(whole)
        except TimeoutError:
            outcome = DeadlineExceeded.code
            raise self._late() from None
        except PolymathError as error:
            outcome = error.code
            raise
        except Exception:
            outcome = PolymathError.code
            raise
        finally:
            self._end(folding.known, outcome, folding.pieces)
            if events is not None:
                await events.aclose()

    def _with_usage(self) -> Body:
        """The body that asks for the usage, too; itself if the client does so, or if an upstream is
        asked, nobody pays for it and it is not kept."""
        options = self._body.get("stream_options") or {}
        if not isinstance(options, Mapping) or wants_usage(self._body):
            return self._body
        free = self.ticket.key is None and self._cache != "miss"
        if free and self._kind(self.decision.expert) in REMOTE:
            return self._body
        return {**self._body, "stream_options": {**options, "include_usage": True}}

    def _note_first(self) -> None:
        if self._first_token is None:
            self._first_token = self._arrival.elapsed()

    async def _keep(self, reply: Mapping[str, Any]) -> None:
        if self._query is not None and self._cache == "miss":
            await self._live.cache.keep(self._query, reply)

    def _answered(self) -> str:
        return OFF_TOPIC if isinstance(self._answering, Refusal) else ANSWERED

    def _late(self) -> DeadlineExceeded:
        seconds = self._deadline - self._arrival.clock
        return DeadlineExceeded(f"The answer took longer than its {seconds:g} seconds.")

    def _end(self, reply: Mapping[str, Any], outcome: str, pieces: int = 0) -> None:
        if self._over:
            return
        self._over = True
        used = self._used(reply, pieces)
        self._door.leave(self._live, self.ticket, used)
        self._door.tell(
            Report(
                id=str(reply.get("id", "")),
                request_id=self._arrival.request_id,
                key=self.ticket.owner,
                model=str(self._body["model"]),
                expert=used.expert,
                kind=self._kind(used.expert),
                decision=self.decision,
                cache=self._cache,
                outcome=outcome,
                stream=bool(self._body.get("stream")),
                started=self._arrival.started,
                routed=self._routed,
                first_token=self._first_token,
                ended=self._arrival.elapsed(),
                prompt_tokens=used.prompt_tokens,
                completion_tokens=used.completion_tokens,
                cost=used.cost,
                prompt=self._body["messages"],
                keeps_prompt=self.ticket.key is not None and self.ticket.key.keep_prompts,
                parent=self._arrival.parent,
            )
        )

    def _kind(self, expert: str) -> str:
        if self._cache in ("hit", "semantic"):
            return "cache"
        known = self._live.catalog.get(expert)
        return "none" if known is None else known.settings.kind

    def _used(self, reply: Mapping[str, Any], pieces: int) -> Used:
        """By the usage of the answer; without one, a token for each piece of a stream."""
        expert = self._answered_by(reply)
        if self._cache in ("hit", "semantic"):
            return Used(expert)
        usage = reply.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(completion, int):
            prompt, completion = (estimated_tokens(self._body, 0) if pieces else 0), pieces
        cost = _cost(self._live.catalog.get(expert), prompt, completion)
        return Used(expert, prompt, completion, cost)

    def _answered_by(self, reply: Mapping[str, Any]) -> str:
        return str(notes_of(reply).get("fallback", self.decision.expert))


async def _decided(
    live: Live, asked: Body, headers: Mapping[str, str], ticket: Ticket
) -> tuple[RouteDecision, Answering]:
    """Who answers, within what the key allows and the topic guard wants."""
    service = live.service
    decision = await service.decide(asked, headers, ticket.experts)
    guard = guard_of(live.settings.topic_guard, ticket.key)
    if guard.allowed_domains is not None:
        read = decision
        if decision.source == "explicit" or ticket.experts is not None:
            read = await service.routed(asked, headers)  # the topic, whoever may answer
        if off_topic(guard, read):
            if guard.off_topic == "refuse":
                return decision, Refusal(guard)
            if guard.off_topic == "fallback":
                decision = service.fallback(decision)
                if ticket.experts is not None and decision.expert not in ticket.experts:
                    return decision, Refusal(guard)
    return decision, service.answering(decision, ticket.experts)


def _without_usage(chunk: dict[str, Any]) -> dict[str, Any] | None:
    """A chunk for a client that did not ask for the usage; None if it has nothing else."""
    if chunk.get("usage") and not chunk.get("choices"):
        return None
    return {name: value for name, value in chunk.items() if name != "usage"}


def _cost(expert: Expert | None, prompt: int, completion: int) -> int:
    price = None if expert is None else expert.settings.price
    if price is None:
        return 0
    return round((prompt * price.input + completion * price.output) * NANODOLLARS_PER_TOKEN)


def _seconds(asked: Body, most: float) -> float:
    """How long the answer may take; `timeout` of the request is in seconds.

    Raises:
        InvalidRequest: it is no positive number.
    """
    wanted = asked.get("timeout")
    if wanted is None:
        return most
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted < 1e9:
        raise InvalidRequest("timeout: must be a number of seconds above 0.", param="timeout")
    return min(float(wanted), most)
