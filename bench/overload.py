"""What becomes of requests at four times the capacity: those let in, and the rest.

The capacity is what a closed loop of growing width gets out of the gateway; then requests come by
the clock, whoever is answered (open loop, Poisson), at four times that rate.
Behind the gateway is a slow upstream with `max_parallel`, and then the demo's own model.
`make bench-overload`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.canned_upstream import MODEL
from bench.gateways import Running, canned_upstream, demo_gateway, polymath_gateway
from polymath.proxy.plain_http import PlainTransport

TIMES = 4
LARGEST_RATIO = 2.0
"""Of the p99 of those let in, to that at capacity."""
AT_ONCE = 0.1
"""Seconds until a refusal, at the 99th percentile."""
UPSTREAM_SECONDS, PARALLEL = 0.25, 16
WIDTHS = (1, 2, 4, 8, 16)
MOST_REQUESTS = 4000
MORE = 1.05
"""Requests a second that a wider loop must gain to be worth it."""
TOKENS = 32
SEED = 7


@dataclass(frozen=True, slots=True)
class Answered:
    """One request: its status and how long it took."""

    status: int
    seconds: float
    retry_after: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A load and what became of it.

    Attributes:
        coming: seconds in which the requests came.
        seconds: until the last was answered.
    """

    what: str
    coming: float
    seconds: float
    answers: Sequence[Answered]

    def rate(self, status: int) -> float:
        return sum(one.status == status for one in self.answers) / self.seconds

    def percentile(self, status: int, share: float) -> float:
        """Seconds; 0 if there was none of the status."""
        times = sorted(one.seconds for one in self.answers if one.status == status)
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    @property
    def strange(self) -> int:
        """Neither answers nor refusals that say when to come back."""
        return sum(
            one.status != httpx.codes.OK and not (one.status == 429 and one.retry_after)
            for one in self.answers
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of one load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for running, body in _gateways(stack, Path(folder)):
            rows = asyncio.run(_measure(running, body, arguments.seconds))
            _print_table(running.name, rows)


def _gateways(stack: ExitStack, folder: Path) -> Iterator[tuple[Running, dict[str, Any]]]:
    question = [{"role": "user", "content": "What is six times seven?"}]
    with canned_upstream(UPSTREAM_SECONDS) as upstream:
        expert = {"api_base": upstream.url, "max_parallel": PARALLEL}
        name = f"an upstream that takes {UPSTREAM_SECONDS:g} s, max_parallel {PARALLEL}"
        with polymath_gateway(name, folder / "upstream", expert) as running:
            yield running, {"model": MODEL, "messages": question}
    with demo_gateway("the demo's model, one adapter", folder / "demo") as running:
        limits = {"max_tokens": TOKENS, "ignore_eos": True}
        yield running, {"model": "general", "messages": question, **limits}


async def _measure(running: Running, body: dict[str, Any], seconds: float) -> list[Row]:
    headers = {"authorization": f"Bearer {running.key}"}
    transport = PlainTransport(
        MOST_REQUESTS, MOST_REQUESTS
    )  # httpx's own one is what would be slow
    async with httpx.AsyncClient(headers=headers, timeout=120, transport=transport) as client:
        clients = _Clients(client, f"{running.url}/chat/completions", body)
        await clients.closed_loop(2, seconds / 6)
        best: Row | None = None
        for width in WIDTHS:
            row = await clients.closed_loop(width, seconds)
            if best is not None and row.rate(200) < MORE * best.rate(200):
                break
            best = row
        assert best is not None
        over = await clients.open_loop(TIMES * best.rate(200), seconds)
        return [best, over]


class _Clients:
    """Ask one gateway; every prompt is another, so that nothing is answered from a cache."""

    def __init__(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
        self._client = client
        self._url = url
        self._body = body
        self._random = random.Random(SEED)

    async def closed_loop(self, width: int, seconds: float) -> Row:
        """Each of `width` clients asks again when it is answered."""
        answers: list[Answered] = []
        end = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end and len(answers) < MOST_REQUESTS:
                answers.append(await self._ask())

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(width)))
        took = time.perf_counter() - started
        return Row(f"capacity: {width} at a time", took, took, answers)

    async def open_loop(self, rate: float, seconds: float) -> Row:
        """Requests come at random moments, `rate` a second on average."""
        count = min(MOST_REQUESTS, round(rate * seconds))
        loop = asyncio.get_running_loop()
        tasks = []
        started = moment = loop.time()
        for _ in range(count):
            moment += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, moment - loop.time()))
            tasks.append(asyncio.create_task(self._ask()))
        coming = loop.time() - started
        answers = await asyncio.gather(*tasks)
        return Row(f"{TIMES} times the capacity", coming, loop.time() - started, answers)

    async def _ask(self) -> Answered:
        words = " ".join(str(self._random.randrange(1000)) for _ in range(4))
        message = {"role": "user", "content": f"{self._body['messages'][0]['content']} {words}"}
        started = time.perf_counter()
        reply = await self._client.post(self._url, json={**self._body, "messages": [message]})
        seconds = time.perf_counter() - started
        return Answered(reply.status_code, seconds, "retry-after" in reply.headers)


def _print_table(name: str, rows: Sequence[Row]) -> None:
    print(f"\n{name}\n")
    print("| load | came/s | answered/s | p50 | p99 | 429/s | p50 | p99 | other |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        came = len(row.answers) / row.coming
        print(
            f"| {row.what} | {came:.1f} | {row.rate(200):.1f} | {_times(row, 200)} "
            f"| {row.rate(429):.1f} | {_times(row, 429)} | {row.strange} |"
        )
    capacity, over = rows
    ratio = over.percentile(200, 0.99) / capacity.percentile(200, 0.99)
    refused_at = over.percentile(429, 0.99)
    met = ratio <= LARGEST_RATIO and refused_at <= AT_ONCE and not over.strange
    print(
        f"\np99 of those let in: {ratio:.2f} times that at capacity (bar {LARGEST_RATIO:g}); "
        f"p99 of refusals {refused_at * 1e3:.0f} ms (bar {AT_ONCE * 1e3:.0f}): "
        f"{'met' if met else 'missed'}",
        flush=True,
    )


def _times(row: Row, status: int) -> str:
    p50, p99 = (row.percentile(status, share) * 1e3 for share in (0.5, 0.99))
    return f"{p50:.0f} ms | {p99:.0f} ms"


if __name__ == "__main__":
    main()
