"""What the gateway adds to an upstream, against LiteLLM's proxy in the same run.

A canned upstream stands behind each; wrk asks them in turns, so that noise of the machine meets all
alike. `make bench-overhead`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.canned_upstream import MODEL
from bench.gateways import Running, canned_upstream, litellm_proxy, polymath_gateway, redis

WRK = Path(__file__).with_name("chat_completion.lua")
CONNECTIONS = 16
WARM_UP_SECONDS = 2
LEAST_RATE, AIMED_RATE = 8, 15
"""Times LiteLLM's requests a second."""
LARGEST_P99 = 0.1
"""Of LiteLLM's."""
MOST_MEGABYTES = 150
MOST_ADDED = 3.0
"""Milliseconds at the median, with one connection."""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw: requests a second, milliseconds, answers that were none."""

    rate: float
    p50: float
    p99: float
    failed: int


@dataclass(frozen=True, slots=True)
class Result:
    """One server, over all rounds."""

    many: Load
    one: Load
    megabytes: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litellm", type=Path, required=True, help="Python with litellm[proxy]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of one run of wrk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = list(_servers(stack, Path(folder), arguments.litellm))
        results = _measure(servers, arguments.rounds, arguments.seconds)
    _print_table(results)
    _print_bars(results)


def _servers(stack: ExitStack, folder: Path, litellm: Path) -> Iterator[Running]:
    upstream = stack.enter_context(canned_upstream())
    expert = {"api_base": upstream.url}
    yield upstream
    yield stack.enter_context(litellm_proxy(litellm, upstream, folder))
    memory = polymath_gateway("ours, memory", folder / "memory", expert, store="memory")
    yield stack.enter_context(memory)
    store = stack.enter_context(redis(folder))
    shared = polymath_gateway("ours, redis", folder / "redis", expert, store=store)
    yield stack.enter_context(shared)
    rules = {"kind": "rules", "fallback": MODEL}
    small = polymath_gateway(
        "ours, memory, router of rules", folder / "rules", expert, router=rules
    )
    yield stack.enter_context(small)


def _measure(servers: Sequence[Running], rounds: int, seconds: int) -> dict[str, Result]:
    for server in servers:
        _wrk(server, CONNECTIONS, WARM_UP_SECONDS)
    many: dict[str, list[Load]] = {server.name: [] for server in servers}
    one: dict[str, list[Load]] = {server.name: [] for server in servers}
    for _ in range(rounds):
        for server in servers:
            many[server.name].append(_wrk(server, CONNECTIONS, seconds))
            one[server.name].append(_wrk(server, 1, max(1, seconds // 2)))
    return {
        server.name: Result(
            _median(many[server.name]), _median(one[server.name]), server.megabytes()
        )
        for server in servers
    }


def _wrk(server: Running, connections: int, seconds: int) -> Load:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(WRK), f"{server.url}/chat/completions", "--", MODEL, server.key]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Load(**found)


def _median(loads: Sequence[Load]) -> Load:
    return Load(
        statistics.median(load.rate for load in loads),
        statistics.median(load.p50 for load in loads),
        statistics.median(load.p99 for load in loads),
        sum(load.failed for load in loads),
    )


def _print_table(results: dict[str, Result]) -> None:
    alone = results["upstream alone"].one.p50
    print(f"| | requests/s, {CONNECTIONS} connections | p50 | p99 | failed | memory ", end="")
    print("| p50, one connection | added to the upstream's |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        many, one = result.many, result.one
        print(
            f"| {name} | {many.rate:,.0f} | {many.p50:.1f} ms | {many.p99:.1f} ms "
            f"| {many.failed + one.failed} | {result.megabytes:.0f} MB "
            f"| {one.p50:.2f} ms | {one.p50 - alone:.2f} ms |"
        )


def _print_bars(results: dict[str, Result]) -> None:
    alone, peer = results["upstream alone"], results["LiteLLM"]
    print("\n| ours | requests/s, times LiteLLM's | p99, of LiteLLM's | memory | added p50 | |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        if name.startswith("ours"):
            rate, p99 = result.many.rate / peer.many.rate, result.many.p99 / peer.many.p99
            added = result.one.p50 - alone.one.p50
            small = result.megabytes < MOST_MEGABYTES and added < MOST_ADDED
            met = rate >= LEAST_RATE and p99 <= LARGEST_P99 and small
            verdict = ("aim" if rate >= AIMED_RATE else "bar") if met else "missed"
            print(
                f"| {name} | {rate:.1f}x | {p99:.3f} | {result.megabytes:.0f} MB | {added:.2f} ms "
                f"| {verdict} |"
            )
    print(f"| bar | {LEAST_RATE}x (aim {AIMED_RATE}x) | {LARGEST_P99} ", end="")
    print(f"| {MOST_MEGABYTES} MB | {MOST_ADDED:g} ms | |")


if __name__ == "__main__":
    main()
