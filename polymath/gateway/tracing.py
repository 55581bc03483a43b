"""OpenTelemetry traces of requests, by the semantic conventions for generative AI.

The spans of a request are made when it is over, from its report: one for the whole, and under it
route, then prefill and decode of a local expert, or upstream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from polymath import __version__
from polymath.errors import ConfigError
from polymath.experts import Secret, Url
from polymath.gateway.report import REMOTE, Report

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["Tracing", "TracingSettings"]

ELSEWHERE = frozenset({"cache", "none"})
"""Answers without a model."""
NANOSECONDS = 1e9
EXPORT_SECONDS = 3.0
"""A collector that is gone may hold up the end of the server for so long."""


class TracingSettings(BaseModel):
    """Where traces go to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Url | None = Field(
        default=None,
        description="OTLP over HTTP, e.g. `http://localhost:4318/v1/traces`; none, no traces.",
    )
    headers: dict[str, Secret] = Field(
        default_factory=dict, description="Sent with the traces; write `${VAR}`."
    )
    service_name: str = Field(default="polymath", min_length=1, description="`service.name`.")
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Of the requests without a sampled parent."
    )


class Tracing:
    """An observer that exports spans.

    Args:
        prompts: says whether prompts may stand in traces.
        exporter: in place of OTLP.
    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(
        self,
        settings: TracingSettings,
        prompts: Callable[[], bool],
        exporter: SpanExporter | None = None,
    ) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ImportError:
            message = "tracing: OpenTelemetry is not installed; pip install 'polymath[otel]'"
            raise ConfigError([message]) from None
        self._prompts = prompts
        self._provider = TracerProvider(
            resource=Resource.create(
                {"service.name": settings.service_name, "service.version": __version__}
            ),
            sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _otlp(settings)))
        self._tracer = self._provider.get_tracer("polymath", __version__)

    def __call__(self, report: Report) -> None:
        """Export the spans of a request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        whole = self._tracer.start_span(
            f"chat {report.model}",
            context=_parent(report),
            kind=SpanKind.SERVER,
            attributes=dict(self._attributes(report)),
            start_time=_at(report, 0.0),
        )
        if report.failed:
            whole.set_attribute("error.type", report.outcome)
            whole.set_status(Status(StatusCode.ERROR, report.outcome))
        inside = set_span_in_context(whole)
        for name, start, end in _phases(report):
            self._phase(report, name, start, end, inside)
        whole.end(_at(report, report.ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _phase(self, report: Report, name: str, start: float, end: float, inside: Context) -> None:
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT if name == "upstream" else SpanKind.INTERNAL
        span = self._tracer.start_span(
            name, context=inside, kind=kind, start_time=_at(report, start)
        )
        span.set_attribute("polymath.expert", report.expert)
        span.end(_at(report, end))

    def _attributes(self, report: Report) -> Iterator[tuple[str, Any]]:
        yield "gen_ai.operation.name", "chat"
        yield "gen_ai.provider.name", "polymath"
        yield "gen_ai.request.model", report.model
        yield "gen_ai.response.model", report.expert
        yield "gen_ai.response.id", report.id
        yield "gen_ai.usage.input_tokens", report.prompt_tokens
        yield "gen_ai.usage.output_tokens", report.completion_tokens
        yield "polymath.domain", report.decision.domain or "none"
        yield "polymath.confidence", report.decision.confidence
        yield "polymath.source", report.decision.source
        yield "polymath.key", report.key
        yield "polymath.cache", report.cache or "none"
        yield "http.request.id", report.request_id
        if self._prompts():
            yield "gen_ai.input.messages", orjson.dumps(report.prompt).decode()


def _phases(report: Report) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of what a request went through, in seconds."""
    yield "route", 0.0, report.routed
    if report.kind in REMOTE:
        yield "upstream", report.routed, report.ended
    elif report.kind not in ELSEWHERE and report.first_token is not None:
        yield "prefill", report.routed, report.first_token
        yield "decode", report.first_token, report.ended


def _at(report: Report, seconds: float) -> int:
    return int((report.started + seconds) * NANOSECONDS)


def _parent(report: Report) -> Context | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if report.parent is None:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": report.parent})


def _otlp(settings: TracingSettings) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        message = "tracing: the OTLP exporter is not installed; pip install 'polymath[otel]'"
        raise ConfigError([message]) from None
    headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
    return OTLPSpanExporter(endpoint=settings.endpoint, headers=headers, timeout=EXPORT_SECONDS)
