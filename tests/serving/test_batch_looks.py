"""How often open batches are looked for."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.store.beats import until_beat
from tests.serving.batch_files import line
from tests.serving.batch_replica import Replica

pytestmark = pytest.mark.anyio


@pytest.fixture
def replica(redis: Redis, tmp_path: Path) -> Replica:
    return Replica(redis, tmp_path)


async def test_while_no_batch_is_open_it_rests_and_one_that_is_made_here_runs_at_once(
    replica: Replica, redis: Redis
) -> None:
    async with replica.running():
        await asyncio.sleep(until_beat(5.0) + 0.2)
        await redis.config_resetstat()
        await asyncio.sleep(2.2)
        assert await looks(redis) == 0
        batch = await replica.submit([line("a")])
        async with asyncio.timeout(2):
            await replica.ended(batch)


async def test_while_a_batch_is_open_it_looks_every_second(replica: Replica, redis: Redis) -> None:
    replica.paused = True
    async with replica.running():
        await replica.submit([line("a")])
        await asyncio.sleep(0.5)
        await redis.config_resetstat()
        await asyncio.sleep(2.5)
        assert await looks(redis) >= 2


async def looks(redis: Redis) -> int:
    """How often open batches were looked for since the Redis counts."""
    return int((await redis.info("commandstats")).get("cmdstat_zrange", {"calls": 0})["calls"])
