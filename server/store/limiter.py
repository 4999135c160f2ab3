"""Charges tenants in Redis, and in this process alone while Redis does not answer.

No request fails because Redis did. A few wait for it in vain, at most `_MOST_FAILURES` of them for the whole timeout;
then nobody asks it until it has answered a probe.
"""

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import structlog

from server.policy.limits import Cost, Moments, Refused, Scope
from server.store.beats import until_beat
from server.store.connection import FAILURES, TIMEOUT_S
from server.store.ending import ended
from server.store.joined_calls import Asked
from server.store.limit_script import Answer, LimitScript, leases_key
from server.store.local_limits import LocalLimits
from server.store.usage import UsageEntry

log = structlog.get_logger(__name__)

Mode = Literal["redis", "local"]

_MOST_FAILURES: Final = 3
# Redis answers in well under a millisecond. After this long a request waits on only while few others do.
_PATIENCE_S: Final = 0.015
_TURNS_TO_READ: Final = 3
_PROBE_INTERVAL_S: Final = 2.0
_ALIVE_TTL_US: Final = 15_000_000
_HEARTBEAT_S: Final = 20.0
_SETTLES_KEPT: Final = 50_000
_LAST_SETTLES_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Charge:
    """What is asked for. `lease` names the client's request where this is its first part, else it is None."""

    scopes: tuple[Scope, ...]
    cost: Cost
    lease: str | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """A charge that was made. `here` counts the times that this process had to decide alone; None: Redis decided.

    `moments` are those of each scope after it, in the microseconds of `now_us`.
    """

    charge: Charge
    now_us: int
    moments: tuple[Moments, ...]
    here: int | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """A charge that was not made, and how every scope stands."""

    scopes: tuple[Scope, ...]
    refused: Refused
    now_us: int
    moments: tuple[Moments, ...]


@dataclass(frozen=True, slots=True)
class _Settle:
    """Told until Redis confirms it. By its name Redis knows one that it has heard, and whose answer was lost."""

    scopes: tuple[Scope, ...]
    change: Cost
    lease: str | None = None
    usage: UsageEntry | None = None
    name: str = field(default_factory=lambda: secrets.token_hex(8))


class Limiter:
    """One for each process. `replica` is its name among those that share the Redis."""

    def __init__(
        self, script: LimitScript, replica: str, timeout_s: float = TIMEOUT_S, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        self._script = script
        self._replica = replica
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._local = LocalLimits()
        self._failures = 0
        self._patient = 0
        self._outages = 0
        self._replicas = 1
        self._leases: dict[str, tuple[Scope, ...]] = {}
        self._pending: deque[_Settle] = deque(maxlen=_SETTLES_KEPT)
        self._settling: set[asyncio.Future[None]] = set()
        self._abandoned: set[asyncio.Future[Answer]] = set()
        self._lost = asyncio.Event()

    @property
    def mode(self) -> Mode:
        return "local" if self._failures >= _MOST_FAILURES else "redis"

    @property
    def replicas(self) -> int:
        """How many replicas were alive when Redis last said."""
        return self._replicas

    @property
    def untold(self) -> int:
        """How many settles Redis has not confirmed yet."""
        return len(self._settling) + len(self._pending) + len(self._abandoned)

    async def charge(self, charge: Charge) -> Granted | Denied:
        """Charge every scope, or none."""
        verdict = await self._in_redis(charge) if self._may_ask() else None
        if verdict is None:
            verdict = self._here(charge)
        if isinstance(verdict, Granted) and charge.lease is not None:
            self._leases[charge.lease] = charge.scopes
        return verdict

    def settle(self, granted: Granted, used: Cost, lease: str | None, usage: UsageEntry | None) -> None:
        """Charge what was used in place of what was reserved. `lease` is the one that ends with it, if any does.

        It returns at once and cannot be cancelled; Redis is told in the background, later if it does not answer.
        """
        change = used - granted.charge.cost
        scopes = granted.charge.scopes
        if lease is not None:
            self._leases.pop(lease, None)
        if granted.here is not None and granted.here == self._outages and self.mode == "local":
            self._local.settle(scopes, change, clock_us(), self._replicas)
            change = Cost()
        self._tell(_Settle(scopes, change, lease, usage))

    def record(self, usage: UsageEntry) -> None:
        """Note the usage of a tenant that has no limits."""
        self._tell(_Settle((), Cost(), None, usage))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep leases and this replica's name alive, and look for a Redis that was lost. Leaving tells it the rest."""
        tending = [asyncio.create_task(self._tend()), asyncio.create_task(self._keep_leases())]
        try:
            yield
        finally:
            await ended(tending)
            if self._settling:
                await asyncio.wait(self._settling, timeout=_LAST_SETTLES_S)

    def _may_ask(self) -> bool:
        return self._failures + self._patient < _MOST_FAILURES

    async def _in_redis(self, charge: Charge) -> Granted | Denied | None:
        """Redis's verdict, or None where it has none to give in time."""
        asked = self._script.charge(charge.scopes, charge.cost, charge.lease)
        try:
            await self._wait_for(asked.answer)
        except asyncio.CancelledError:
            self._abandon(asked, charge)
            raise
        if not asked.answer.done():
            self._abandon(asked, charge)
            return None
        try:
            answer = asked.answer.result()
        except FAILURES as error:
            self._failed(error)
            return None
        self._answered()
        ahead_us = clock_us() - answer.now_us
        for scope, moments in zip(charge.scopes, answer.moments, strict=True):
            self._local.learn(scope, moments, ahead_us)
        if answer.refused is not None:
            return Denied(charge.scopes, answer.refused, answer.now_us, answer.moments)
        return Granted(charge, answer.now_us, answer.moments)

    async def _wait_for(self, answer: "asyncio.Future[Answer]") -> None:
        """Wait a little; then to the end, if that is not more than the failures that are still allowed."""
        if await _done(answer, _PATIENCE_S) or not self._may_ask():
            return
        self._patient += 1
        try:
            answered = await _done(answer, self._timeout_s - _PATIENCE_S)
        finally:
            self._patient -= 1
        if not answered:
            self._failed(TimeoutError(f"no answer in {self._timeout_s * 1000:.0f} ms"))

    def _abandon(self, asked: Asked[Answer], charge: Charge) -> None:
        """Nobody waits for this answer any more. If the charge is made after all, it is taken back."""
        if asked.withdraw():
            return

        def take_back(answer: "asyncio.Future[Answer]") -> None:
            self._abandoned.discard(answer)
            if answer.cancelled() or answer.exception() is not None or answer.result().refused is not None:
                return
            self._tell(_Settle(charge.scopes, Cost() - charge.cost, charge.lease))

        self._abandoned.add(asked.answer)
        asked.answer.add_done_callback(take_back)

    def _here(self, charge: Charge) -> Granted | Denied:
        """Decide alone. While Redis is there and only slow, it is told at once."""
        now_us = clock_us()
        held = Counter(scope.key for scopes in self._leases.values() for scope in scopes)
        wanted = {scope.key: held[scope.key] for scope in charge.scopes if charge.lease is not None}
        refused = self._local.charge(charge.scopes, charge.cost, wanted, now_us, self._replicas)
        moments = tuple(self._local.moments(scope) for scope in charge.scopes)
        if refused is not None:
            return Denied(charge.scopes, refused, now_us, moments)
        if self.mode == "local":
            return Granted(charge, now_us, moments, self._outages)
        self._local.acknowledge(charge.scopes)
        self._tell(_Settle(charge.scopes, charge.cost))
        return Granted(charge, now_us, moments)

    def _tell(self, settle: _Settle) -> None:
        if settle.change == Cost() and settle.lease is None and settle.usage is None:
            return
        if self.mode == "local":
            self._pending.append(settle)
            return
        answer = self._script.settle(settle.scopes, settle.change, settle.lease, settle.usage, settle.name).answer
        self._settling.add(answer)
        answer.add_done_callback(partial(self._settled, settle))

    def _settled(self, settle: _Settle, answer: "asyncio.Future[None]") -> None:
        self._settling.discard(answer)
        error = None if answer.cancelled() else answer.exception()
        if error is not None or answer.cancelled():
            self._pending.append(settle)
        if isinstance(error, Exception):
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            self._outages += 1
            self._lost.set()
            log.warning(
                "Redis does not answer; limits are kept in this process", error=str(error), replicas=self._replicas
            )

    def _answered(self) -> None:
        """Redis is there. If it was lost, it is told what was let in meanwhile, as far as it has not drained."""
        lost, self._failures = self.mode == "local", 0
        if not lost:
            return
        debts = self._local.debts(clock_us(), self._replicas)
        log.info("Redis answers again", debts=len(debts), settles=len(self._pending))
        for debt in debts:
            self._tell(_Settle((debt.scope,), debt.cost))

    async def _tend(self) -> None:
        while True:
            self._lost.clear()
            try:
                self._replicas = await self._script.alive(self._replica, _ALIVE_TTL_US)
            except FAILURES as error:
                self._failed(error)
            else:
                self._answered()
                for _ in range(len(self._pending)):
                    self._tell(self._pending.popleft())
            if self._failures:
                await asyncio.sleep(_PROBE_INTERVAL_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(until_beat(_PROBE_INTERVAL_S)):
                        await self._lost.wait()

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            held: dict[str, list[str]] = {}
            for lease, scopes in self._leases.items():
                for scope in scopes:
                    if scope.limits.concurrency is not None:
                        held.setdefault(leases_key(scope), []).append(lease)
            with suppress(*FAILURES):  # the next beat is in time
                for key, leases in held.items():
                    await self._script.renew(key, leases)


async def _done(answer: "asyncio.Future[Any]", timeout_s: float) -> bool:
    """Whether an answer comes in time. When the loop itself was held up, what arrived meanwhile is read first."""
    await asyncio.wait({answer}, timeout=timeout_s)
    for _ in range(_TURNS_TO_READ):
        if answer.done():
            break
        await asyncio.sleep(0)
    return answer.done()


def clock_us() -> int:
    """This process's clock, in microseconds."""
    return time.monotonic_ns() // 1000
