import pytest

from tests.store.conftest import embedded_redis, redis, redis_url

__all__ = ["embedded_redis", "redis", "redis_url"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
