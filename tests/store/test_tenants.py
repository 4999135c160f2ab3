"""Tenants and keys in a real Redis."""

from dataclasses import replace

import pytest
from redis.asyncio import Redis

from server.policy.tenants import Key, Limits, Tenant
from server.store.connection import connect
from server.store.keys import digest, key_id, new_key
from server.store.reaching import RedisUnavailable
from server.store.tenants import TenantRecords

pytestmark = pytest.mark.anyio

SEARCH = Tenant(
    "search",
    traffic_class="critical",
    limits=Limits(requests_per_minute=1, tokens_per_day=10**12),
    models=frozenset({"a", "org/b"}),
    trusted=True,
    end_user_limits=Limits(concurrency=2),
)


@pytest.fixture
def records(redis: Redis) -> TenantRecords:
    return TenantRecords(redis)


async def add_key(records: TenantRecords, tenant: str, created_s: float = 1, expires_s: float | None = None) -> str:
    """A new key's digest."""
    key_digest = digest(new_key())
    assert await records.add_key(Key(key_id(key_digest), tenant, created_s, expires_s), key_digest)
    return key_digest


async def test_an_empty_redis_has_no_tenants_and_no_version(records: TenantRecords) -> None:
    state = await records.state()
    assert (state.version, state.tenants) == (None, 0)
    assert await records.all() == []
    assert await records.find("search") is None
    assert await records.find_key(digest("tg-x")) is None


@pytest.mark.parametrize("tenant", [SEARCH, Tenant("plain")])
async def test_a_tenant_comes_back_as_it_was_stored(records: TenantRecords, tenant: Tenant) -> None:
    assert await records.create(tenant)
    found = await records.find(tenant.name)
    assert found is not None
    assert found.tenant == tenant


async def test_a_name_is_given_once(records: TenantRecords) -> None:
    assert await records.create(SEARCH)
    assert not await records.create(Tenant("search"))
    assert [found.tenant for found in await records.all()] == [SEARCH]


async def test_of_two_changes_to_the_same_record_one_wins(records: TenantRecords) -> None:
    await records.create(SEARCH)
    before = await records.find("search")
    assert before is not None
    assert await records.change(before, replace(SEARCH, traffic_class="batch"))
    assert not await records.change(before, replace(SEARCH, traffic_class="default"))
    after = await records.find("search")
    assert after is not None
    assert after.tenant.traffic_class == "batch"


async def test_a_tenant_that_has_gone_is_not_brought_back_by_a_change(records: TenantRecords) -> None:
    await records.create(SEARCH)
    before = await records.find("search")
    assert before is not None
    await records.delete("search")
    assert not await records.change(before, SEARCH)
    assert (await records.state()).tenants == 0


async def test_a_key_is_found_by_its_digest(records: TenantRecords) -> None:
    await records.create(SEARCH)
    key_digest = await add_key(records, "search", created_s=1.5, expires_s=9.25)
    assert await records.find_key(key_digest) == Key(key_id(key_digest), "search", 1.5, 9.25)


async def test_a_tenant_that_is_not_there_gets_no_key(records: TenantRecords) -> None:
    key_digest = digest("tg-x")
    assert not await records.add_key(Key(key_id(key_digest), "search", 1), key_digest)
    assert await records.find_key(key_digest) is None


async def test_keys_are_listed_oldest_first_with_their_last_use(records: TenantRecords) -> None:
    await records.create(SEARCH)
    later, earlier = await add_key(records, "search", 2), await add_key(records, "search", 1)
    await records.note_use({key_id(later): 7.4})
    assert [(key.key_id, key.last_used_s) for key in await records.keys_of("search")] == [
        (key_id(earlier), None),
        (key_id(later), 7),
    ]


async def test_a_revoked_key_is_gone_and_the_others_stay(records: TenantRecords) -> None:
    await records.create(SEARCH)
    gone, kept = await add_key(records, "search"), await add_key(records, "search")
    await records.drop_keys("search", [key_id(gone), "unknown"])
    assert await records.find_key(gone) is None
    assert [key.key_id for key in await records.keys_of("search")] == [key_id(kept)]


async def test_revoking_what_is_not_there_does_nothing(records: TenantRecords) -> None:
    await records.create(SEARCH)
    await records.drop_keys("search", ["unknown"])
    assert (await records.state()).tenants == 1


async def test_a_key_is_revoked_only_for_the_tenant_that_has_it(records: TenantRecords) -> None:
    await records.create(SEARCH)
    await records.create(Tenant("other"))
    key_digest = await add_key(records, "search")
    await records.drop_keys("other", [key_id(key_digest)])
    assert await records.find_key(key_digest) is not None


async def test_keys_end_at_a_time_or_sooner_if_they_would_have_anyway(records: TenantRecords) -> None:
    await records.create(SEARCH)
    digests = [await add_key(records, "search", expires_s=expires_s) for expires_s in (None, 5, 50)]
    await records.expire_keys("search", await records.keys_of("search"), 10)
    ends = [found.expires_s for each in digests if (found := await records.find_key(each)) is not None]
    assert ends == [10, 5, 10]


async def test_a_deleted_tenant_leaves_nothing_behind(records: TenantRecords, redis: Redis) -> None:
    await records.create(SEARCH)
    key_digest = await add_key(records, "search")
    await records.note_use({key_id(key_digest): 1})
    await records.delete("search")
    assert [key async for key in redis.scan_iter()] == [b"tidegate:{tenants}:version"]


async def test_what_stands_under_a_version_is_read_once(records: TenantRecords) -> None:
    await records.create(SEARCH)
    state = await records.state()
    assert await records.state(state) is state
    await records.delete("search")
    after = await records.state(state)
    assert (after.tenants, after.version != state.version) == (0, True)


async def test_every_change_that_others_must_hear_of_changes_the_version(records: TenantRecords) -> None:
    seen = {(await records.state()).version}

    async def is_new() -> bool:
        version = (await records.state()).version
        new = version not in seen
        seen.add(version)
        return new

    await records.create(SEARCH)
    assert await is_new()
    before = await records.find("search")
    assert before is not None
    await records.change(before, replace(SEARCH, trusted=True))
    assert await is_new()
    key_digest = await add_key(records, "search")
    await records.expire_keys("search", await records.keys_of("search"), 10)
    assert await is_new()
    await records.drop_keys("search", [key_id(key_digest)])
    assert await is_new()
    await records.delete("search")
    assert await is_new()


async def test_what_is_stored_does_not_hold_the_key(records: TenantRecords, redis: Redis) -> None:
    secret = new_key()
    await records.create(SEARCH)
    key_digest = digest(secret)
    await records.add_key(Key(key_id(key_digest), "search", 1), key_digest)
    for name in [name async for name in redis.scan_iter()]:
        assert secret.encode() not in name + await redis.dump(name)


async def test_a_redis_that_is_not_there_is_said_in_one_way() -> None:
    async with connect("redis://127.0.0.1:1") as nobody:
        records = TenantRecords(nobody)
        for asked in (records.state(), records.find_key("x"), records.create(SEARCH), records.delete("search")):
            with pytest.raises(RedisUnavailable):
                await asked
