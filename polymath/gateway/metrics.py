"""`GET /metrics` in the Prometheus text format: what was counted, and how things are now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, get_args

from starlette.responses import Response

from polymath import __version__
from polymath.experts import EngineStats
from polymath.gateway.report import Report
from polymath.proxy import BreakerState, Upstream

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Metrics", "Now"]

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's own variable: the folder where several processes count together."""

GAUGES = {
    "running": ("polymath_groups_running", "Decode groups that run."),
    "waiting": ("polymath_groups_waiting", "Decode groups that wait."),
    "rows": ("polymath_rows_running", "Rows of the running groups: the batch size."),
    "kv_tokens": ("polymath_kv_cache_tokens", "Tokens of cache that running groups may need."),
    "prefix_tokens": ("polymath_prefix_cache_tokens", "Tokens that the prefix cache holds."),
    "loaded_adapters": ("polymath_loaded_adapters", "Adapters in memory."),
}

COUNTERS = {
    "prefix_queried": ("polymath_prefix_cache_queried_tokens", "Prompt tokens looked up."),
    "prefix_hit": ("polymath_prefix_cache_hit_tokens", "Prompt tokens that were cached."),
    "prompt_tokens": ("polymath_prompt_tokens", "Prompt tokens fed."),
    "generated_tokens": ("polymath_generated_tokens", "Tokens sampled."),
}

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)

BREAKER_STATES = get_args(BreakerState)


class Now:
    """How things are when Prometheus asks.

    Args:
        stats: of the engine; None without one.
        upstreams: by expert.
        inside: requests that are being answered.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        upstreams: Callable[[], Mapping[str, Upstream]],
        inside: Callable[[], int],
    ) -> None:
        self._stats = stats
        self._upstreams = upstreams
        self._inside = inside

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        build = GaugeMetricFamily("polymath_build_info", "Always 1.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        yield GaugeMetricFamily(
            "polymath_requests_in_flight", "Requests being answered.", value=self._inside()
        )
        stats = self._stats()
        if stats is not None:
            yield from _of_engine(stats)
        if upstreams := self._upstreams():
            yield from _of_upstreams(upstreams)


class Metrics:
    """Counts requests, for one process or, by prometheus_client's files, for several."""

    def __init__(self, now: Now) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Histogram,
            disable_created_metrics,
        )

        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._now = now
        self._registry = registry = CollectorRegistry()
        self._http = Counter(
            "polymath_http_requests",
            "HTTP requests.",
            ("method", "path", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "polymath_http_request_seconds",
            "Until the last byte of the response.",
            ("path",),
            buckets=SECONDS,
            registry=registry,
        )
        self._requests = Counter(
            "polymath_requests",
            "Chat requests that were let in, by who answered and how they ended.",
            ("expert", "domain", "source", "outcome"),
            registry=registry,
        )
        self._seconds = Histogram(
            "polymath_request_seconds",
            "Until the end of the answer.",
            ("expert",),
            buckets=SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "polymath_time_to_first_token_seconds",
            "Until the first token of the answer.",
            ("expert",),
            buckets=SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "polymath_inter_token_seconds",
            "Mean time between the tokens of an answer.",
            ("expert",),
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "polymath_tokens",
            "Tokens of prompts and answers.",
            ("expert", "type"),
            registry=registry,
        )
        self._dollars = Counter(
            "polymath_cost_dollars", "By the experts' prices.", ("expert",), registry=registry
        )
        self._confidence = Histogram(
            "polymath_router_confidence",
            "Calibrated probability that the domain is right.",
            ("domain",),
            buckets=SHARES,
            registry=registry,
        )
        self._routing = Histogram(
            "polymath_router_seconds",
            "Until the decision, limits included.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._cache = Counter(
            "polymath_cache_lookups", "Answers looked up.", ("result",), registry=registry
        )

    def observe(self, report: Report) -> None:
        """Count a request that is over."""
        expert, decision = report.expert, report.decision
        domain = decision.domain or "none"
        self._requests.labels(expert, domain, decision.source, report.outcome).inc()
        self._seconds.labels(expert).observe(report.ended)
        self._tokens.labels(expert, "prompt").inc(report.prompt_tokens)
        self._tokens.labels(expert, "completion").inc(report.completion_tokens)
        self._dollars.labels(expert).inc(report.cost / 1e9)
        if report.first_token is not None:
            self._first_token.labels(expert).observe(report.first_token)
            if report.completion_tokens > 1:
                gap = (report.ended - report.first_token) / (report.completion_tokens - 1)
                self._between.labels(expert).observe(gap)
        self._routing.observe(report.routed)
        if decision.source != "explicit":
            self._confidence.labels(domain).observe(decision.confidence)
        if report.cache is not None:
            self._cache.labels(report.cache).inc()

    def observe_http(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request that is over.

        Args:
            path: of the route, not of the request, so that there are few of them.
        """
        self._http.labels(method, path, str(status)).inc()
        self._http_seconds.labels(path).observe(seconds)

    def response(self) -> Response:
        """What Prometheus reads."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

        now = CollectorRegistry()
        now.register(self._now)
        text = generate_latest(self._counted()) + generate_latest(now)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    def _counted(self) -> CollectorRegistry:
        if not os.environ.get(MULTIPROCESS):
            return self._registry
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


def _of_engine(stats: EngineStats) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for field, (name, help_text) in GAUGES.items():
        yield GaugeMetricFamily(name, help_text, value=getattr(stats, field))
    for field, (name, help_text) in COUNTERS.items():
        yield CounterMetricFamily(name, help_text, value=getattr(stats, field))
    rate = stats.prefix_hit / stats.prefix_queried if stats.prefix_queried else 0.0
    yield GaugeMetricFamily(
        "polymath_prefix_cache_hit_rate", "Share of prompt tokens that were cached.", value=rate
    )


def _of_upstreams(upstreams: Mapping[str, Upstream]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    labels = ("expert", "api_base", "model")
    breaker = GaugeMetricFamily(
        "polymath_upstream_breaker_state",
        "Circuit breaker of a deployment: 1 for the state it is in.",
        labels=(*labels, "state"),
    )
    outstanding = GaugeMetricFamily(
        "polymath_upstream_outstanding_requests", "Requests being answered.", labels=labels
    )
    for name, upstream in upstreams.items():
        for server in upstream.servers:
            place = (name, server.api_base, server.model)
            outstanding.add_metric(place, server.outstanding)
            for state in BREAKER_STATES:
                here = float(server.breaker.state == state)
                breaker.add_metric((*place, state), here)
    yield breaker
    yield outstanding
