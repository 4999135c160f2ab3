"""The limits of this process alone, for when Redis cannot be asked: the Python twin of the script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cachetools import LRUCache

from server.policy.limits import (
    CONCURRENCY_WAIT_US,
    NEVER,
    RATES,
    Bucket,
    Cost,
    Moments,
    Refused,
    Scope,
    limit_of,
    moved,
    settle,
    share_of,
    wait,
)
from server.policy.tenants import Limits

_SCOPES_KNOWN: Final = 20_000


@dataclass(frozen=True, slots=True)
class Debt:
    """What this process let in while Redis did not know, and what has not drained since."""

    scope: Scope
    cost: Cost


@dataclass(frozen=True, slots=True)
class _Known:
    """`told` is what Redis last said, in this process's clock; `moments` adds what was let in here since."""

    scope: Scope
    told: Moments
    moments: Moments


class LocalLimits:
    """A bucket for each scope that was charged lately. Time is the caller's, in microseconds of a monotonic clock."""

    def __init__(self) -> None:
        self._known: LRUCache[str, _Known] = LRUCache(_SCOPES_KNOWN)

    def learn(self, scope: Scope, moments: Moments, ahead_us: int) -> None:
        """What Redis said of a scope; `ahead_us` is how far this process's clock is ahead of Redis's."""
        here = moved(moments, ahead_us)
        self._known[scope.key] = _Known(scope, here, here)

    def moments(self, scope: Scope) -> Moments:
        known = self._known.get(scope.key)
        return known.moments if known is not None else NEVER

    def charge(
        self, scopes: Sequence[Scope], cost: Cost, held: Mapping[str, int], now_us: int, replicas: int = 1
    ) -> Refused | None:
        """Charge a replica's share: each unit weighs as many as there are replicas.

        `held` is how many leases of a scope this process holds, where the request wants one of its own. A bucket that
        has drained takes a request of any size, so that one which only the whole limit could hold gets through.
        """
        for scope in scopes:
            most = scope.limits.concurrency
            if most is not None and held.get(scope.key, -1) >= -(-most // replicas):
                return Refused(scope, "concurrency", CONCURRENCY_WAIT_US)
        share = share_of(cost, replicas)
        refusals = [
            Refused(scope, rate.name, min(wait_us, moment.us - now_us))
            for scope in scopes
            for rate, moment in zip(RATES, self.moments(scope), strict=True)
            if (limit := limit_of(scope.limits, rate.name)) is not None
            and moment.us > now_us
            and (wait_us := wait(moment, rate, limit, share.of(rate), now_us)) > 0
        ]
        if refusals:
            return max(refusals, key=lambda refusal: refusal.wait_us)
        self.settle(scopes, cost, now_us, replicas)
        return None

    def settle(self, scopes: Sequence[Scope], change: Cost, now_us: int, replicas: int = 1) -> None:
        """Charge a difference, whatever the limits say: less than was charged before, or more."""
        share = share_of(change, replicas)
        for scope in scopes:
            self._move(scope, settle(Bucket(self.moments(scope)), scope.limits, share, None, now_us).moments)

    def acknowledge(self, scopes: Sequence[Scope]) -> None:
        """Redis is being told of what was charged here."""
        for scope in scopes:
            known = self._known[scope.key]
            self._known[scope.key] = replace(known, told=known.moments)

    def debts(self, now_us: int, replicas: int = 1) -> list[Debt]:
        """What Redis must still be told. It counts as told from here on."""
        found: list[Debt] = []
        for key, known in tuple(self._known.items()):
            found += _owed(known, now_us, replicas)
            self._known[key] = replace(known, told=known.moments)
        return found

    def _move(self, scope: Scope, moments: Moments) -> None:
        known = self._known.get(scope.key)
        self._known[scope.key] = _Known(scope, known.told if known is not None else NEVER, moments)


def _owed(known: _Known, now_us: int, replicas: int) -> list[Debt]:
    """One for each rate: a minute's tokens drain while a day's do not."""
    debts = []
    for rate, told, moment in zip(RATES, known.told, known.moments, strict=True):
        limit = limit_of(known.scope.limits, rate.name)
        ahead_us = moment.us - max(now_us, told.us)
        if limit is None or ahead_us <= 0:
            continue
        units = ahead_us * limit // (rate.period_us * replicas)
        if units:
            only = replace(known.scope, limits=Limits(**{rate.name: limit}))
            debts.append(Debt(only, Cost(requests=units) if rate.unit == "requests" else Cost(tokens=units)))
    return debts
