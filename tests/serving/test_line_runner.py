import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.engine.calls import Call, Reply
from server.policy.tenants import Tenant
from server.serving.line_runner import Answered, LineCall, LineRunner
from server.serving.requests import OpenRequest, OpenRequests, current_request
from server.telemetry import otlp
from tests.serving.fake_stack import FakeStack, new_service, slot_with

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


async def test_a_line_is_known_as_batch_work_and_has_a_span_of_its_own() -> None:
    exporter, seen = InMemorySpanExporter(), list[OpenRequest | None]()
    provider = otlp.provider_for(exporter, "1.2.3")

    async def chat(_: Call) -> Reply:
        seen.append(current_request())
        return Reply(b"{}", "application/json")

    service = new_service(slot_with(FakeStack({("POST", CHAT): chat})), OpenRequests())
    runner = LineRunner(service, otlp.traces_of(provider, exporter))
    answer = await runner.attempt(LineCall("line-1", CHAT, Tenant("search"), None, {}), lambda: None)
    assert isinstance(answer, Answered)
    (request,) = seen
    assert request is not None
    assert (request.of_batch, request.tenant.traffic_class) == (True, "batch")
    provider.force_flush()
    assert [span.name for span in exporter.get_finished_spans()] == ["batch line"]
    provider.shutdown()
