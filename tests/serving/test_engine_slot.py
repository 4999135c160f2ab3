import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from server.policy.refusals import NotReady
from server.serving.engine_slot import EngineSlot
from tests.serving.fake_stack import FakeStack, slot_with

if TYPE_CHECKING:  # the engine room imports vLLM
    from server.engine.stack import Stack

pytestmark = pytest.mark.anyio


def fill(slot: EngineSlot) -> FakeStack:
    stack = FakeStack({})
    slot.fill(cast("Stack", stack))
    return stack


async def test_a_slot_that_never_served_is_loading_and_not_down() -> None:
    slot = EngineSlot()
    assert not slot.down
    await asyncio.wait_for(slot.wait(60), 1)
    with pytest.raises(NotReady):
        _ = slot.stack


async def test_the_first_engine_can_be_waited_for_also_when_it_is_dead_already() -> None:
    slot = EngineSlot()
    waiting = asyncio.create_task(slot.filled())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fill(slot).alive = False
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(slot.filled(), 1)


async def test_a_slot_is_down_from_the_death_of_its_engine_on() -> None:
    slot = EngineSlot()
    stack = fill(slot)
    seen = [slot.down]
    stack.alive = False
    seen.append(slot.down)
    slot.empty("replacing the engine")
    seen.append(slot.down)
    fill(slot)
    assert [*seen, slot.down] == [False, True, True, False]


async def test_waiting_ends_when_the_next_engine_is_there_for_everybody_who_waits() -> None:
    slot = EngineSlot()
    stack = fill(slot)
    stack.alive = False
    waiting = [asyncio.create_task(slot.wait(60)) for _ in range(3)]
    await asyncio.sleep(0.01)
    slot.empty("replacing the engine")
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    fill(slot)
    async with asyncio.timeout(1):
        await asyncio.gather(*waiting)


async def test_waiting_ends_at_its_deadline_too() -> None:
    slot = slot_with(FakeStack({}, alive=False))
    await asyncio.wait_for(slot.wait(0.02), 1)
    assert slot.down


async def test_an_engine_that_dies_at_once_is_waited_out() -> None:
    slot = EngineSlot()
    fill(slot).alive = False
    waiting = asyncio.create_task(slot.wait(60))
    await asyncio.sleep(0.01)
    fill(slot).alive = False
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fill(slot)
    await asyncio.wait_for(waiting, 1)
