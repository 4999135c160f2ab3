"""What an operator does with tenants and keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from server.policy.refusals import Conflict, InvalidRequest, NotFound, StoreUnavailable
from server.policy.tenants import Key, Tenant, name_problem
from server.serving.access import Access
from server.serving.declared_tenants import DeclaredTenants
from server.store.keys import digest, key_id, new_key
from server.store.reaching import RedisUnavailable
from server.store.tenants import StoredTenant, TenantRecords

log = structlog.get_logger(__name__)

_RETRY_AFTER_S: Final = 2.0
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class TenantEntry:
    """One tenant on the operator's list. `declared`: it stands in the tenants file, and changes there only."""

    tenant: Tenant
    declared: bool
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. This is the only time that `secret` is shown."""

    key: Key
    secret: str


class TenantDesk:
    """The operator's actions. Every one raises `StoreUnavailable` when Redis does not answer."""

    def __init__(
        self,
        records: TenantRecords,
        declared: DeclaredTenants,
        access: Access,
        clock: Callable[[], float],
    ) -> None:
        self._records = records
        self._declared = declared
        self._access = access
        self._clock = clock

    async def entries(self) -> list[TenantEntry]:
        """Every tenant, by name."""
        declared = [TenantEntry(tenant, declared=True) for tenant in self._declared.tenants.values()]
        async with self._reaching() as records:
            stored = [
                TenantEntry(found.tenant, declared=False, keys=tuple(await records.keys_of(found.tenant.name)))
                for found in await records.all()
                if found.tenant.name not in self._declared.tenants
            ]
        return sorted(declared + stored, key=lambda entry: entry.tenant.name)

    async def tenants(self) -> list[Tenant]:
        """Every tenant, without its keys."""
        declared = self._declared.tenants
        async with self._reaching() as records:
            stored = [found.tenant for found in await records.all() if found.tenant.name not in declared]
        return [*declared.values(), *stored]

    async def entry(self, name: str) -> TenantEntry:
        """One tenant. Raises `NotFound`."""
        if (tenant := self._declared.tenants.get(name)) is not None:
            return TenantEntry(tenant, declared=True)
        async with self._reaching() as records:
            found = await _found(records, name)
            return TenantEntry(found.tenant, declared=False, keys=tuple(await records.keys_of(name)))

    async def create(self, tenant: Tenant) -> None:
        """Add a tenant. The first one closes an open server. Raises `Conflict` if the name is taken."""
        if (problem := name_problem(tenant.name)) is not None:
            raise InvalidRequest(problem, param="name")
        self._refuse_declared(tenant.name)
        async with self._reaching() as records:
            if not await records.create(tenant):
                raise Conflict(f"There is a tenant `{tenant.name}` already.", param="name")
        log.info("tenant created", name=tenant.name)

    async def change(self, name: str, changed: Callable[[Tenant], Tenant]) -> Tenant:
        """Replace a tenant by what `changed` makes of it. Raises `NotFound` and `Conflict`."""
        self._refuse_declared(name)
        async with self._reaching() as records:
            for _ in range(_ATTEMPTS):
                before = await _found(records, name)
                if await records.change(before, after := changed(before.tenant)):
                    log.info("tenant changed", name=name)
                    return after
        raise Conflict(f"The tenant `{name}` is being changed by someone else. Please try again.")

    async def delete(self, name: str) -> None:
        """Forget a tenant and revoke its keys. Raises `NotFound` and `Conflict`."""
        self._refuse_declared(name)
        async with self._reaching() as records:
            await _found(records, name)
            await records.delete(name)
        log.info("tenant deleted", name=name)

    async def add_key(self, name: str, expires_in_s: float | None) -> NewKey:
        """Give a tenant one more key. Raises `NotFound` and `Conflict`."""
        self._refuse_declared(name)
        async with self._reaching() as records:
            made = await self._add_key(records, name, expires_in_s)
        log.info("key created", name=name, key_id=made.key.key_id)
        return made

    async def revoke(self, name: str, chosen: str | None) -> list[str]:
        """Revoke one key of a tenant, or all of them. Returns their ids. Raises `NotFound` and `Conflict`."""
        self._refuse_declared(name)
        async with self._reaching() as records:
            await _found(records, name)
            held = [key.key_id for key in await records.keys_of(name)]
            if chosen is not None and chosen not in held:
                raise NotFound(f"The tenant `{name}` has no key `{chosen}`.")
            revoked = held if chosen is None else [chosen]
            if revoked:
                await records.drop_keys(name, revoked)
        log.info("keys revoked", name=name, key_ids=revoked)
        return revoked

    async def rotate(self, name: str, grace_s: float, expires_in_s: float | None) -> NewKey:
        """Give a tenant a new key, and end those it had `grace_s` seconds from now."""
        self._refuse_declared(name)
        async with self._reaching() as records:
            await _found(records, name)
            before = await records.keys_of(name)
            made = await self._add_key(records, name, expires_in_s)
            if before and grace_s > 0:
                await records.expire_keys(name, before, self._clock() + grace_s)
            elif before:
                await records.drop_keys(name, [key.key_id for key in before])
        log.info("keys rotated", name=name, key_id=made.key.key_id, replaced=[key.key_id for key in before])
        return made

    async def _add_key(self, records: TenantRecords, name: str, expires_in_s: float | None) -> NewKey:
        secret, now_s = new_key(), self._clock()
        key_digest = digest(secret)
        key = Key(key_id(key_digest), name, now_s, None if expires_in_s is None else now_s + expires_in_s)
        if not await records.add_key(key, key_digest):
            raise _no_tenant(name)
        return NewKey(key, secret)

    def _refuse_declared(self, name: str) -> None:
        if name in self._declared.tenants:
            message = f"The tenant `{name}` stands in the tenants file of this server. Change it there."
            raise Conflict(message, param="name")

    @asynccontextmanager
    async def _reaching(self) -> AsyncIterator[TenantRecords]:
        """The records; what changed in them counts in this process at once."""
        try:
            yield self._records
        except RedisUnavailable as error:
            message = f"Redis, where the tenants are kept, does not answer: {error}"
            raise StoreUnavailable(message, retry_after_s=_RETRY_AFTER_S) from error
        await self._access.refresh()


async def _found(records: TenantRecords, name: str) -> StoredTenant:
    found = await records.find(name)
    if found is None:
        raise _no_tenant(name)
    return found


def _no_tenant(name: str) -> NotFound:
    return NotFound(f"There is no tenant `{name}`.")
