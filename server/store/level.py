"""The operator's pin in Redis, where every replica reads it.

It is one key that expires by itself. Each replica reads it a few times a second, which follows a change faster than a
second without a subscription that could be lost unnoticed.
"""

import json
from typing import Any, Final, cast

from redis.exceptions import RedisError

from server.policy.ladder import Level, Pin
from server.store.connection import Client

_KEY: Final = "tidegate:level"


class PinsUnreachable(Exception):
    """Redis does not answer."""


class RedisPins:
    """The pin behind one Redis client. The client brings its timeouts."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self) -> Pin | None:
        """The pin, with the time it has left. Raises `PinsUnreachable`."""
        try:
            found = cast("bytes | None", await self._client.get(_KEY))
            left_ms = await self._client.pttl(_KEY) if found is not None else 0
        except (RedisError, OSError, TimeoutError) as error:
            raise PinsUnreachable(str(error)) from error
        return None if found is None or left_ms <= 0 else _pin(json.loads(found), left_ms / 1000)

    async def write(self, pin: Pin) -> None:
        """Keep a pin for its `ttl_s`. Raises `PinsUnreachable`."""
        value = json.dumps({"level": int(pin.level), "reason": pin.reason, "by": pin.by})
        try:
            await self._client.set(_KEY, value, px=max(int(pin.ttl_s * 1000), 1))
        except (RedisError, OSError, TimeoutError) as error:
            raise PinsUnreachable(str(error)) from error

    async def clear(self) -> None:
        """Forget the pin. Raises `PinsUnreachable`."""
        try:
            await self._client.delete(_KEY)
        except (RedisError, OSError, TimeoutError) as error:
            raise PinsUnreachable(str(error)) from error


def _pin(value: dict[str, Any], ttl_s: float) -> Pin:
    return Pin(Level(value["level"]), str(value["reason"]), str(value["by"]), ttl_s)
