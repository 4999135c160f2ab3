"""The beats on which everything looks again that looks now and then."""

import asyncio

import pytest

from server.store.beats import until_beat

pytestmark = pytest.mark.anyio


async def test_whoever_looks_on_beats_wakes_up_together() -> None:
    loop = asyncio.get_running_loop()

    async def second_look_s(begun_after_s: float, interval_s: float) -> float:
        await asyncio.sleep(begun_after_s)
        for _ in range(2):
            await asyncio.sleep(until_beat(interval_s))
        return loop.time()

    looks = [second_look_s(number / 12, interval_s) for number, interval_s in enumerate((0.5, 0.5, 0.25))]
    beats = [at_s / 0.25 for at_s in await asyncio.gather(*looks)]
    assert [beat - round(beat) for beat in beats] == pytest.approx([0.0, 0.0, 0.0], abs=0.3)


@pytest.mark.parametrize("at_s", [0.0, 0.001, 0.45, 0.94, 0.9999])
async def test_a_pause_is_never_next_to_nothing_and_never_much_longer_than_asked_for(at_s: float) -> None:
    loop = asyncio.get_running_loop()
    before_s = (at_s - loop.time()) % 1.0
    await asyncio.sleep(before_s)
    pause_s = until_beat(1.0)
    assert 0.09 < pause_s <= 1.1
