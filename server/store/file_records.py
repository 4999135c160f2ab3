"""What is known about each file, in Redis: whose it is, how large, and until when it is kept."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from server.store.connection import Client
from server.store.pages import Cut, ids_on_page
from server.store.reaching import reached

_PREFIX: Final = "tidegate:{batches}"
_SEQUENCE: Final = f"{_PREFIX}:sequence"
_BYTES: Final = f"{_PREFIX}:bytes"
_EXPIRING: Final = f"{_PREFIX}:expiring"

# Write a record once, if it fits into what its tenant may keep (ARGV[3] bytes; 0 for any). 1: it is there.
_ADD: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local size, quota = tonumber(ARGV[2]), tonumber(ARGV[3])
local used = tonumber(redis.call('HGET', KEYS[2], ARGV[4]) or '0')
if quota > 0 and used + size > quota then return 0 end
local sequence = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[2], ARGV[4], size)
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[6])
redis.call('ZADD', KEYS[5], sequence, ARGV[6])
redis.call('ZADD', KEYS[6], sequence, ARGV[6])
return 1
"""
_DELETE: Final = """
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
if redis.call('HINCRBY', KEYS[2], ARGV[1], -tonumber(ARGV[2])) <= 0 then redis.call('HDEL', KEYS[2], ARGV[1]) end
for i = 3, 5 do redis.call('ZREM', KEYS[i], ARGV[3]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file. `size` in bytes, times in Unix seconds; `folder` is the data folder that holds its body."""

    id: str
    tenant: str
    folder: str
    filename: str
    purpose: str
    size: int
    created_at: int
    expires_at: int


class FileRecords:
    """Reads and writes the records. Every method raises `RedisUnavailable` when Redis does not answer."""

    def __init__(self, client: Client) -> None:
        self._redis: Any = client  # redis-py types both of its clients' commands as "maybe awaitable"

    async def add(self, file: StoredFile, quota_bytes: int = 0) -> bool:
        """Keep a record; again is as once. False: the tenant's quota has no room for it. 0: no quota."""
        keys = (_record(file.id), _BYTES, _SEQUENCE, _EXPIRING, *_indexes(file))
        values = (json.dumps(asdict(file)), file.size, quota_bytes, file.tenant, file.expires_at, file.id)
        async with reached():
            return bool(await self._redis.eval(_ADD, len(keys), *keys, *values))

    async def find(self, file_id: str) -> StoredFile | None:
        async with reached():
            found = await self._redis.get(_record(file_id))
        return None if found is None else StoredFile(**json.loads(found))

    async def delete(self, file: StoredFile) -> bool:
        """Forget a file. False: somebody else has."""
        keys = (_record(file.id), _BYTES, _EXPIRING, *_indexes(file))
        async with reached():
            return bool(await self._redis.eval(_DELETE, len(keys), *keys, file.tenant, file.size, file.id))

    async def page(self, tenant: str, purpose: str | None, cut: Cut) -> tuple[list[StoredFile], bool]:
        """One page of a tenant's files, and whether there are more. Raises `UnknownCursor`."""
        async with reached():
            ids, more = await ids_on_page(self._redis, _index(tenant, purpose), cut)
            found = await self._redis.mget([_record(file_id) for file_id in ids]) if ids else []
        return [StoredFile(**json.loads(record)) for record in found if record is not None], more

    async def used_bytes(self, tenant: str) -> int:
        """What a tenant's files take together."""
        async with reached():
            return int(await self._redis.hget(_BYTES, tenant) or 0)

    async def expired(self, now_s: float, limit: int) -> list[StoredFile]:
        """Files that are kept no longer."""
        async with reached():
            ids = await self._redis.zrangebyscore(_EXPIRING, "-inf", int(now_s), start=0, num=limit)
            found = await self._redis.mget([_record(file_id.decode()) for file_id in ids]) if ids else []
        return [StoredFile(**json.loads(record)) for record in found if record is not None]


def _record(file_id: str) -> str:
    return f"{_PREFIX}:file:{file_id}"


def _index(tenant: str, purpose: str | None) -> str:
    return f"{_PREFIX}:files:{tenant}" if purpose is None else f"{_PREFIX}:files:{tenant}:{purpose}"


def _indexes(file: StoredFile) -> tuple[str, str]:
    return _index(file.tenant, None), _index(file.tenant, file.purpose)
