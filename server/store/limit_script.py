"""The operations of `limits.lua`. Those that are asked for while a call is under way share the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import RedisCluster
from redis.exceptions import NoScriptError

from server.policy.limits import LIMIT_NAMES, Cost, Moment, Moments, Refused, Scope, limit_of
from server.store.connection import Client
from server.store.joined_calls import Asked, JoinedCalls, Word, alone, one_place, tag_of
from server.store.usage import UsageEntry

_PREFIX: Final = "tidegate"
_REPLICAS: Final = f"{_PREFIX}:replicas"
_FIRST_MOMENT: Final = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What Redis says to a charge: whether it was refused, and how every scope stands by Redis's own clock."""

    refused: Refused | None
    now_us: int
    moments: tuple[Moments, ...]


def bucket_key(scope: Scope) -> str:
    return f"{_PREFIX}:{scope.key}:limits"


def leases_key(scope: Scope) -> str:
    return f"{_PREFIX}:{scope.key}:leases"


class LimitScript:
    """The script on one Redis. Every call raises one of `FAILURES` where Redis does not do it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._source = files(__package__).joinpath("limits.lua").read_text(encoding="utf-8")
        self._sha = sha1(self._source.encode(), usedforsecurity=False).hexdigest()
        # What a cluster keeps in different places cannot share a call.
        self._calls = JoinedCalls(self._run, tag_of if isinstance(client, RedisCluster) else one_place)

    def charge(self, scopes: Sequence[Scope], cost: Cost, lease: str | None) -> Asked[Answer]:
        """Ask at once; the answer is awaited. What was asked for before is done before."""

        def answer(reply: bytes) -> Answer:
            numbers = [int(number) for number in reply.split()]
            granted, scope, limit, wait_us, now_us = numbers[:_FIRST_MOMENT]
            refused = None if granted else Refused(scopes[scope - 1], LIMIT_NAMES[limit - 1], wait_us)
            return Answer(refused, now_us, tuple(_moments(numbers, number) for number in range(len(scopes))))

        words: list[Word] = ["charge", lease or "", cost.requests, cost.tokens, *_limits(scopes)]
        return self._calls.ask(_keys(scopes), words, answer)

    def settle(
        self, scopes: Sequence[Scope], change: Cost, lease: str | None, usage: UsageEntry | None, name: str
    ) -> Asked[None]:
        """Done once for each `name`, however often it is asked for within ten minutes."""
        keys = _keys(scopes)
        words: list[Word] = ["settle", lease or "", change.requests, change.tokens, len(scopes), *_limits(scopes)]
        if usage is not None:
            keys += usage.keys
            words += usage.arguments
        return self._calls.ask([*keys, f"{keys[0]}:told:{name}"], words, lambda _: None)

    async def renew(self, key: str, leases: Sequence[str]) -> None:
        await self._run([key], alone([key], ["renew", *leases]))

    async def alive(self, replica: str, ttl_us: int) -> int:
        """Say that a replica lives, and hear how many do. Waits for no other call."""
        count: int
        (count,) = await self._run([_REPLICAS], alone([_REPLICAS], ["alive", replica, ttl_us]))
        return count

    async def _run(self, keys: Sequence[str], words: Sequence[Word]) -> list[Any]:
        """By its hash; in full where Redis does not know it: it has restarted, or another one took over."""
        answers: list[Any]
        try:
            answers = await self._client.evalsha(self._sha, len(keys), *keys, *words)
        except NoScriptError:
            answers = await self._client.eval(self._source, len(keys), *keys, *words)
        return answers


def _keys(scopes: Sequence[Scope]) -> list[str]:
    return [key for scope in scopes for key in (bucket_key(scope), leases_key(scope))]


def _limits(scopes: Sequence[Scope]) -> list[int]:
    return [limit_of(scope.limits, name) or 0 for scope in scopes for name in LIMIT_NAMES]


def _moments(reply: Sequence[int], number: int) -> Moments:
    first = _FIRST_MOMENT + 6 * number
    r, rr, t, tr, d, dr = reply[first : first + 6]
    return Moment(r, rr), Moment(t, tr), Moment(d, dr)
