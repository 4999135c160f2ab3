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
from server.policy.tenants import ANYONE, OPERATOR, Key, Tenant
from server.serving.declared_tenants import DeclaredTenants
from server.store.beats import until_beat
from server.store.keys import KEY_PREFIX, digest
from server.store.reaching import RedisUnavailable
from server.store.tenants import RecordsState, TenantRecords

log = structlog.get_logger(__name__)

_WATCH_INTERVAL_S: Final = 1.0
_FAILURES_TOLD: Final = 2  # a single answer comes too late whenever the process imports an engine
_KNOWN_KEYS: Final = 20_000
# How exact the time of last use is, and how long it may stay unwritten.
_USE_NOTED_EVERY_S: Final = 60.0
_RETRY_AFTER_S: Final = 2.0
_WRONG_KEY: Final = "Incorrect API key provided. Check the key, or ask the operator of this server for a new one."
_NO_KEY: Final = "You did not provide an API key. Send one as `Authorization: Bearer <key>`."
_UNAVAILABLE: Final = "API keys cannot be checked at the moment. Please try again in a few seconds."


@dataclass(frozen=True, slots=True)
class OpenRule:
    """When callers need no key. `fixed_keys` come from the settings and belong to no tenant.

    `never_stored` tells of a Redis that has not answered yet whether it can hold nothing.
    """

    fixed_keys: Sequence[str] = ()
    require_key: bool = False
    never_stored: Callable[[], bool] = lambda: False


@dataclass(slots=True)
class _Known:
    """A key that was looked up, and what the world's version was just before."""

    key: Key
    tenant: Tenant
    version: tuple[str | None, int]
    use_noted_s: float = 0.0


class Access:
    """Knows the keys: those in Redis, those of the declared tenants and the fixed ones."""

    def __init__(
        self, rule: OpenRule, declared: DeclaredTenants, records: TenantRecords, clock: Callable[[], float]
    ) -> None:
        self._fixed = tuple(digest(key) for key in rule.fixed_keys)
        self._rule = rule
        self._declared = declared
        self._records = records
        self._clock = clock
        self._known: LRUCache[str, _Known] = LRUCache(_KNOWN_KEYS)
        self._state: RecordsState | None = None
        self._failed_s: float | None = None
        self._failures = 0  # in a row
        self._lost = False
        self._used: dict[str, float] = {}
        self._hurry = asyncio.Event()

    @property
    def open(self) -> bool | None:
        """Whether callers need no key; None while that stands in a Redis which has not answered yet."""
        if self._fixed or self._rule.require_key or self._declared.tenants:
            return False
        if self._state is not None:
            return self._state.tenants == 0 and not self._lost
        return True if self._surely_empty else None

    @property
    def _surely_empty(self) -> bool:
        return self._state is None and self._rule.never_stored()

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

    async def named(self, name: str) -> Tenant | None:
        """The tenant with a name as it is now, for work that goes on without its key. Raises `RedisUnavailable`."""
        for ours in (ANYONE, OPERATOR):
            if name == ours.name:
                return ours
        return await self._tenant(name)

    async def refresh(self) -> None:
        """Learn from Redis whether anything has changed."""
        try:
            seen = await self._records.state(self._state)
        except RedisUnavailable as error:
            self._note_failure(error)
            return
        if self._failures >= _FAILURES_TOLD:
            log.info("keys can be read from Redis again")
        self._failed_s, self._failures = None, 0
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
            if self._declared.in_a_file:
                await asyncio.to_thread(self._declared.follow)
            if self.open is not None and self.open != told:
                told = self.open
                on_change(told)
            await self.flush()
            with suppress(TimeoutError):
                async with asyncio.timeout(until_beat(_WATCH_INTERVAL_S)):
                    await self._hurry.wait()
            self._hurry.clear()

    async def flush(self) -> None:
        """Write when keys were used; what Redis does not take now is kept for the next time."""
        if not self._used:
            return
        used, self._used = self._used, {}
        try:
            await self._records.note_use(used)
        except RedisUnavailable:
            self._used = used | self._used

    async def _is_open(self) -> bool:
        if self.open is None and self._worth_asking():
            await self.refresh()
        if self.open is None:
            raise StoreUnavailable(_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S)
        return self.open

    def _worth_asking(self) -> bool:
        """Not right after Redis has failed to answer: each request would wait for it."""
        return self._failed_s is None or self._clock() - self._failed_s >= _WATCH_INTERVAL_S

    def _note_failure(self, error: RedisUnavailable) -> None:
        self._failures += 1
        if self._failures == _FAILURES_TOLD:
            log.warning("keys cannot be read from Redis; those known so far keep working", reason=str(error))
        self._failed_s = self._clock()

    @property
    def _version(self) -> tuple[str | None, int]:
        return (None if self._state is None else self._state.version), self._declared.generation

    async def _lookup(self, key_digest: str, *, ours: bool) -> _Known | None:
        known, version = self._known.get(key_digest), self._version
        if known is not None and known.version == version and not known.key.expired(self._clock()):
            return known  # an expired key is looked up like an unknown one, so that both take the same time
        try:
            found = await self._read(key_digest, version)
        except RedisUnavailable as error:
            if known is None and ours:
                raise StoreUnavailable(_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S) from error
            return known
        if found is None:
            self._known.pop(key_digest, None)
            return None
        if known is not None:
            found.use_noted_s = known.use_noted_s
        self._known[key_digest] = found
        return found

    async def _read(self, key_digest: str, version: tuple[str | None, int]) -> _Known | None:
        """Raises `RedisUnavailable`, also for a Redis that did not answer just now or has lost everything."""
        if self._surely_empty:
            return None
        if not self._worth_asking():
            raise RedisUnavailable("it did not answer just now")
        try:
            key = await self._records.find_key(key_digest)
            if key is not None and key.expired(self._clock()):
                return None  # without the second round trip, which an unknown key does not take either
            tenant = None if key is None else await self._tenant(key.tenant)
        except RedisUnavailable as error:
            self._note_failure(error)
            raise
        if key is None and self._lost:
            raise RedisUnavailable("it has lost all keys")
        return None if key is None or tenant is None else _Known(key, tenant, version)

    async def _tenant(self, name: str) -> Tenant | None:
        """The file's word counts more than that of Redis."""
        if (declared := self._declared.tenants.get(name)) is not None:
            return declared
        stored = await self._records.find(name)
        return None if stored is None else stored.tenant
