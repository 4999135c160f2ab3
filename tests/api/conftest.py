from collections.abc import Iterator

import pytest
from redis import Redis

from server.store.redis_server import EmbeddedRedis
from tests.store.conftest import embedded_redis

__all__ = ["embedded_redis"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def stored(embedded_redis: EmbeddedRedis) -> Iterator[Redis]:
    """An empty Redis, seen by the test itself."""
    with Redis.from_url(embedded_redis.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def store_url(stored: Redis, embedded_redis: EmbeddedRedis) -> str:
    """Where a server finds it."""
    del stored
    return embedded_redis.url
