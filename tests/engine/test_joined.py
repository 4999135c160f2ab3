"""A front-end joins an engine that is ready already. The engine is a stand-in that speaks vLLM's protocol."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.stats import SchedulerStats

from server.engine.joined import JoinRequest, build_joined, lose_engine
from server.engine.seams import Seams
from server.engine.shared_steps import account
from server.engine.stack import Adapter, Stack, StackRequest
from server.engine.start_failures import StartFailure
from server.policy.forecast import StepPart
from tests.engine.stand_in import StandIn, plan_of, stand_in

pytestmark = [pytest.mark.anyio, pytest.mark.engine]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def plan(tiny_tools_model: Path) -> bytes:
    return plan_of(tiny_tools_model)


def addresses(folder: Path) -> tuple[str, str]:
    return f"ipc://{folder}/in", f"ipc://{folder}/out"


class Told:
    """What a front-end tells of steps, and whether it was told that its engine is gone."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bytes | None, StepPart]] = []
        self.gone = asyncio.Event()

    def step(self, engine_index: int, encoded: bytes | None, part: StepPart) -> None:
        self.steps.append((engine_index, encoded, part))


async def join(plan: bytes, addresses: tuple[str, str], told: Told, folder: Path) -> Stack:
    request = StackRequest((), folder / "logging.json", folder / "errors.log", 100)
    (folder / "logging.json").write_text('{"version": 1, "disable_existing_loggers": false}')
    seams = cast("Seams", Namespace(stepped=None, owner=lambda: "anyone"))
    return await build_joined(JoinRequest(plan, *addresses, 1, 2, told.step, told.gone), request, seams)


@asynccontextmanager
async def joined(plan: bytes, engine: StandIn, told: Told, folder: Path) -> AsyncIterator[Stack]:
    stack = await asyncio.wait_for(join(plan, engine.addresses, told, folder), 60)
    try:
        yield stack
    finally:
        await stack.close()


async def first_token(stack: Stack) -> list[int]:
    sampling = SamplingParams(max_tokens=1, output_kind=RequestOutputKind.DELTA)
    outputs = AsyncLLM.generate(stack.engine, tokens_input([1, 2, 3]), sampling, "a-request")
    return [token async for output in outputs for token in output.outputs[0].token_ids]


async def test_a_front_end_joins_and_joins_again_where_another_was_killed(plan: bytes, tmp_path: Path) -> None:
    with stand_in(addresses(tmp_path)) as engine:
        for _ in range(2):
            told = Told()
            async with joined(plan, engine, told, tmp_path) as stack:
                assert stack.max_model_len == 512
                assert stack.kv_cache_tokens == 8192
                assert await first_token(stack) == [7]
            (index, encoded, part), *_ = told.steps
            assert index == 0
            assert account(encoded) == SchedulerStats(num_running_reqs=1)
            assert (part.generated, part.finished) == (1, 1)
        assert [request.client_index for request in engine.requests] == [1, 1]


async def test_one_that_is_told_of_its_engines_death_ends_what_waits(plan: bytes, tmp_path: Path) -> None:
    with stand_in(addresses(tmp_path)) as engine:
        async with joined(plan, engine, Told(), tmp_path) as stack:
            before = stack.alive
            lose_engine(stack.engine)
            await asyncio.wait_for(stack.ended(), 5)
            assert (before, stack.alive) == (True, False)
            assert stack.runtime_adapters() == ()


async def test_an_engine_that_dies_before_it_is_reached_is_a_start_that_failed(plan: bytes, tmp_path: Path) -> None:
    told = Told()
    nobody = f"ipc://{tmp_path}/nobody-in", f"ipc://{tmp_path}/nobody-out"
    joining = asyncio.create_task(join(plan, nobody, told, tmp_path))
    await asyncio.sleep(0.2)
    told.gone.set()
    with pytest.raises(StartFailure):
        await asyncio.wait_for(joining, 60)


async def test_adapters_are_those_of_the_first_process_under_its_numbers(plan: bytes, tmp_path: Path) -> None:
    with stand_in(addresses(tmp_path)) as engine:
        async with joined(plan, engine, Told(), tmp_path) as stack:
            stack.follow_adapters([Adapter("poet", "/a", 1), Adapter("late", "/b", 2)])
            stack.follow_adapters([Adapter("late", "/c", 3)])
            assert stack.adapters() == (Adapter("late", "/c", 3),)
            assert stack.models.lora_id_counter.inc(1) > 1000  # its own numbers begin far above
