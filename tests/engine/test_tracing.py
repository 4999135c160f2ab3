"""vLLM's own span in the client's trace: its real output processor, our provider, a collector. No engine runs."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats

from server.engine.seams import SeamedEngine
from server.telemetry import otlp
from tests.serving.fake_stack import new_generation
from tests.telemetry.collector import collecting

pytestmark = pytest.mark.engine

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def engine_without_a_core(*, traced: bool) -> SeamedEngine:
    """The parts of an engine that spans come from, with our seam opened on them."""
    engine = SeamedEngine.__new__(SeamedEngine)
    engine.engine_core = None
    engine.output_processor = OutputProcessor(None, log_stats=True)
    engine.observability_config = SimpleNamespace(otlp_traces_endpoint=None)
    engine.open_seam(new_generation(), traced=traced)
    return engine


def answer(processor: OutputProcessor, trace_headers: dict[str, str]) -> None:
    """One request from its arrival to its last token, as the engine's front end sees it."""
    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)
    request = EngineCoreRequest(
        request_id="one", prompt_token_ids=[1, 2, 3], mm_features=None, sampling_params=params, pooling_params=None,
        arrival_time=1.0, lora_request=None, cache_salt=None, data_parallel_rank=None, external_req_id="one",
        trace_headers=trace_headers,
    )  # fmt: skip
    processor.add_request(request, None, None, 0, RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "one"))
    last = EngineCoreOutput("one", [7], finish_reason=FinishReason.LENGTH, trace_headers=trace_headers)
    processor.process_outputs([last], engine_core_timestamp=2.0, iteration_stats=IterationStats())


def test_the_engines_span_stands_below_the_requests_in_the_clients_trace() -> None:
    engine = engine_without_a_core(traced=True)
    assert asyncio.run(engine.is_tracing_enabled())
    with collecting() as collector:
        traces = otlp.start(collector.url, "1.2.3")
        with traces.request("POST", {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}):
            carried = traces.carrier()
        answer(engine.output_processor, carried)
        traces.close()
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST", "llm_request"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert spans["llm_request"].parent_span_id == spans["POST"].span_id
    attributes = {pair.key: pair.value for pair in spans["llm_request"].attributes}
    assert attributes["gen_ai.usage.prompt_tokens"].int_value == 3


def test_without_tracing_the_engine_makes_no_spans() -> None:
    engine = engine_without_a_core(traced=False)
    assert not asyncio.run(engine.is_tracing_enabled())
    assert not engine.output_processor.tracing_enabled
