"""Requests begin a few in a round of the loop, in their order, and whoever leaves is not waited for."""

import asyncio
from itertools import pairwise

import pytest

from server.serving.turnstile import Turnstile

pytestmark = pytest.mark.anyio


async def test_whoever_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile(per_round=1)
    for _ in range(3):
        with pytest.raises(StopIteration):  # done at the first step
            next(turnstile.turn().__await__())
        await asyncio.sleep(0)


async def test_a_burst_begins_in_its_order_and_leaves_rounds_to_others() -> None:
    turnstile, begun, seen = Turnstile(per_round=2), list[int](), list[int]()

    async def request(number: int) -> None:
        await turnstile.turn()
        begun.append(number)

    async def stream() -> None:
        while len(begun) < 20:
            seen.append(len(begun))
            await asyncio.sleep(0)

    await asyncio.gather(stream(), *(request(number) for number in range(20)))
    assert begun == list(range(20))
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 2


async def test_who_leaves_while_waiting_holds_up_nobody() -> None:
    turnstile, begun = Turnstile(per_round=1), list[int]()

    async def request(number: int) -> None:
        await turnstile.turn()
        begun.append(number)

    tasks = [asyncio.create_task(request(number)) for number in range(6)]
    await asyncio.sleep(0)
    for task in tasks[2:5]:
        task.cancel()
    await asyncio.wait(tasks)
    assert begun == [0, 1, 5]


async def test_a_long_history_takes_the_place_of_many() -> None:
    turnstile, rounds = Turnstile(), list[int]()

    async def request(body_bytes: int) -> None:
        await turnstile.turn(body_bytes)
        rounds.append(round_now)

    round_now = 0
    tasks = [asyncio.create_task(request(body_bytes)) for body_bytes in (300_000, 300_000, 100, 100, 300_000)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        round_now += 1
    assert rounds[0] < rounds[1] < rounds[2] == rounds[3] == rounds[4]


async def test_it_costs_nothing_when_nobody_comes() -> None:
    turnstile = Turnstile()
    await turnstile.turn()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not turnstile._counting
