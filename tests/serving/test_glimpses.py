"""What is read from Redis for an overview, and not too often."""

import asyncio

import pytest

from server.policy.refusals import StoreUnavailable
from server.serving.glimpses import Glimpse

pytestmark = pytest.mark.anyio


class Source:
    """Something to read, which can fail or hang."""

    def __init__(self) -> None:
        self.reads = 0
        self.now_s = self.takes_s = 0.0
        self.error: Exception | None = None
        self.hangs = False

    async def read(self) -> int:
        self.reads += 1
        self.now_s += self.takes_s
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.reads

    def clock(self) -> float:
        return self.now_s


async def test_many_who_look_at_once_cost_one_read() -> None:
    source = Source()
    glimpse = Glimpse(source.read, 5.0, source.clock)
    seen = await asyncio.gather(*(glimpse.look() for _ in range(20)))
    assert set(seen) == {(1, "")}
    assert source.reads == 1


async def test_it_is_read_again_when_it_is_old() -> None:
    source = Source()
    glimpse = Glimpse(source.read, 5.0, source.clock)
    await glimpse.look()
    source.now_s = 4.9
    assert await glimpse.look() == (1, "")
    source.now_s = 5.0
    assert await glimpse.look() == (2, "")


async def test_what_takes_long_to_read_is_kept_longer() -> None:
    source = Source()
    source.takes_s = 1.0
    glimpse = Glimpse(source.read, 5.0, source.clock)
    await glimpse.look()
    source.now_s = 50.9
    assert await glimpse.look() == (1, "")
    source.now_s = 51.0
    assert await glimpse.look() == (2, "")


@pytest.mark.parametrize(
    ("error", "words"),
    [(StoreUnavailable("Redis does not answer."), "Redis does not answer."), (OSError("read-only"), "read-only")],
)
async def test_a_read_that_fails_is_told_and_not_tried_again_at_once(error: Exception, words: str) -> None:
    source = Source()
    glimpse = Glimpse(source.read, 5.0, source.clock)
    source.error = error
    value, problem = await glimpse.look()
    assert value is None
    assert words in problem
    assert (await glimpse.look())[1] == problem
    assert source.reads == 1
    source.error, source.now_s = None, 5.0
    assert await glimpse.look() == (2, "")


async def test_a_read_that_hangs_holds_nobody_up_for_long() -> None:
    source = Source()
    source.hangs = True
    glimpse = Glimpse(source.read, 5.0, source.clock)
    async with asyncio.timeout(5):
        value, problem = await glimpse.look()
    assert value is None
    assert "too long" in problem
