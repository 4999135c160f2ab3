"""Tenants and their keys in Redis. A key is stored as its digest; nothing in here can give it back.

Everything has the hash tag `{tenants}`, so that a Redis Cluster keeps it in one slot and steps can be atomic. `version`
changes with every change, which is how the other processes learn of it.
"""

import json
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from server.policy.tenants import Key, Tenant
from server.store.connection import Client
from server.store.reaching import reached
from server.store.tenant_forms import TenantForm, written

_PREFIX: Final = "tidegate:{tenants}"
_NAMES: Final = f"{_PREFIX}:names"
_VERSION: Final = f"{_PREFIX}:version"
_USED: Final = f"{_PREFIX}:used"

# Write a tenant's record if it still is what the caller has read ('' for none).
_REPLACE: Final = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('SET', KEYS[3], ARGV[4])
return 1
"""
# Write a key if its tenant is there.
_ADD_KEY: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return 1
"""


@dataclass(frozen=True, slots=True)
class RecordsState:
    """`version` None: Redis has never held a tenant, or has lost all of them."""

    version: str | None
    tenants: int


@dataclass(frozen=True, slots=True)
class StoredTenant:
    """A tenant, and its record as it was read, for a later `replace`."""

    tenant: Tenant
    record: str


class TenantRecords:
    """Reads and writes the records. Every method raises `RedisUnavailable` when Redis does not answer."""

    def __init__(self, client: Client) -> None:
        self._redis: Any = client  # redis-py types both of its clients' commands as "maybe awaitable"

    async def state(self, seen: RecordsState | None = None) -> RecordsState:
        """How they stand. `seen` is what was read last: under its version nothing has changed, nor is read again."""
        async with reached():
            found = await self._redis.get(_VERSION)
            version = None if found is None else _text(found)
            if seen is not None and version == seen.version:
                return seen
            return RecordsState(version, int(await self._redis.scard(_NAMES)))

    async def find_key(self, digest: str) -> Key | None:
        """The key with this digest, without its time of last use."""
        async with reached():
            record = await self._redis.get(_key(digest))
        return None if record is None else _read_key(record)

    async def find(self, name: str) -> StoredTenant | None:
        async with reached():
            record = await self._redis.get(_tenant(name))
        return None if record is None else _read_tenant(name, _text(record))

    async def all(self) -> list[StoredTenant]:
        """Every tenant, by name."""
        async with reached():
            names = sorted(_text(name) for name in await self._redis.smembers(_NAMES))
            records = await self._redis.mget([_tenant(name) for name in names]) if names else []
        return [
            _read_tenant(name, _text(record)) for name, record in zip(names, records, strict=True) if record is not None
        ]

    async def keys_of(self, name: str) -> list[Key]:
        """A tenant's keys with their time of last use, oldest first."""
        async with reached():
            digests = [_text(digest) for digest in await self._redis.hvals(_keys_of(name))]
            if not digests:
                return []
            records = await self._redis.mget([_key(digest) for digest in digests])
            keys = [_read_key(record) for record in records if record is not None]
            used = await self._redis.hmget(_USED, [key.key_id for key in keys]) if keys else []
        with_use = [
            key if last is None else replace(key, last_used_s=float(last)) for key, last in zip(keys, used, strict=True)
        ]
        return sorted(with_use, key=lambda key: (key.created_s, key.key_id))

    async def create(self, tenant: Tenant) -> bool:
        """Whether the name was free, and is the tenant's now."""
        return await self._replace("", tenant)

    async def change(self, before: StoredTenant, after: Tenant) -> bool:
        """False if the tenant has changed or gone since it was read."""
        return await self._replace(before.record, after)

    async def _replace(self, expected: str, tenant: Tenant) -> bool:
        keys = (_tenant(tenant.name), _NAMES, _VERSION)
        record = json.dumps(written(tenant), separators=(",", ":"))
        async with reached():
            done = await self._redis.eval(_REPLACE, len(keys), *keys, expected, record, tenant.name, _new_version())
        return bool(done)

    async def delete(self, name: str) -> None:
        """Forget a tenant and its keys."""
        async with reached():
            held = await self._redis.hgetall(_keys_of(name))
            async with self._step() as step:
                step.delete(_tenant(name), _keys_of(name), *(_key(_text(digest)) for digest in held.values()))
                step.srem(_NAMES, name)
                if held:
                    step.hdel(_USED, *held)

    async def add_key(self, key: Key, digest: str) -> bool:
        """Whether the key's tenant is there, and has the key now."""
        keys = (_tenant(key.tenant), _key(digest), _keys_of(key.tenant))
        async with reached():
            done = await self._redis.eval(_ADD_KEY, len(keys), *keys, _written_key(key), key.key_id, digest)
        return bool(done)

    async def drop_keys(self, name: str, key_ids: Iterable[str]) -> None:
        """Revoke keys of a tenant; those it does not have are passed over."""
        ids = list(key_ids)
        async with reached():
            digests = [_text(digest) for digest in await self._redis.hmget(_keys_of(name), ids) if digest is not None]
            async with self._step() as step:
                for digest in digests:
                    step.delete(_key(digest))
                step.hdel(_keys_of(name), *ids)
                step.hdel(_USED, *ids)

    async def expire_keys(self, name: str, keys: Sequence[Key], expires_s: float) -> None:
        """Let keys of a tenant end at a time, or when they would have ended anyway if that is sooner."""
        async with reached():
            digests = await self._redis.hmget(_keys_of(name), [key.key_id for key in keys])
            async with self._step() as step:
                for key, digest in zip(keys, digests, strict=True):
                    if digest is not None:
                        ends = expires_s if key.expires_s is None else min(expires_s, key.expires_s)
                        step.set(_key(_text(digest)), _written_key(replace(key, expires_s=ends)), xx=True)

    async def note_use(self, last_used_s: Mapping[str, float]) -> None:
        """Write when keys were last used, by key id."""
        async with reached():
            await self._redis.hset(_USED, mapping={key_id: round(at_s) for key_id, at_s in last_used_s.items()})

    @asynccontextmanager
    async def _step(self) -> AsyncIterator[Any]:
        """Commands that happen together, and the news of them."""
        async with self._redis.pipeline(transaction=True) as step:
            yield step
            step.set(_VERSION, _new_version())
            await step.execute()


def _tenant(name: str) -> str:
    return f"{_PREFIX}:tenant:{name}"


def _key(digest: str) -> str:
    return f"{_PREFIX}:key:{digest}"


def _keys_of(name: str) -> str:
    return f"{_PREFIX}:keys:{name}"


def _new_version() -> str:
    """Random, so that a Redis that was emptied never shows a version that was seen before."""
    return secrets.token_hex(8)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read_tenant(name: str, record: str) -> StoredTenant:
    return StoredTenant(TenantForm.model_validate_json(record).tenant(name), record)


def _written_key(key: Key) -> str:
    fields = {"id": key.key_id, "tenant": key.tenant, "created_s": key.created_s, "expires_s": key.expires_s}
    return json.dumps(fields, separators=(",", ":"))


def _read_key(record: bytes | str) -> Key:
    fields = json.loads(record)
    return Key(fields["id"], fields["tenant"], fields["created_s"], fields["expires_s"])
