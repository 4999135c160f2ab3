"""What a request consumed, against vLLM's real output processor."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats

from server.engine.progress import Progress, follow_requests, followed

pytestmark = pytest.mark.engine

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def new_processor() -> OutputProcessor:
    processor = OutputProcessor(None, log_stats=False)
    follow_requests(processor)
    return processor


def core_request(name: str, params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="the-clients-own",
    )


def adding(processor: OutputProcessor, name: str, n: int = 1) -> Callable[[], AsyncGenerator[str, None]]:
    """Adds a request as `AsyncLLM.add_request` does, with the answer in one piece, and yields once."""

    async def outputs() -> AsyncGenerator[str, None]:
        params = SamplingParams(n=n, output_kind=RequestOutputKind.FINAL_ONLY)
        request = core_request(name, params)
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
        if n == 1:
            processor.add_request(request, None, None, 0, queue)
        else:
            parent = ParentRequest(request)
            for index in range(n):
                child, child_params = parent.get_child_info(index)
                processor.add_request(core_request(child, child_params), None, parent, index, queue)
        yield "added"

    return outputs


def step(
    processor: OutputProcessor,
    name: str,
    tokens: list[int],
    cached: int | None = None,
    finish: FinishReason | None = None,
) -> None:
    """One step of the engine for one sequence; `cached` comes with its first."""
    prefill = None if cached is None else PrefillStats(num_prompt_tokens=len(PROMPT), num_cached_tokens=cached)
    output = EngineCoreOutput(name, tokens, finish_reason=finish, prefill_stats=prefill)
    processor.process_outputs([output])


async def started(progress: Progress, outputs: Callable[[], AsyncGenerator[str, None]]) -> None:
    generator = followed(progress, outputs)()
    assert await anext(generator) == "added"
    await generator.aclose()


def test_nothing_is_consumed_before_the_engine_has_the_request() -> None:
    progress = Progress()
    followed(progress, adding(new_processor(), "a"))()
    assert (progress.in_engine, progress.completion_tokens, progress.cached_tokens) == (False, 0, 0)


def test_every_step_counts_although_the_client_sees_none() -> None:
    processor, progress = new_processor(), Progress()
    asyncio.run(started(progress, adding(processor, "a")))
    assert (progress.in_engine, progress.completion_tokens, progress.cached_tokens) == (True, 0, 0)
    step(processor, "a", [9], cached=4)
    step(processor, "a", [9, 9])
    assert (progress.completion_tokens, progress.cached_tokens) == (3, 4)


@pytest.mark.parametrize("aborted", [True, False])
def test_the_figures_stay_when_the_request_is_over(aborted: bool) -> None:
    processor, progress = new_processor(), Progress()
    asyncio.run(started(progress, adding(processor, "a")))
    step(processor, "a", [9, 9], cached=0, finish=None if aborted else FinishReason.LENGTH)
    if aborted:
        processor.abort_requests(["a"], internal=True)
    assert not processor.has_request("a")
    assert progress.completion_tokens == 2


def test_all_choices_count_and_the_first_to_prefill_says_what_was_cached() -> None:
    processor, progress = new_processor(), Progress()
    asyncio.run(started(progress, adding(processor, "a", n=3)))
    step(processor, "0_a", [9], cached=2)
    step(processor, "1_a", [9, 9], cached=8)
    assert progress.cached_tokens == 2
    step(processor, "2_a", [9, 9, 9], cached=8)
    assert (progress.completion_tokens, progress.cached_tokens) == (6, 2)


def test_two_requests_of_one_client_id_are_told_apart() -> None:
    processor, first, second = new_processor(), Progress(), Progress()

    async def both() -> None:
        await asyncio.gather(
            started(first, adding(processor, "a")),
            started(second, adding(processor, "b")),
        )

    asyncio.run(both())
    step(processor, "a", [9], cached=0)
    step(processor, "b", [9, 9], cached=0)
    assert (first.completion_tokens, second.completion_tokens) == (1, 2)


def test_a_request_that_is_run_again_starts_from_nothing() -> None:
    progress = Progress()
    dead, fresh = new_processor(), new_processor()
    asyncio.run(started(progress, adding(dead, "a")))
    step(dead, "a", [9, 9, 9], cached=0)
    asyncio.run(started(progress, adding(fresh, "a")))
    assert progress.completion_tokens == 0
    step(fresh, "a", [9], cached=0)
    assert progress.completion_tokens == 1


def test_streamed_input_may_end_after_its_answer() -> None:
    processor, progress = new_processor(), Progress()

    async def outputs() -> AsyncGenerator[str, None]:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        for resumable in (True, False):
            request = core_request("a", params)
            request.resumable = resumable
            processor.add_request(request, None, None, 0, queue)
            processor.process_outputs([EngineCoreOutput("a", [5], finish_reason=FinishReason.LENGTH)])
        yield "ended"

    async def run() -> list[str]:
        return [said async for said in followed(progress, outputs)()]

    assert asyncio.run(run()) == ["ended"]
    assert not processor.request_states
    assert progress.completion_tokens == 1
