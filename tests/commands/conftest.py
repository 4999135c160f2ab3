from tests.api.conftest import embedded_redis, store_url, stored

__all__ = ["embedded_redis", "store_url", "stored"]
