"""`GET /metrics` in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from starlette.responses import Response

from polymath.experts import EngineStats

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


def metrics_response(stats: Callable[[], EngineStats]) -> Response:
    """What the engine counts, as Prometheus reads it."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_EngineMetrics(stats))
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})
