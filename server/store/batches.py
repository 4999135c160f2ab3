"""Batches in Redis: their records, which of them are open, and who runs them.

A record is replaced only by whoever read it last. A lease names the replica that runs a batch; it ends by itself when
that replica no longer renews it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from server.policy.batches import Batch, BatchError, Counts, Outputs, Usage
from server.store.connection import Client
from server.store.pages import Cut, ids_on_page
from server.store.reaching import reached

LEASE_S: Final = 10.0
_PREFIX: Final = "tidegate:{batches}"
_SEQUENCE: Final = f"{_PREFIX}:sequence"
# What has ended is shown for so long.
_REMEMBERED_S: Final = 90 * 24 * 3600

_ADD: Final = """
redis.call('SET', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[2])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[2])
return 1
"""
# Write a record if it still is what the caller has read. ARGV[4] > 0: it has ended, and is kept for so many seconds.
_REPLACE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if tonumber(ARGV[4]) > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[4])
  redis.call('ZREM', KEYS[2], ARGV[3])
end
return 1
"""
_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch, and its record as it was read, for a later `replace`."""

    batch: Batch
    record: bytes


class BatchRecords:
    """Reads and writes the records. Every method raises `RedisUnavailable` when Redis does not answer."""

    def __init__(self, client: Client) -> None:
        self._redis: Any = client  # redis-py types both of its clients' commands as "maybe awaitable"

    async def add(self, batch: Batch) -> None:
        keys = (_record(batch.id), _SEQUENCE, _index(batch.tenant), _open(batch.folder))
        async with reached():
            await self._redis.eval(_ADD, len(keys), *keys, _written(batch), batch.id, batch.created_at)

    async def find(self, batch_id: str) -> StoredBatch | None:
        async with reached():
            found = await self._redis.get(_record(batch_id))
        return None if found is None else StoredBatch(_read(found), found)

    async def replace(self, stored: StoredBatch, batch: Batch) -> StoredBatch | None:
        """Write the batch in place of what was read. None: it was changed meanwhile."""
        record = _written(batch)
        keys = (_record(batch.id), _open(batch.folder))
        values = (stored.record, record, batch.id, _REMEMBERED_S if batch.ended else 0)
        async with reached():
            done = await self._redis.eval(_REPLACE, len(keys), *keys, *values)
        return StoredBatch(batch, record) if done else None

    async def page(self, tenant: str, cut: Cut) -> tuple[list[Batch], bool]:
        """One page of a tenant's batches, and whether there are more. Raises `UnknownCursor`."""
        async with reached():
            ids, more = await ids_on_page(self._redis, _index(tenant), cut)
            found = await self._redis.mget([_record(batch_id) for batch_id in ids]) if ids else []
            gone = [batch_id for batch_id, record in zip(ids, found, strict=True) if record is None]
            if gone:
                await self._redis.zrem(_index(tenant), *gone)
        return [_read(record) for record in found if record is not None], more

    async def open(self, folder: str) -> list[Batch]:
        """Every batch of a data folder that has not ended, oldest first."""
        async with reached():
            ids = await self._redis.zrange(_open(folder), 0, -1)
            found = await self._redis.mget([_record(batch_id.decode()) for batch_id in ids]) if ids else []
        return [_read(record) for record in found if record is not None]

    async def take(self, batch_id: str, replica: str) -> bool:
        """Lease a batch for `LEASE_S`. False: another replica has it."""
        async with reached():
            return bool(await self._redis.set(_lease(batch_id), replica, nx=True, px=int(LEASE_S * 1000)))

    async def renew(self, batch_id: str, replica: str) -> bool:
        """Lease it for `LEASE_S` more. False: the lease is lost."""
        async with reached():
            return bool(await self._redis.eval(_RENEW, 1, _lease(batch_id), replica, int(LEASE_S * 1000)))

    async def release(self, batch_id: str, replica: str) -> None:
        """Give the lease back, if it is still there."""
        async with reached():
            await self._redis.eval(_RELEASE, 1, _lease(batch_id), replica)


def _written(batch: Batch) -> bytes:
    return json.dumps(asdict(batch)).encode()


def _read(record: bytes) -> Batch:
    fields: Mapping[str, Any] = json.loads(record)
    return Batch(
        **{
            **fields,
            "outputs": Outputs(**fields["outputs"]),
            "counts": Counts(**fields["counts"]),
            "usage": Usage(**fields["usage"]),
            "errors": tuple(BatchError(**error) for error in fields["errors"]),
        }
    )


def _record(batch_id: str) -> str:
    return f"{_PREFIX}:batch:{batch_id}"


def _lease(batch_id: str) -> str:
    return f"{_PREFIX}:lease:{batch_id}"


def _index(tenant: str) -> str:
    return f"{_PREFIX}:batches:{tenant}"


def _open(folder: str) -> str:
    return f"{_PREFIX}:open:{folder}"
