"""One replica that runs batches: everything but HTTP and the engine, on a real Redis and a real folder."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from server.policy.batches import Batch
from server.policy.tenants import Tenant
from server.serving.batch_desk import Order
from server.serving.batch_life import BatchKeeping
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.batches import Runners
from server.serving.batching import Batching
from server.serving.file_desk import About, FileRules
from server.serving.line_runner import LineRunner
from server.serving.requests import OpenRequests
from server.store.batches import BatchRecords
from server.store.file_bodies import FileBodies
from server.store.file_records import FileRecords
from server.telemetry.batches import BatchMetrics
from tests.serving.batch_files import CHAT, jsonl, records
from tests.serving.chat_operation import ChatOperation
from tests.serving.fake_stack import FakeStack, new_service, plainly_described, slot_with

TENANT = Tenant("a-tenant")
WITHIN_S = 20.0


@dataclass(slots=True)
class Clock:
    """The time of day, which a test moves on."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Replica:
    """A replica in one process; several of them share a Redis and a folder."""

    def __init__(self, redis: Redis, folder: Path, chat: ChatOperation | None = None, name: str = "one") -> None:
        self.chat = chat or ChatOperation()
        self.clock = Clock()
        self.requests = OpenRequests()
        self.paused = False
        self.tenants = {TENANT.name: TENANT}
        self.registry = CollectorRegistry()
        self.bodies = FileBodies(folder)
        self.records = BatchRecords(redis)
        stack = FakeStack({("POST", CHAT): self.chat})
        keeping = BatchKeeping(self.records, FileRecords(redis), self.bodies, 3600, self.clock)
        service = new_service(slot_with(stack), self.requests)
        self.batching = Batching(
            keeping,
            FileRules(4 << 20, 0, 7 * 24 * 3600),
            LineParts(LineRunner(service), plainly_described, lambda: self.paused, BatchMetrics(self.registry)),
            InputLimits(1000, 1 << 16),
            Runners(name, self._tenant),
        )

    async def _tenant(self, name: str) -> Tenant | None:
        return self.tenants.get(name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Replica"]:
        async with self.batching.runner.running():
            yield self

    async def upload(self, content: bytes) -> str:
        async with self.batching.files.receiving(TENANT) as incoming:
            await incoming.write(content)
            return (await incoming.keep(About("in.jsonl", "batch", None))).id

    async def submit(self, lines: Iterable[Mapping[str, Any]] | bytes) -> Batch:
        content = lines if isinstance(lines, bytes) else jsonl(lines)
        return await self.batching.batches.create(TENANT, Order(await self.upload(content), CHAT))

    async def batch(self, batch: Batch) -> Batch:
        return await self.batching.batches.batch(TENANT, batch.id)

    async def ended(self, batch: Batch) -> Batch:
        """Wait for its end."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                if (now := await self.batch(batch)).ended:
                    return now
                await asyncio.sleep(0.02)

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of an output or error file; none where there is no file."""
        if file_id is None:
            return []
        _, path = await self.batching.files.content(TENANT, file_id)
        return records(path.read_bytes())

    async def answers(self, batch: Batch) -> dict[str, str]:
        """What each answered line was told."""
        found = await self.content(batch.output_file_id)
        told = {item["custom_id"]: item["response"]["body"]["choices"][0]["message"]["content"] for item in found}
        assert len(told) == len(found)
        return told

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.01)
