"""From a key to its tenant, with a real Redis that goes away, comes back and forgets."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from server.policy.refusals import InvalidApiKey, StoreUnavailable
from server.policy.tenants import ANYONE, Limits, Tenant
from server.serving.access import Access, OpenRule
from server.serving.declared_tenants import DeclaredTenants
from server.serving.tenant_desk import TenantDesk
from server.store.connection import connect
from server.store.keys import digest, new_key
from server.store.tenants import TenantRecords
from tests.store.running_redis import running_redis

pytestmark = pytest.mark.anyio

NO_ONE = ("", "EMPTY", "anything")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Line:
    """The way to a Redis, which a test can cut."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    def __getattr__(self, name: str) -> Any:
        return getattr(self.redis, name)


class Replica:
    """One process's view of the keys in a Redis."""

    def __init__(self, redis: Redis | None, rule: OpenRule | None = None, file: Path | None = None) -> None:
        rule = rule or OpenRule()
        if redis is None:
            redis, rule = cast(Redis, connect("unix:///nowhere")), replace(rule, never_stored=lambda: True)
        self.clock = Clock()
        self.line = Line(redis)
        self.declared = DeclaredTenants(file)
        records = TenantRecords(cast(Redis, self.line))
        self.access = Access(rule, self.declared, records, self.clock)
        self.desk = TenantDesk(records, self.declared, self.access, self.clock)

    async def new_tenant(self, name: str, expires_in_s: float | None = None) -> str:
        """A tenant's key."""
        await self.desk.create(Tenant(name))
        return (await self.desk.add_key(name, expires_in_s)).secret

    async def takes(self, key: str) -> bool:
        with suppress(InvalidApiKey):
            await self.access.caller(key)
            return True
        return False


@contextmanager
def cut_off(replica: Replica, nowhere: Redis) -> Iterator[None]:
    """Inside it, the replica's Redis does not answer."""
    connected, replica.line.redis = replica.line.redis, nowhere
    try:
        yield
    finally:
        replica.line.redis = connected


@pytest.fixture
async def nowhere() -> AsyncIterator[Redis]:
    client = connect("redis://127.0.0.1:1")
    assert isinstance(client, Redis)
    async with client:
        yield client


async def test_without_redis_and_keys_the_server_is_open() -> None:
    replica = Replica(None)
    assert replica.access.open
    for key in NO_ONE:
        assert await replica.access.caller(key) is ANYONE


async def test_with_an_empty_redis_the_server_is_open(redis: Redis) -> None:
    replica = Replica(redis)
    assert [await replica.access.caller(key) for key in NO_ONE] == [ANYONE] * 3


async def test_a_key_of_ours_that_is_unknown_is_refused_while_the_server_is_open(redis: Redis) -> None:
    for replica in (Replica(redis), Replica(None)):
        assert not await replica.takes(new_key())
        assert await replica.takes("EMPTY")


async def test_the_first_tenant_closes_the_server_and_deleting_the_last_opens_it(redis: Redis) -> None:
    replica = Replica(redis)
    key = await replica.new_tenant("search")
    assert (await replica.access.caller(key)).name == "search"
    assert [await replica.takes(other) for other in NO_ONE] == [False] * 3
    await replica.desk.revoke("search", None)
    assert not await replica.takes("EMPTY")
    await replica.desk.delete("search")
    assert await replica.takes("EMPTY")
    assert not await replica.takes(key)


@pytest.mark.parametrize("rule", [OpenRule(fixed_keys=("one", "two")), OpenRule(require_key=True)])
async def test_keys_of_the_settings_close_it_as_well_as_the_wish_for_a_key(redis: Redis, rule: OpenRule) -> None:
    for replica in (Replica(redis, rule), Replica(None, rule)):
        assert [await replica.takes(key) for key in NO_ONE] == [False] * 3
        assert [await replica.takes(key) for key in ("one", "two")] == [bool(rule.fixed_keys)] * 2


async def test_keys_of_the_settings_belong_to_no_tenant_and_work_beside_tenants(redis: Redis) -> None:
    replica = Replica(redis, OpenRule(fixed_keys=("one",)))
    key = await replica.new_tenant("search")
    assert await replica.access.caller("one") is ANYONE
    assert (await replica.access.caller(key)).name == "search"


async def test_all_refusals_say_the_same(redis: Redis) -> None:
    replica = Replica(redis)
    expired, revoked = await replica.new_tenant("a", expires_in_s=5), await replica.new_tenant("b")
    assert await replica.takes(expired)
    assert await replica.takes(revoked)
    await replica.desk.revoke("b", None)
    replica.clock.now_s += 5
    said = set()
    for key in (expired, revoked, new_key(), "unknown"):
        with pytest.raises(InvalidApiKey) as refused:
            await replica.access.caller(key)
        said.add(refused.value.message)
    assert len(said) == 1


async def test_all_refusals_take_the_same_time(redis: Redis) -> None:
    replica = Replica(redis)
    expired, revoked = await replica.new_tenant("a", expires_in_s=5), await replica.new_tenant("b")
    await replica.desk.revoke("b", None)
    replica.clock.now_s += 5
    taken_s: dict[str, list[float]] = {expired: [], revoked: [], new_key(): []}
    for _ in range(400):
        for key, times in taken_s.items():
            started_s = time.perf_counter()
            assert not await replica.takes(key)
            times.append(time.perf_counter() - started_s)
    fastest_s = [sorted(times)[20] for times in taken_s.values()]  # the slower ones waited for the machine
    assert max(fastest_s) - min(fastest_s) < 0.3 * min(fastest_s)


async def test_a_revoked_key_stops_in_another_process_within_two_seconds(redis: Redis) -> None:
    first, second = Replica(redis), Replica(redis)
    key = await first.new_tenant("search")
    watching = asyncio.create_task(second.access.watch(lambda _: None))
    assert await second.takes(key)
    await first.desk.revoke("search", None)
    revoked_s = time.monotonic()
    while await second.takes(key):
        assert time.monotonic() - revoked_s < 2
        await asyncio.sleep(0.01)
    watching.cancel()


async def test_what_is_known_is_not_asked_again_until_something_changes(redis: Redis) -> None:
    replica = Replica(redis)
    key = await replica.new_tenant("search")
    await replica.access.caller(key)
    before = await redis.info("commandstats")
    for _ in range(5):
        await replica.access.caller(key)
    after = await redis.info("commandstats")
    assert after["cmdstat_get"]["calls"] == before["cmdstat_get"]["calls"]


async def test_changed_limits_count_from_the_next_look_on(redis: Redis) -> None:
    first, second = Replica(redis), Replica(redis)
    key = await first.new_tenant("search")
    assert (await second.access.caller(key)).limits == Limits()
    await first.desk.change("search", lambda before: Tenant(before.name, limits=Limits(concurrency=1)))
    assert (await first.access.caller(key)).limits == Limits(concurrency=1)
    await second.access.refresh()
    assert (await second.access.caller(key)).limits == Limits(concurrency=1)


async def test_known_keys_keep_working_while_redis_is_away_and_others_are_told_to_wait(
    redis: Redis, nowhere: Redis
) -> None:
    replica = Replica(redis)
    known, unknown = await replica.new_tenant("search"), await replica.new_tenant("other")
    assert await replica.takes(known)
    with cut_off(replica, nowhere):
        await replica.access.refresh()
        assert (await replica.access.caller(known)).name == "search"
        with pytest.raises(StoreUnavailable) as refused:
            await replica.access.caller(unknown)
        assert refused.value.retry_after_s
        assert not await replica.takes("no key of ours")
        assert not await replica.takes("")
    await replica.access.refresh()
    assert await replica.takes(unknown)


async def test_a_key_that_was_known_to_be_stale_when_redis_went_keeps_working(redis: Redis, nowhere: Redis) -> None:
    replica = Replica(redis)
    key = await replica.new_tenant("search")
    assert await replica.takes(key)
    await replica.new_tenant("other")  # now everything is to be looked up again
    with cut_off(replica, nowhere):
        assert await replica.takes(key)


class Counting:
    """A Redis that answers nobody, and counts who asks."""

    def __init__(self) -> None:
        self.asked = 0

    async def get(self, name: str) -> None:
        del name
        self.asked += 1
        raise TimeoutError


async def test_a_redis_that_hangs_is_waited_for_by_one_request_and_not_by_each(redis: Redis) -> None:
    replica, hung = Replica(redis), Counting()
    key = await replica.new_tenant("search")
    assert await replica.takes(key)
    await replica.new_tenant("other")  # now everything is to be looked up again
    with cut_off(replica, cast(Redis, hung)):
        for _ in range(10):
            assert await replica.takes(key)
        assert hung.asked == 1
        replica.clock.now_s += 1
        assert await replica.takes(key)
        assert hung.asked == 2


async def test_a_redis_that_can_hold_nothing_need_not_answer_first(nowhere: Redis) -> None:
    replica = Replica(nowhere, OpenRule(never_stored=lambda: True))
    assert replica.access.open
    assert await replica.takes("EMPTY")
    assert not await replica.takes(new_key())


async def test_a_known_key_expires_also_while_redis_is_away(redis: Redis, nowhere: Redis) -> None:
    replica = Replica(redis)
    key = await replica.new_tenant("search", expires_in_s=5)
    assert await replica.takes(key)
    with cut_off(replica, nowhere):
        replica.clock.now_s += 5
        assert not await replica.takes(key)


async def test_while_nobody_knows_whether_there_are_tenants_nobody_comes_in_without_a_key(nowhere: Redis) -> None:
    replica = Replica(nowhere)
    assert replica.access.open is None
    for key in NO_ONE:
        with pytest.raises(StoreUnavailable):
            await replica.access.caller(key)


async def test_keys_of_the_settings_and_the_file_need_no_redis(nowhere: Redis, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(f'[tenants.a]\nkeys = [{{ sha256 = "{digest("from-the-file")}" }}]')
    replica = Replica(nowhere, OpenRule(fixed_keys=("one",)), file)
    assert await replica.access.caller("one") is ANYONE
    assert (await replica.access.caller("from-the-file")).name == "a"
    assert not await replica.takes("other")


async def test_a_redis_that_has_forgotten_everything_opens_nothing(redis: Redis) -> None:
    replica = Replica(redis)
    known, other = await replica.new_tenant("search"), await replica.new_tenant("other")
    assert await replica.takes(known)
    await redis.flushall()
    await replica.access.refresh()
    assert replica.access.open is False
    assert (await replica.access.caller(known)).name == "search"
    assert not await replica.takes("EMPTY")
    with pytest.raises(StoreUnavailable):
        await replica.access.caller(other)
    again = await replica.new_tenant("again")
    assert await replica.takes(again)
    assert not await replica.takes(known)


async def test_a_redis_that_ends_and_comes_back_is_used_again(tmp_path: Path) -> None:
    with running_redis(tmp_path) as embedded:
        client = Redis.from_url(embedded.url)
        replica = Replica(client)
        key = await replica.new_tenant("search")
        await replica.access.caller(key)
    await replica.access.refresh()
    assert await replica.takes(key)
    with running_redis(tmp_path):
        await replica.access.refresh()
        assert (await replica.access.caller(key)).name == "search"
        assert [entry.tenant.name for entry in await replica.desk.entries()] == ["search"]
        await client.aclose()


async def test_the_last_use_is_written_now_and_then(redis: Redis, nowhere: Redis) -> None:
    replica = Replica(redis)
    key = await replica.new_tenant("search")

    async def last_used_s() -> float | None:
        return (await replica.desk.entry("search")).keys[0].last_used_s

    await replica.access.flush()
    assert await last_used_s() is None
    first_s = replica.clock.now_s
    await replica.access.caller(key)
    with cut_off(replica, nowhere):
        await replica.access.flush()
    await replica.access.flush()
    assert await last_used_s() == first_s
    replica.clock.now_s += 59
    await replica.access.caller(key)
    await replica.access.flush()
    assert await last_used_s() == first_s
    replica.clock.now_s += 1
    await replica.access.caller(key)
    await replica.access.flush()
    assert await last_used_s() == first_s + 60


async def test_the_watch_tells_whether_the_server_is_open_and_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("")
    replica: Replica = Replica(None, file=file)
    told: asyncio.Queue[bool] = asyncio.Queue()
    watching = asyncio.create_task(replica.access.watch(told.put_nowait))
    async with asyncio.timeout(5):
        assert await told.get()
        file.write_text("[tenants.a]")
        replica.access.reload_declared()
        assert not await told.get()
    watching.cancel()


async def test_the_files_word_about_a_tenant_counts_more_than_that_of_redis(redis: Redis, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("")
    replica = Replica(redis, file=file)
    key = await replica.new_tenant("search")
    assert (await replica.access.caller(key)).traffic_class == "default"
    file.write_text("[tenants.search]\nclass = 'batch'")
    replica.declared.follow()
    assert (await replica.access.caller(key)).traffic_class == "batch"
