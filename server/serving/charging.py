"""Charges a client's request to its tenant before the engine runs it, and settles with what it used."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2s
from types import TracebackType
from typing import TYPE_CHECKING, Final

from server.policy.limits import (
    MOST_TOKENS_CHARGED,
    RATES,
    Cost,
    Moments,
    Refused,
    Scope,
    Standing,
    headers,
    is_limited,
    limit_of,
    moved,
    reserved_tokens,
    sentence,
    standings,
    too_large,
    used_tokens,
    wait,
)
from server.policy.refusals import CostAboveLimit, RateLimited
from server.policy.tenants import ANYONE, Tenant
from server.store.limiter import Charge, Denied, Granted, Limiter, clock_us
from server.store.usage import TokenCounts, UsageEntry, tenant_tag
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.seams import Demand
    from server.serving.requests import OpenRequest

# What other replicas give back is not seen here, so a refusal for tokens is not believed for longer.
_TOKENS_REMEMBERED_US: Final = 1_000_000
_REMEMBERED_SCOPES: Final = 10_000
_MODE_HEADER: Final = "x-ratelimit-mode"


@dataclass(frozen=True, slots=True)
class Pricing:
    """`cached_token_price`: what a prompt token found in the prefix cache counts, between 0 and 1.

    `open_reserve_tokens`: what is reserved for an answer whose length the request leaves open; None: all it may get.
    """

    cached_token_price: float = 1.0
    open_reserve_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Remembered:
    """How a scope stood when it was last refused, in this process's clock."""

    moments: Moments
    refused_us: int

    def is_recent(self, now_us: int) -> bool:
        return now_us - self.refused_us <= _TOKENS_REMEMBERED_US


class Charged:
    """The charge for one engine request, held inside `async with`. Entering raises `RateLimited` and `CostAboveLimit`.

    It is settled once, by whoever comes first: its generator's end, or the request's.
    """

    def __init__(self, charging: Charging, request: OpenRequest, demand: Demand) -> None:
        self.request = request
        self.demand = demand
        self.granted: Granted | None = None
        self._charging = charging
        self._settled = False

    async def __aenter__(self) -> None:
        self.granted = await self._charging.granted(self.request, self.demand)
        self.request.account.open.add(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def settle(self) -> None:
        """Nothing is awaited here, so nothing can cut it short."""
        if not self._settled:
            self._settled = True
            self._charging.settle(self)


class Charging:
    """`replica` is part of every lease's name, so that no two processes use the same."""

    def __init__(self, limiter: Limiter, replica: str, pricing: Pricing, metrics: Metrics) -> None:
        self._limiter = limiter
        self._pricing = pricing
        self._metrics = metrics
        self._leases = (f"{replica}:{number}" for number in itertools.count())
        self._remembered: dict[str, _Remembered] = {}
        metrics.watch_limiter(lambda: limiter.mode == "local")

    @property
    def mode(self) -> str:
        """Where limits are kept now: `redis`, or `local` while it does not answer."""
        return self._limiter.mode

    def check(self, request: OpenRequest) -> None:
        """Refuse what was refused a moment ago and would be again, before its prompt is tokenized.

        Raises `RateLimited`. The prompt's length is not known yet, so of its tokens only the answer's count.
        """
        now_us = clock_us()
        least = Cost(requests=1, tokens=request.asked_max_tokens or 1)
        for scope in scopes_of(request.tenant, request.end_user):
            known = self._remembered.get(scope.key)
            if known is None:
                continue
            refused = _still_refused(known, scope, least, now_us)
            if refused is not None:
                self._tell(request, standings(known.moments, scope.limits, now_us))
                raise self._refusal(refused)
            if not known.is_recent(now_us):
                del self._remembered[scope.key]

    def charge(self, request: OpenRequest, demand: Demand) -> Charged:
        """The cost of one engine request, to be held while it runs."""
        return Charged(self, request, demand)

    async def granted(self, request: OpenRequest, demand: Demand) -> Granted | None:
        """The charge that was made; None where the tenant has no limits."""
        scopes = scopes_of(request.tenant, request.end_user)
        if not scopes:
            return None
        account = request.account
        cost = Cost(requests=int(not account.counted), tokens=self._reserved(request, demand, scopes))
        _refuse_above_limits(scopes, cost, demand)
        lease = next(self._leases) if account.lease is None else None
        held = account.counted, account.lease
        account.counted, account.lease = True, account.lease or lease  # the request's other parts must see it at once
        try:
            started_s = time.perf_counter()
            verdict = await self._limiter.charge(Charge(scopes, cost, lease))
            self._metrics.limiter_asked(time.perf_counter() - started_s)
            self._tell(request, _all_standings(scopes, verdict))
            granted = self._accepted(verdict)
        except BaseException:
            account.counted, account.lease = held
            raise
        return granted

    def _accepted(self, verdict: Granted | Denied) -> Granted:
        if isinstance(verdict, Granted):
            return verdict
        self.remember(verdict)
        raise self._refusal(verdict.refused)

    def _reserved(self, request: OpenRequest, demand: Demand, scopes: tuple[Scope, ...]) -> int:
        """Tokens. A request that leaves its length open is never refused for what it might have asked."""
        left_open = demand.fills_window and request.asked_max_tokens is None
        reserve = self._pricing.open_reserve_tokens if left_open else None
        tokens = reserved_tokens(demand.prompt_tokens, demand.max_tokens, demand.n, reserve)
        if left_open:
            tokens = min(tokens, max(demand.prompt_tokens + 1, _smallest_token_limit(scopes, tokens)))
        return min(tokens, MOST_TOKENS_CHARGED)

    def settle(self, charged: Charged) -> None:
        """Give back what was not used, and tell what was."""
        request, demand, granted = charged.request, charged.demand, charged.granted
        account, progress = request.account, demand.progress
        account.open.discard(charged)
        account.in_engine |= progress.in_engine
        counts = _counts(demand)
        self._report(request, demand, counts)
        if request.tenant is ANYONE:
            return
        usage = UsageEntry(request.tenant.name, request.model_name, counts, datetime.now(UTC))
        if granted is None:
            if progress.in_engine:
                self._limiter.record(usage)
            return
        price = self._pricing.cached_token_price
        tokens = used_tokens(counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens, price)
        requests, lease = granted.charge.cost.requests, None
        if not account.open:
            lease, account.lease = account.lease, None
            if not account.in_engine:  # the server did not serve it, so it does not count
                requests, account.counted = requests - 1, False
        self._limiter.settle(granted, Cost(requests, tokens), lease, usage if progress.in_engine else None)
        for scope in granted.charge.scopes:
            self._remembered.pop(scope.key, None)

    def _report(self, request: OpenRequest, demand: Demand, counts: TokenCounts) -> None:
        if not demand.progress.in_engine:
            return
        request.figures.used(counts.cached_tokens, counts.completion_tokens, demand.n)
        used = counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens
        self._metrics.tenants.used(request.tenant.name, "batch" if request.of_batch else "online", used)

    def _tell(self, request: OpenRequest, found: list[Standing]) -> None:
        request.headers |= headers(found)
        if self.mode == "local":
            request.headers[_MODE_HEADER] = "local"

    def remember(self, denied: Denied) -> None:
        """Let `check` answer for a while what Redis has just said."""
        scope, now_us = denied.refused.scope, clock_us()
        if denied.refused.name == "concurrency":  # any request that ends makes room
            return
        if len(self._remembered) >= _REMEMBERED_SCOPES:
            self._remembered.clear()
        moments = denied.moments[denied.scopes.index(scope)]
        self._remembered[scope.key] = _Remembered(moved(moments, now_us - denied.now_us), now_us)

    def _refusal(self, refused: Refused) -> RateLimited:
        self._metrics.limit_refused(refused.name)
        return RateLimited(sentence(refused), retry_after_s=refused.wait_us / 1e6)


def scopes_of(tenant: Tenant, end_user: str | None) -> tuple[Scope, ...]:
    """Whose limits a request is charged to: the tenant's, and those of the end user that it named."""
    tag = tenant_tag(tenant.name)
    scopes = (Scope("tenant", tag, tenant.limits),) if is_limited(tenant.limits) else ()
    limits = tenant.end_user_limits
    if end_user is None or limits is None or not is_limited(limits):
        return scopes
    name = blake2s(end_user.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return (*scopes, Scope("end_user", f"{tag}:user:{name}", limits))


def _still_refused(known: _Remembered, scope: Scope, least: Cost, now_us: int) -> Refused | None:
    """Requests are rarely given back, tokens often, also by other replicas: a refusal for tokens soon grows old."""
    waits = [
        Refused(scope, rate.name, wait_us)
        for rate, moment in zip(RATES, known.moments, strict=True)
        if (limit := limit_of(scope.limits, rate.name)) is not None
        and (rate.unit == "requests" or known.is_recent(now_us))
        and (wait_us := wait(moment, rate, limit, least.of(rate), now_us)) > 0
    ]
    return max(waits, key=lambda refused: refused.wait_us, default=None)


def _refuse_above_limits(scopes: tuple[Scope, ...], cost: Cost, demand: Demand) -> None:
    for scope in scopes:
        rate = too_large(scope.limits, cost)
        if rate is not None:
            raise CostAboveLimit(
                f"This request needs {cost.tokens:,} tokens ({demand.prompt_tokens:,} in the prompt and the rest for "
                f"the answer), which is more than the limit of {limit_of(scope.limits, rate.name):,} tokens per "
                f"{rate.period}. Send a shorter prompt or a lower max_tokens.",
                param="max_tokens",
            )


def _smallest_token_limit(scopes: tuple[Scope, ...], default: int) -> int:
    limits = [limit_of(scope.limits, rate.name) for scope in scopes for rate in RATES if rate.unit == "tokens"]
    return min((limit for limit in limits if limit is not None), default=default)


def _counts(demand: Demand) -> TokenCounts:
    """What an engine request used; nothing where the engine never had it."""
    progress = demand.progress
    if not progress.in_engine:
        return TokenCounts()
    cached = min(progress.cached_tokens, demand.prompt_tokens)
    return TokenCounts(1, demand.prompt_tokens, cached, progress.completion_tokens)


def _all_standings(scopes: tuple[Scope, ...], verdict: Granted | Denied) -> list[Standing]:
    return [
        standing
        for scope, moments in zip(scopes, verdict.moments, strict=True)
        for standing in standings(moments, scope.limits, verdict.now_us)
    ]
