"""The script on a real Redis, against the Python rule."""

import asyncio
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from server.policy.limits import Bucket, Cost, Moment, Moments, Refused, Scope, charge, settle, too_large
from server.policy.tenants import Limits
from server.store.connection import connect
from server.store.limit_script import LimitScript, bucket_key, leases_key
from server.store.usage import TokenCounts, UsageBook, UsageEntry

pytestmark = pytest.mark.anyio

limits = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 20),
    tokens_per_minute=st.none() | st.integers(1, 2000) | st.integers(10**9, 10**12),
    tokens_per_day=st.none() | st.integers(1, 5000) | st.integers(10**9, 10**12),
    concurrency=st.none() | st.integers(1, 3),
)


@dataclass(slots=True)
class Twin:
    """The Python rule beside the script: both are given the same, at Redis's time."""

    script: LimitScript
    scopes: list[Scope]
    buckets: list[Bucket] = field(default_factory=list)
    held: list[tuple[str | None, Cost]] = field(default_factory=list)
    leases: int = 0
    settles: int = 0

    def __post_init__(self) -> None:
        self.buckets = [Bucket() for _ in self.scopes]

    async def charge(self, cost: Cost, with_lease: bool) -> None:
        self.leases += 1
        lease = f"lease-{self.leases}" if with_lease else None
        answer = await self.script.charge(self.scopes, cost, lease)
        verdict = charge(self.buckets, self.scopes, cost, lease, answer.now_us)
        if isinstance(verdict, Refused):
            assert answer.refused == verdict
        else:
            assert answer.refused is None
            self.buckets = list(verdict)
            self.held.append((lease, cost))
        for bucket, moments in zip(self.buckets, answer.moments, strict=True):
            assert ahead(moments, answer.now_us) == ahead(bucket.moments, answer.now_us)

    async def settle(self, change: Cost, lease: str | None) -> None:
        """Redis does not tell its time here. A shift back needs none; one forward is seen at the next charge."""
        self.settles += 1
        await self.script.settle(self.scopes, change, lease, None, f"settle-{self.settles}")
        self.buckets = [
            settle(bucket, scope.limits, change, lease, 0)
            for bucket, scope in zip(self.buckets, self.scopes, strict=True)
        ]


def ahead(moments: Moments, now_us: int) -> list[Moment]:
    """What is left to drain; what has drained leaves nothing, whenever it did."""
    return [Moment(one.us - now_us, one.rest) if one.us >= now_us else Moment() for one in moments]


@given(
    of_team=limits,
    of_user=st.none() | limits,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_random_walk_is_the_same_in_redis_and_in_python(
    redis_url: str, of_team: Limits, of_user: Limits | None, seed: int
) -> None:
    asyncio.run(walk(redis_url, of_team, of_user, random.Random(seed)))


async def walk(url: str, of_team: Limits, of_user: Limits | None, chance: random.Random) -> None:
    client = connect(url, timeout_s=5)
    try:
        await client.flushall()
        scopes = [Scope("tenant", "{team}", of_team)]
        if of_user is not None:
            scopes.append(Scope("end_user", "{team}:user:a", of_user))
        twin = Twin(LimitScript(client), scopes)
        for _ in range(40):
            if twin.held and chance.random() < 0.4:
                lease, cost = twin.held.pop(chance.randrange(len(twin.held)))
                await twin.settle(Cost(-cost.requests, -chance.randint(0, cost.tokens)), lease)
            else:
                tokens = chance.choice([0, 1, chance.randint(1, 1000), chance.randint(1, 10**8)])
                cost = Cost(chance.randint(0, 1), tokens)
                if all(too_large(scope.limits, cost) is None for scope in scopes):  # others never reach the script
                    await twin.charge(cost, chance.random() < 0.7)
    finally:
        await client.aclose()


@pytest.fixture
def script(redis: Redis) -> LimitScript:
    return LimitScript(redis)


def team(**given: int) -> list[Scope]:
    return [Scope("tenant", "{team}", Limits(**given))]


async def test_a_debt_drains_from_the_moment_it_is_known(script: LimitScript) -> None:
    scopes = team(tokens_per_minute=600)
    await script.settle(scopes, Cost(tokens=900), None, None, "one")
    answer = await script.charge(scopes, Cost(tokens=1), None)
    assert answer.refused is not None
    assert 30_000_000 - 1_000_000 < answer.refused.wait_us <= 30_100_000


async def test_a_bucket_expires_when_it_has_drained_and_leases_when_they_end(redis: Redis, script: LimitScript) -> None:
    scopes = team(tokens_per_minute=600, concurrency=1)
    await script.charge(scopes, Cost(tokens=10), "a")
    assert 0 < await redis.pttl(bucket_key(scopes[0])) <= 1_001
    assert 59_000 < await redis.pttl(leases_key(scopes[0])) <= 60_000
    await script.settle(scopes, Cost(tokens=-10), "a", None, "one")
    assert await redis.dbsize() == 1
    assert 0 < await redis.pttl(f"{bucket_key(scopes[0])}:told:one") <= 600_000


async def test_a_settle_that_is_told_twice_counts_once(redis: Redis, script: LimitScript) -> None:
    """Its answer may be lost where a Redis that hung has heard it."""
    scopes = team(tokens_per_day=1000)
    at = UsageEntry("team", "m", TokenCounts(1, 2, 0, 3), datetime.now(UTC))
    await script.charge(scopes, Cost(1, 900), None)
    for name in ("one", "one", "another", "one"):
        await script.settle(scopes, Cost(0, -100), None, at, name)
    assert (await script.charge(scopes, Cost(1, 301), None)).refused is not None
    assert (await script.charge(scopes, Cost(1, 299), None)).refused is None
    assert (await UsageBook(redis).read("team", at.at)).day["m"] == TokenCounts(2, 4, 0, 6)


async def test_a_renewed_lease_lasts_and_one_that_was_lost_is_there_again(redis: Redis, script: LimitScript) -> None:
    scopes = team(concurrency=1)
    await script.renew(leases_key(scopes[0]), ["a"])
    assert (await script.charge(scopes, Cost(1), "b")).refused is not None
    await redis.zadd(leases_key(scopes[0]), {"a": 1})
    assert (await script.charge(scopes, Cost(1), "b")).refused is None


async def test_a_redis_that_does_not_know_the_script_is_given_it(redis: Redis, script: LimitScript) -> None:
    for _ in range(2):
        await redis.script_flush()
        assert (await script.charge(team(tokens_per_minute=10), Cost(tokens=1), None)).refused is None


async def test_replicas_are_counted_until_they_fall_silent(script: LimitScript) -> None:
    assert await script.alive("a", 50_000) == 1
    assert await script.alive("b", 50_000) == 2
    await asyncio.sleep(0.1)
    assert await script.alive("a", 50_000) == 1


HOUR_US = 3_600_000_000


async def as_if_set_back(redis: Redis, scope: Scope) -> None:
    """What was written so far was written an hour later than now."""
    bucket, leases = bucket_key(scope), leases_key(scope)
    for name, value in (await redis.hgetall(bucket)).items():
        if name in (b"r", b"t", b"d", b"n") and value != b"0":
            await redis.hincrby(bucket, name.decode(), HOUR_US)
    await redis.persist(bucket)
    for lease in await redis.zrange(leases, 0, -1):
        assert isinstance(lease, bytes)
        await redis.zincrby(leases, HOUR_US, lease)


async def test_a_clock_that_is_set_back_keeps_nobody_out_and_forgives_nothing(
    redis: Redis, script: LimitScript
) -> None:
    scopes = team(tokens_per_minute=600)
    await script.charge(scopes, Cost(1, 400), None)
    await as_if_set_back(redis, scopes[0])
    refused = (await script.charge(scopes, Cost(1, 400), None)).refused
    assert refused is not None
    assert 15_000_000 < refused.wait_us <= 20_100_000
    assert (await script.charge(scopes, Cost(1, 200), None)).refused is None
    assert (await script.charge(scopes, Cost(1, 200), None)).refused is not None


async def test_a_lease_of_before_the_clock_was_set_back_does_not_outlive_its_holder(
    redis: Redis, script: LimitScript
) -> None:
    scopes = team(concurrency=1)
    await script.charge(scopes, Cost(1), "of a replica that is gone")
    await as_if_set_back(redis, scopes[0])
    assert (await script.charge(scopes, Cost(1), "b")).refused is None
    assert (await script.charge(scopes, Cost(1), "c")).refused is not None
