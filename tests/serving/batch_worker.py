"""A replica as a process that a test can kill: `python -m tests.serving.batch_worker REDIS_URL FOLDER`."""

import asyncio
import sys
from pathlib import Path

from redis.asyncio import Redis

from tests.serving.batch_replica import Replica
from tests.serving.chat_operation import ChatOperation
from tests.serving.fake_stack import new_gate, new_generation


async def main(redis_url: str, folder: Path) -> None:
    redis: Redis = Redis.from_url(redis_url)
    slow = ChatOperation(new_generation(new_gate(max_running=4)), delay_s=0.02)
    async with Replica(redis, folder, slow).running():
        print("running", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
