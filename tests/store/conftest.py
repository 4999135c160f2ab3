"""A real Redis, started once for all tests of the store."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from server.store.redis_server import EmbeddedRedis
from tests.store.running_redis import running_redis


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as embedded:
        yield embedded


@pytest.fixture
def redis_url(embedded_redis: EmbeddedRedis) -> str:
    return embedded_redis.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """An empty Redis, reached with timeouts that a busy test machine keeps."""
    client: Redis = Redis.from_url(redis_url)
    async with aclosing(client):
        await client.flushall()
        yield client
