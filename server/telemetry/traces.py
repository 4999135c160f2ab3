"""Traces: a span for each request and for the parts of its way, in the trace that the client began.

vLLM adds its own span to the trace that `carrier` names. Where tracing is off nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # it is imported where tracing is on (`server/telemetry/otlp.py`)
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue

_ZERO_TRACE: Final = 0


class Traced:
    """One request's span, or none."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    @property
    def recording(self) -> bool:
        return self._span is not None and self._span.is_recording()

    @property
    def trace_id(self) -> str | None:
        """The id that finds the trace, as log lines carry it."""
        if self._span is None or (number := self._span.get_span_context().trace_id) == _ZERO_TRACE:
            return None
        return f"{number:032x}"

    def ended(self, name: str, attributes: Mapping[str, AttributeValue | None], error: str | None) -> None:
        """Say what it was and how it ended; attributes that are None are left out."""
        if self._span is None:
            return
        self._span.update_name(name)
        self._span.set_attributes({key: value for key, value in attributes.items() if value is not None})
        if error is not None:
            _mark_failed(self._span, error)


class Traces:
    """Makes spans with a tracer. `close` sends what is left."""

    def __init__(self, tracer: Tracer | None = None, close: Callable[[], None] = lambda: None) -> None:
        self._tracer = tracer
        self.close = close

    @property
    def on(self) -> bool:
        return self._tracer is not None

    def request(
        self, name: str, headers: Mapping[str, str], *, from_outside: bool = True
    ) -> AbstractContextManager[Traced]:
        """Inside it, all that is done belongs to one span, in the trace that `traceparent` among the headers names."""
        return _NO_REQUEST if self._tracer is None else _request(self._tracer, name, headers, from_outside)

    def part(self, name: str) -> AbstractContextManager[None]:
        """A part of the request's way, which nothing belongs to in turn."""
        return _NO_PART if self._tracer is None else _part(self._tracer, name)

    def carrier(self) -> dict[str, str]:
        """The headers by which another server, or the engine, adds to the trace of the request that runs here."""
        headers: dict[str, str] = {}
        if self._tracer is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(headers)
        return headers


@contextmanager
def _request(tracer: Tracer, name: str, headers: Mapping[str, str], from_outside: bool) -> Iterator[Traced]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    kind = SpanKind.SERVER if from_outside else SpanKind.INTERNAL
    with tracer.start_as_current_span(
        name, parent, kind, record_exception=False, set_status_on_exception=False
    ) as span:  # fmt: skip
        yield Traced(span)


@contextmanager
def _part(tracer: Tracer, name: str) -> Iterator[None]:
    span = tracer.start_span(name)
    try:
        yield
    except Exception as error:
        _mark_failed(span, type(error).__name__)
        raise
    finally:
        span.end()


def _mark_failed(span: Span, error: str) -> None:
    """The kind of error alone: its words may be a client's."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", error)
    span.set_status(StatusCode.ERROR)


_NO_REQUEST: Final = nullcontext(Traced())
_NO_PART: Final = nullcontext()
