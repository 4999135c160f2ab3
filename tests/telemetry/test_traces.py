"""Spans as an exporter gets them, in memory and by a collector on a real port."""

import socket
import time
from collections.abc import Iterator

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from server.telemetry import otlp
from server.telemetry.traces import Traces
from tests.telemetry.collector import collecting

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENTS = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "vendor=1"}


class Recorded:
    """Traces, and the spans they made."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = otlp.provider_for(self._exporter, "1.2.3")
        self.traces = otlp.traces_of(self._provider, self._exporter)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        self._provider.force_flush()
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    made = Recorded()
    yield made
    made.traces.close()


def test_a_request_goes_on_with_the_clients_trace_and_its_parts_are_below_it(recorded: Recorded) -> None:
    with recorded.traces.request("POST", CLIENTS) as traced:
        with recorded.traces.part("queue"):
            pass
        carrier = recorded.traces.carrier()
        assert traced.trace_id == TRACE_ID
        traced.ended("POST /v1/chat/completions", {"tidegate.tenant": "search", "nothing": None}, None)
    request, queue = recorded.spans["POST /v1/chat/completions"], recorded.spans["queue"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert queue.parent == request.context
    assert request.attributes == {"tidegate.tenant": "search"}
    assert request.status.status_code is StatusCode.UNSET
    assert carrier == {
        "traceparent": f"00-{TRACE_ID}-{request.context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}])
def test_a_request_without_a_good_traceparent_begins_a_trace(recorded: Recorded, headers: dict[str, str]) -> None:
    with recorded.traces.request("POST", headers):
        pass
    assert recorded.spans["POST"].parent is None


def test_a_client_that_does_not_sample_makes_no_spans_and_its_decision_is_passed_on(recorded: Recorded) -> None:
    with recorded.traces.request("POST", {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00"}) as traced:
        assert not traced.recording
        assert recorded.traces.carrier()["traceparent"].endswith("-00")
    assert recorded.spans == {}


def test_a_part_that_fails_names_the_kind_of_error_and_not_its_words(recorded: Recorded) -> None:
    def fail() -> None:
        with recorded.traces.request("POST", {}), recorded.traces.part("queue"):
            raise ValueError("the client's own words")

    with pytest.raises(ValueError, match="own words"):
        fail()
    span = recorded.spans["queue"]
    assert (span.status.status_code, span.attributes) == (StatusCode.ERROR, {"error.type": "ValueError"})
    assert "own words" not in span.to_json()
    assert "own words" not in recorded.spans["POST"].to_json()


def test_where_tracing_is_off_nothing_is_passed_on() -> None:
    traces = Traces()
    with traces.request("POST", CLIENTS) as traced, traces.part("queue"):
        assert traces.carrier() == {}
        assert (traced.recording, traced.trace_id, traces.on) == (False, None, False)
        traced.ended("name", {}, None)
    traces.close()


def test_a_collector_gets_the_spans_at_the_latest_when_the_server_ends() -> None:
    with collecting() as collector:
        exporter = OTLPSpanExporter(endpoint=otlp.url_of(collector.url), timeout=5)
        traces = otlp.traces_of(otlp.provider_for(exporter, "1.2.3"), exporter)
        with traces.request("POST", CLIENTS), traces.part("queue"):
            pass
        traces.close()
    assert collector.paths == ["/v1/traces"]
    assert collector.services == {"tidegate"}
    assert {span.name for span in collector.spans} == {"POST", "queue"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}


def test_a_collector_that_is_away_holds_up_the_end_for_some_seconds_at_most() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # nobody listens here afterwards
        port = taken.getsockname()[1]
    exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{port}/v1/traces", timeout=60)
    traces = otlp.traces_of(otlp.provider_for(exporter, "1.2.3"), exporter)
    for _ in range(1500):
        with traces.request("POST", {}):
            pass
    started_s = time.monotonic()
    traces.close()
    assert time.monotonic() - started_s < 10


def test_the_operator_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-eu")
    provider = otlp.provider_for(InMemorySpanExporter(), "1.2.3")
    assert provider.resource.attributes == {"service.name": "chat-eu", "service.version": "1.2.3"}
    provider.shutdown()


@pytest.mark.parametrize(
    "endpoint", ["http://collector:4318", "http://collector:4318/", "http://collector:4318/v1/traces"]
)
def test_the_base_url_of_a_collector_is_enough(endpoint: str) -> None:
    assert otlp.url_of(endpoint) == "http://collector:4318/v1/traces"
