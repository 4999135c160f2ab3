"""Kills of a whole process at random moments, on a real Redis and a real folder."""

import asyncio
import random
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.serving.batch_files import line
from tests.serving.batch_replica import Replica

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

KILLS = 20
LINES = 999


async def test_each_line_is_answered_once_through_twenty_kills(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    seeds = random.Random(5)
    replica = Replica(redis, tmp_path, name="last")
    batch = await replica.submit(line(f"id-{n}", f"{n} " + "word " * 200) for n in range(LINES))
    done: list[int] = []
    for _ in range(KILLS):
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.serving.batch_worker", redis_url, str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        assert worker.stdout is not None
        while (said := await worker.stdout.readline()) != b"running\n":
            assert said, "the worker ended"
        await asyncio.sleep(seeds.uniform(0.05, 0.35))
        worker.kill()
        await worker.wait()
        await redis.delete(f"tidegate:{{batches}}:lease:{batch.id}")  # as if its ten seconds were over
        done.append(sum(1 for _ in replica.bodies.path(batch.outputs.output_file_id).open("rb")))
    assert done == sorted(done)
    assert len(set(done)) > KILLS // 2  # most of the kills met it at work
    async with replica.running():
        ended = await replica.ended(batch)
        assert set(await replica.answers(ended)) == {f"id-{n}" for n in range(LINES)}
    assert (ended.status, ended.counts.completed, ended.counts.failed) == ("completed", LINES, 0)
    assert ended.usage.output_tokens == 3 * LINES
