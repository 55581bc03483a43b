"""Traces: the spans of real requests, where they are sent to, and what does not stand in them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from polymath.gateway.app import Gateway
from polymath.gateway.tracing import Tracing, TracingSettings
from polymath.gateway.visit import Door
from tests.gateway.asking import stream
from tests.gateway.running import LAW, Running, running, wait_for, write_config
from tests.proxy.stand_in import StandInServer, failing

LOCAL = "local: {kind: base, base_model: tiny, domains: [local]}"
ENGINE = "engine: {backend: torch, dtype: float32}\ncache: {exact: true}\n"
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A gateway whose spans are kept in memory."""

    def __init__(self) -> None:
        self.prompts = False
        self._exporter = InMemorySpanExporter()
        self._tracing = Tracing(TracingSettings(), lambda: self.prompts, self._exporter)
        self.gate: Running

    def watch(self, gateway: Gateway) -> None:
        observers = [*gateway._observers(), self._tracing]
        gateway.door = Door(gateway.access, observers)

    def spans(self) -> dict[str, ReadableSpan]:
        """Those since the last call, by name."""
        wait_for(lambda: not self.gate.gateway.door.inside)
        self._tracing._provider.force_flush()
        found = {span.name: span for span in self._exporter.get_finished_spans()}
        self._exporter.clear()
        return found


@pytest.fixture(scope="module")
def only_traced(
    tmp_path_factory: pytest.TempPathFactory,
    text_router: Path,
    tiny_model: Path,
    upstream: StandInServer,
) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    more = f"base_models: {{tiny: {{model: {tiny_model}}}}}\n{ENGINE}"
    config = write_config(folder, text_router, upstream, more, experts=LOCAL)
    traced = Traced()
    with running(config, upstream, traced.watch) as gate:
        traced.gate = gate
        yield traced


@pytest.fixture
def traced(only_traced: Traced) -> Traced:
    only_traced.gate.server.forget()
    only_traced.spans()
    only_traced.prompts = False
    return only_traced


def children(spans: dict[str, ReadableSpan], root: str) -> list[str]:
    """The names of the spans under another in the order of their beginning."""
    context = spans[root].context
    found = [s for s in spans.values() if s.parent and s.parent.span_id == context.span_id]
    assert {span.context.trace_id for span in found} == {context.trace_id}
    return [span.name for span in sorted(found, key=lambda span: span.start_time or 0)]


def test_a_request_to_an_upstream_has_a_span_for_it(traced: Traced) -> None:
    answer = traced.gate.post({"messages": LAW}, x_request_id="mine", cache_control="no-store")
    spans = traced.spans()
    assert children(spans, "chat polymath") == ["route", "upstream"]
    whole, upstream = spans["chat polymath"], spans["upstream"]
    attributes = dict(whole.attributes or {})
    confidence = attributes.pop("polymath.confidence")
    assert isinstance(confidence, float)
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "polymath",
        "gen_ai.request.model": "polymath",
        "gen_ai.response.model": "law",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "polymath.domain": "law",
        "polymath.source": "encoder",
        "polymath.key": "anybody",
        "polymath.cache": "none",
        "http.request.id": "mine",
    }
    assert (whole.kind, upstream.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert whole.status.status_code is StatusCode.UNSET
    assert whole.parent is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_request_to_a_model_here_has_spans_of_its_phases(traced: Traced, streaming: bool) -> None:
    client = traced.gate.client()
    given: dict[str, Any] = {"model": "local", "extra_body": {"ignore_eos": True}}
    if streaming:
        stream(client, temperature=1, **given)
    else:
        client.chat.completions.create(messages=LAW, max_tokens=8, **given)
    spans = traced.spans()
    assert children(spans, "chat local") == ["route", "prefill", "decode"]
    ordered = [spans[name] for name in ("route", "prefill", "decode")]
    for before, after in pairwise(ordered):
        assert before.end_time == after.start_time
    whole = spans["chat local"]
    assert (whole.start_time, whole.end_time) == (ordered[0].start_time, ordered[-1].end_time)
    assert (ordered[-1].end_time or 0) > (ordered[-1].start_time or 0)
    assert (whole.attributes or {})["gen_ai.usage.output_tokens"] == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_of_the_cache_has_no_spans_of_a_model(traced: Traced, streaming: bool) -> None:
    traced.gate.post({"model": "local", "max_tokens": 4})
    traced.spans()
    traced.gate.post({"model": "local", "max_tokens": 4, "stream": streaming})
    spans = traced.spans()
    assert children(spans, "chat local") == ["route"]
    assert (spans["chat local"].attributes or {})["polymath.cache"] == "hit"


def test_a_failure_is_marked(traced: Traced) -> None:
    traced.gate.server.says(failing(500))
    traced.gate.post({"model": "law"})
    whole = traced.spans()["chat law"]
    assert whole.status.status_code is StatusCode.ERROR
    assert (whole.attributes or {})["error.type"] == "upstream_error"


def test_the_parent_is_that_of_the_client(traced: Traced) -> None:
    traced.gate.post({"model": "law"}, traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01")
    whole = traced.spans()["chat law"]
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == SPAN_ID
    traced.gate.post({"model": "law"}, traceparent=f"00-{TRACE_ID}-{SPAN_ID}-00")
    assert traced.spans() == {}, "the client does not want it sampled"
    traced.gate.post({"model": "law"}, traceparent="nonsense")
    assert traced.spans()["chat law"].parent is None


def test_prompts_stand_in_traces_only_if_that_is_wanted(traced: Traced) -> None:
    traced.gate.post({"messages": LAW})
    assert "What is the law" not in str([s.to_json() for s in traced.spans().values()])
    traced.prompts = True
    traced.gate.post({"messages": LAW})
    attributes = traced.spans()["chat polymath"].attributes or {}
    assert "What is the law" in str(attributes["gen_ai.input.messages"])


# --- a collector ---------------------------------------------------------------------------------


class Collector:
    """Takes in OTLP over HTTP."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str | None, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                said = ExportTraceServiceRequest.FromString(data)
                collector.received.append((self.path, self.headers["x-token"], said))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *given: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_spans_reach_a_collector_by_the_end(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    collector = Collector()
    more = (
        f"tracing: {{endpoint: {collector.url}, headers: {{x-token: sesame}}, service_name: me}}\n"
    )
    with running(write_config(tmp_path, text_router, upstream, more), upstream) as gate:
        gate.post({"model": "law"})
    collector.close()
    (path, token, said), *_ = collector.received
    assert (path, token) == ("/v1/traces", "sesame")
    (resource,) = said.resource_spans
    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert named["service.name"] == "me"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["chat law", "route", "upstream"]


def test_a_collector_that_is_gone_harms_nobody(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    collector = Collector()
    collector.close()
    more = f"tracing: {{endpoint: {collector.url}}}\n"
    with running(write_config(tmp_path, text_router, upstream, more), upstream) as gate:
        for _ in range(3):
            assert gate.post({"model": "law"}).status_code == 200
