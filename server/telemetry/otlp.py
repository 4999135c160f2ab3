"""Spans sent to a collector by OTLP over HTTP. Imported only where tracing is on."""

import threading
from typing import Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from server.telemetry.traces import Traces

_PATH: Final = "/v1/traces"
_EXPORT_TIMEOUT_S: Final = 3.0
# What a collector that is away may hold up the end of the process.
_CLOSE_TIMEOUT_S: Final = 3.0


def start(endpoint: str, version: str) -> Traces:
    """Send spans to `endpoint`, the collector's base URL, from now on; vLLM's too, which go to the global provider."""
    exporter = OTLPSpanExporter(endpoint=url_of(endpoint), timeout=_EXPORT_TIMEOUT_S)
    provider = provider_for(exporter, version)
    trace.set_tracer_provider(provider)
    return traces_of(provider, exporter)


def provider_for(exporter: SpanExporter, version: str) -> TracerProvider:
    """`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*` hold."""
    named = Resource({"service.name": "tidegate", "service.version": version})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def traces_of(provider: TracerProvider, exporter: SpanExporter) -> Traces:
    """Closing them sends what is left, as long as the collector takes it in time."""

    def close() -> None:
        giving_up = threading.Timer(_CLOSE_TIMEOUT_S, exporter.shutdown)
        giving_up.start()
        provider.shutdown()
        giving_up.cancel()

    return Traces(provider.get_tracer("tidegate"), close)


def url_of(endpoint: str) -> str:
    """The collector's URL for spans, from its base URL or from that URL itself."""
    base = endpoint.rstrip("/")
    return base if base.endswith(_PATH) else f"{base}{_PATH}"
