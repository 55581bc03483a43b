"""`GET /metrics` in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, get_args

from starlette.responses import Response

from polymath.experts import EngineStats
from polymath.proxy import BreakerState, Upstream

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["metrics_response"]

GAUGES = {
    "running": ("polymath_groups_running", "Decode groups that run."),
    "waiting": ("polymath_groups_waiting", "Decode groups that wait."),
    "rows": ("polymath_rows_running", "Rows of the running groups."),
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


BREAKER_STATES = get_args(BreakerState)


class _EngineMetrics:
    """Reads the engine when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats()
        for field, (name, help_text) in GAUGES.items():
            yield GaugeMetricFamily(name, help_text, value=getattr(stats, field))
        for field, (name, help_text) in COUNTERS.items():
            yield CounterMetricFamily(name, help_text, value=getattr(stats, field))
        rate = stats.prefix_hit / stats.prefix_queried if stats.prefix_queried else 0.0
        yield GaugeMetricFamily(
            "polymath_prefix_cache_hit_rate", "Share of prompt tokens that were cached.", value=rate
        )


class _UpstreamMetrics:
    """Reads the upstreams when Prometheus asks."""

    def __init__(self, upstreams: Mapping[str, Upstream]) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterator[Metric]:
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
        for name, upstream in self._upstreams.items():
            for server in upstream.servers:
                place = (name, server.api_base, server.model)
                outstanding.add_metric(place, server.outstanding)
                for state in BREAKER_STATES:
                    here = float(server.breaker.state == state)
                    breaker.add_metric((*place, state), here)
        yield breaker
        yield outstanding


def metrics_response(
    stats: Callable[[], EngineStats], upstreams: Mapping[str, Upstream]
) -> Response:
    """What the engine and the upstreams count, as Prometheus reads it."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_EngineMetrics(stats))
    if upstreams:
        registry.register(_UpstreamMetrics(upstreams))
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})
