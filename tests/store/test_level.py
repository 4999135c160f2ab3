"""The operator's pin in a real Redis."""

import asyncio
import time
from typing import TYPE_CHECKING, cast

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from server.policy.ladder import LadderRules, Level, Pin
from server.serving.ladder import LadderSources, LadderWatch
from server.store.connection import connect
from server.store.ending import ended
from server.store.level import PinsUnreachable, RedisPins
from server.telemetry.resilience import ResilienceMetrics
from tests.serving.fake_stack import FakeStack, slot_with

if TYPE_CHECKING:
    from server.store.connection import Client

pytestmark = pytest.mark.anyio

PIN = Pin(Level.ESSENTIAL, "a migration", "anna", 60.0)
REPLICAS = 4


async def test_a_pin_is_read_as_it_was_written_with_the_time_it_has_left(redis: Redis) -> None:
    pins = RedisPins(redis)
    assert await pins.read() is None
    await pins.write(PIN)
    read = await pins.read()
    assert read is not None
    assert (read.level, read.reason, read.by) == (PIN.level, PIN.reason, PIN.by)
    assert 55 < read.ttl_s <= 60


async def test_a_pin_ends_by_itself_and_by_hand(redis: Redis) -> None:
    pins = RedisPins(redis)
    await pins.write(Pin(Level.ECONOMY, "short", "anna", 0.05))
    await asyncio.sleep(0.1)
    assert await pins.read() is None
    await pins.write(PIN)
    await pins.clear()
    assert await pins.read() is None


async def test_a_redis_that_is_gone_is_said() -> None:
    client = connect("redis://127.0.0.1:1/0")
    pins = RedisPins(client)
    for asked in (pins.read(), pins.write(PIN), pins.clear()):
        with pytest.raises(PinsUnreachable):
            await asked
    await client.aclose()


@pytest.mark.usefixtures("redis")
async def test_a_change_reaches_four_replicas_within_a_second(redis_url: str) -> None:
    clients: list[Client] = [connect(redis_url, timeout_s=1.0) for _ in range(REPLICAS)]
    slot = slot_with(FakeStack({}))
    watches = [
        LadderWatch(
            LadderRules(),
            LadderSources(lambda: 0.0, lambda: True, slot, has_fallback=False),
            RedisPins(client),
            ResilienceMetrics(CollectorRegistry()),
        )
        for client in clients
    ]
    running = [asyncio.create_task(watch.run()) for watch in watches]
    await asyncio.sleep(0.3)
    for change in (watches[0].pin(Level.ESSENTIAL, "a test", 60, "anna"), watches[0].unpin("anna")):
        before = watches[0].level
        started_s = time.monotonic()
        await change
        async with asyncio.timeout(1):
            while any(watch.level == before for watch in watches):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the replicas poll, so does the test
        assert time.monotonic() - started_s < 1
    await ended(running)
    for client in clients:
        await cast("Redis", client).aclose()
