"""Who is calling: from the key of a request to the tenant behind it.

Keys are looked up in Redis once and then known in this process. A version in Redis, read every second, says when what
is known has to be looked up again; while Redis does not answer, what is known stays true.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog
from cachetools import LRUCache

from server.policy.refusals import InvalidApiKey, StoreUnavailable
from server.policy.tenants import ANYONE, Key, Tenant
from server.serving.declared_tenants import DeclaredTenants
from server.store.keys import KEY_PREFIX, digest
from server.store.reaching import RedisUnavailable
from server.store.tenants import RecordsState, TenantRecords

log = structlog.get_logger(__name__)

_WATCH_INTERVAL_S: Final = 1.0
_KNOWN_KEYS: Final = 20_000
# How exact the time of last use is, and how long it may stay unwritten.
_USE_NOTED_EVERY_S: Final = 60.0
_RETRY_AFTER_S: Final = 2.0
_WRONG_KEY: Final = "Incorrect API key provided. Check the key, or ask the operator of this server for a new one."
_NO_KEY: Final = "You did not provide an API key. Send one as `Authorization: Bearer <key>`."
_UNAVAILABLE: Final = "API keys cannot be checked at the moment. Please try again in a few seconds."


@dataclass(frozen=True, slots=True)
class OpenRule:
    """When callers need no key. `fixed_keys` come from the settings and belong to no tenant."""

    fixed_keys: Sequence[str] = ()
    require_key: bool = False


@dataclass(slots=True)
class _Known:
    """A key that was looked up, and what the world's version was just before."""

    key: Key
    tenant: Tenant
    version: tuple[str | None, int]
    use_noted_s: float = 0.0


class Access:
    """Knows the keys. Without `records` there are only the declared tenants and the fixed keys."""

    def __init__(
        self, rule: OpenRule, declared: DeclaredTenants, records: TenantRecords | None, clock: Callable[[], float]
    ) -> None:
        self._fixed = tuple(digest(key) for key in rule.fixed_keys)
        self._require_key = rule.require_key
        self._declared = declared
        self._records = records
        self._clock = clock
        self._known: LRUCache[str, _Known] = LRUCache(_KNOWN_KEYS)
        self._state: RecordsState | None = None
        self._reachable = True
        self._lost = False
        self._asked_s: float | None = None
        self._used: dict[str, float] = {}
        self._hurry = asyncio.Event()

    @property
    def open(self) -> bool | None:
        """Whether callers need no key; None while that stands in a Redis which has not answered yet."""
        if self._fixed or self._require_key or self._declared.tenants:
            return False
        if self._records is None:
            return True
        return None if self._state is None else self._state.tenants == 0 and not self._lost

    async def caller(self, key: str) -> Tenant:
        """The tenant behind a key, or `ANYONE`. Raises `InvalidApiKey` and `StoreUnavailable`.

        An unknown, a revoked and an expired key take the same way and get the same answer.
        """
        key_digest, now_s = digest(key), self._clock()
        matches = [secrets.compare_digest(key_digest, fixed) for fixed in self._fixed]  # all of them, every time
        if any(matches):
            return ANYONE
        if (holder := self._declared.holder(key_digest, now_s)) is not None:
            return holder
        if not key.startswith(KEY_PREFIX) and await self._is_open():
            return ANYONE
        if not key:
            raise InvalidApiKey(_NO_KEY)
        known = await self._lookup(key_digest, ours=key.startswith(KEY_PREFIX))
        if known is None or known.key.expired(now_s):
            raise InvalidApiKey(_WRONG_KEY)
        if now_s - known.use_noted_s >= _USE_NOTED_EVERY_S:
            known.use_noted_s = self._used[known.key.key_id] = now_s
        return known.tenant

    async def refresh(self) -> None:
        """Learn from Redis whether anything has changed."""
        if self._records is None:
            return
        self._asked_s = self._clock()
        try:
            seen = await self._records.state()
        except RedisUnavailable as error:
            if self._reachable:
                log.warning("keys cannot be read from Redis; those known so far keep working", reason=str(error))
            self._reachable = False
            return
        if not self._reachable:
            log.info("keys can be read from Redis again")
        self._reachable = True
        if seen.version is None and self._state is not None and self._state.version is not None:
            if not self._lost:
                log.error("Redis has lost all tenants and keys. Those known here keep working; nobody else comes in.")
            self._lost = True
            return
        self._state, self._lost = seen, False

    def reload_declared(self) -> None:
        """Read the tenants file again, at the next opportunity."""
        self._declared.look_again()
        self._hurry.set()

    async def watch(self, on_change: Callable[[bool], None]) -> None:
        """Follow Redis and the tenants file, and write when keys were used, until cancelled.

        `on_change` is told whether the server is open, at first and whenever that changes.
        """
        told: bool | None = None
        while True:
            await self.refresh()
            await asyncio.to_thread(self._declared.follow)
            if self.open is not None and self.open != told:
                told = self.open
                on_change(told)
            await self.flush()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_INTERVAL_S):
                    await self._hurry.wait()
            self._hurry.clear()

    async def flush(self) -> None:
        """Write when keys were used; what Redis does not take now is kept for the next time."""
        if self._records is None or not self._used:
            return
        used, self._used = self._used, {}
        try:
            await self._records.note_use(used)
        except RedisUnavailable:
            self._used = used | self._used

    async def _is_open(self) -> bool:
        if self.open is None and (self._asked_s is None or self._clock() - self._asked_s >= _WATCH_INTERVAL_S):
            await self.refresh()
        if self.open is None:
            raise StoreUnavailable(_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S)
        return self.open

    @property
    def _version(self) -> tuple[str | None, int]:
        return (None if self._state is None else self._state.version), self._declared.generation

    async def _lookup(self, key_digest: str, *, ours: bool) -> _Known | None:
        known, version = self._known.get(key_digest), self._version
        if self._records is None or (known is not None and known.version == version):
            return known
        try:
            key = await self._records.find_key(key_digest)
            tenant = None if key is None else await self._tenant(key.tenant, self._records)
        except RedisUnavailable as error:
            if known is None and ours:
                raise StoreUnavailable(_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S) from error
            return known
        if self._lost and known is not None:
            return known
        if self._lost and ours:
            raise StoreUnavailable(_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S)
        if key is None or tenant is None:
            self._known.pop(key_digest, None)
            return None
        noted_s = 0.0 if known is None else known.use_noted_s
        self._known[key_digest] = found = _Known(key, tenant, version, noted_s)
        return found

    async def _tenant(self, name: str, records: TenantRecords) -> Tenant | None:
        """The file's word counts more than that of Redis."""
        if (declared := self._declared.tenants.get(name)) is not None:
            return declared
        stored = await records.find(name)
        return None if stored is None else stored.tenant
