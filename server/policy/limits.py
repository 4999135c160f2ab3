"""How much a tenant may use: the rate rule of `server/store/limits.lua`, in Python.

Each rate is a GCRA (ITU-T I.371, "virtual scheduling"): one moment says when everything charged so far has drained.
A unit takes `period / limit` to drain, so a limit's whole period fits between now and that moment, and that is the
burst. Moments are whole microseconds and a rest in limit-ths of one: the arithmetic is exact at any limit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from server.policy.tenants import Limits

LimitName = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"]
ScopeKind = Literal["tenant", "end_user"]

# Whole numbers up to 2^53 are exact in Lua. With these, no intermediate result comes near.
MOST_PER_PERIOD: Final = 10**12
MOST_TOKENS_CHARGED: Final = 10**8
LEASE_US: Final = 60_000_000
# Nobody knows when another request ends.
CONCURRENCY_WAIT_US: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """One of the limits that drain with time."""

    name: LimitName
    unit: Literal["requests", "tokens"]
    period: str
    period_us: int


RATES: Final = (
    Rate("requests_per_minute", "requests", "minute", 60_000_000),
    Rate("tokens_per_minute", "tokens", "minute", 60_000_000),
    Rate("tokens_per_day", "tokens", "day", 86_400_000_000),
)
LIMIT_NAMES: Final[tuple[LimitName, ...]] = (*(rate.name for rate in RATES), "concurrency")


@dataclass(frozen=True, slots=True)
class Cost:
    """What is charged. Negative where it is given back."""

    requests: int = 0
    tokens: int = 0

    def of(self, rate: Rate) -> int:
        return self.requests if rate.unit == "requests" else self.tokens

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.requests - other.requests, self.tokens - other.tokens)


@dataclass(frozen=True, slots=True, order=True)
class Moment:
    """Microseconds, and a rest in limit-ths of one."""

    us: int = 0
    rest: int = 0


Moments = tuple[Moment, Moment, Moment]
NEVER: Final[Moments] = (Moment(), Moment(), Moment())


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is known of one scope: when each rate has drained, and until when each lease lasts."""

    moments: Moments = NEVER
    leases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose limits are charged. `key` tells scopes apart in Redis and in memory."""

    kind: ScopeKind
    key: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class Refused:
    """The limit that keeps a request out longest, and how long."""

    scope: Scope
    name: LimitName
    wait_us: int


def limit_of(limits: Limits, name: LimitName) -> int | None:
    value: int | None = getattr(limits, name)
    return value


def is_limited(limits: Limits) -> bool:
    return any(limit_of(limits, name) is not None for name in LIMIT_NAMES)


def charge(
    buckets: Sequence[Bucket], scopes: Sequence[Scope], cost: Cost, lease: str | None, now_us: int
) -> tuple[Bucket, ...] | Refused:
    """The buckets after a charge, all of them, or the refusal that leaves all as they are.

    `lease` None takes none: the request's other parts hold it already.
    """
    refusals = [
        refusal
        for bucket, scope in zip(buckets, scopes, strict=True)
        for refusal in _refusals(bucket, scope, cost, lease, now_us)
    ]
    if refusals:
        return max(refusals, key=lambda refusal: refusal.wait_us)  # the first of equals
    return tuple(
        _charged(bucket, scope.limits, cost, lease, now_us) for bucket, scope in zip(buckets, scopes, strict=True)
    )


def _refusals(bucket: Bucket, scope: Scope, cost: Cost, lease: str | None, now_us: int) -> list[Refused]:
    found = []
    for rate, moment in zip(RATES, bucket.moments, strict=True):
        if (limit := limit_of(scope.limits, rate.name)) is not None:
            wait_us = wait(moment, rate, limit, cost.of(rate), now_us)
            if wait_us > 0:
                found.append(Refused(scope, rate.name, wait_us))
    most = scope.limits.concurrency
    if most is not None and lease is not None and len(_live(bucket.leases, now_us)) >= most:
        found.append(Refused(scope, "concurrency", CONCURRENCY_WAIT_US))
    return found


def _charged(bucket: Bucket, limits: Limits, cost: Cost, lease: str | None, now_us: int) -> Bucket:
    leases = _live(bucket.leases, now_us)
    if lease is not None and limits.concurrency is not None:
        leases[lease] = now_us + LEASE_US
    return Bucket(_shifted(bucket.moments, limits, cost, now_us), leases)


def _live(leases: Mapping[str, int], now_us: int) -> dict[str, int]:
    return {lease: until_us for lease, until_us in leases.items() if until_us > now_us}


def settle(bucket: Bucket, limits: Limits, change: Cost, lease: str | None, now_us: int) -> Bucket:
    """The bucket when a request is over: `change` is what it used minus what was charged for it."""
    leases = {held: until_us for held, until_us in bucket.leases.items() if held != lease}
    return Bucket(_shifted(bucket.moments, limits, change, now_us), leases)


def _shifted(moments: Moments, limits: Limits, change: Cost, now_us: int) -> Moments:
    requests, minute, day = (
        moment
        if (limit := limit_of(limits, rate.name)) is None
        else shifted(moment, rate, limit, change.of(rate), now_us)
        for rate, moment in zip(RATES, moments, strict=True)
    )
    return requests, minute, day


def shifted(moment: Moment, rate: Rate, limit: int, amount: int, now_us: int) -> Moment:
    """When the rate has drained after `amount` more units, or fewer where it is negative."""
    if amount == 0 or (amount < 0 and moment.us == 0):
        return moment
    if amount > 0 and moment.us < now_us:
        moment = Moment(now_us)
    rest = moment.rest if moment.rest < limit else 0  # the limit was changed meanwhile
    carried_us, rest = divmod(rest + amount * rate.period_us, limit)
    return Moment(moment.us + carried_us, rest)


def wait(moment: Moment, rate: Rate, limit: int, amount: int, now_us: int) -> int:
    """Microseconds until `amount` units can be charged; 0: now. Nothing is charged for nothing, so it never waits."""
    if amount <= 0:
        return 0
    after = shifted(moment, rate, limit, amount, now_us)
    return max(0, after.us + (after.rest > 0) - rate.period_us - now_us)


def too_large(limits: Limits, cost: Cost) -> Rate | None:
    """The rate that could never take this cost, however long one waits."""
    for rate in RATES:
        limit = limit_of(limits, rate.name)
        if limit is not None and cost.of(rate) > limit:
            return rate
    return None


@dataclass(frozen=True, slots=True)
class Standing:
    """How one rate stands: what can be charged now, and when all of it can be again."""

    rate: Rate
    limit: int
    remaining: int
    reset_us: int


def standings(moments: Moments, limits: Limits, now_us: int) -> list[Standing]:
    """How each rate that has a limit stands."""
    found = []
    for rate, moment in zip(RATES, moments, strict=True):
        if (limit := limit_of(limits, rate.name)) is not None:
            ahead = max(0, (moment.us - now_us) * limit + moment.rest)  # in limit-ths of a microsecond
            remaining = max(0, (rate.period_us * limit - ahead) // rate.period_us)
            found.append(Standing(rate, limit, remaining, math.ceil(ahead / limit)))
    return found


def headers(standing: Sequence[Standing]) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*` headers: of each unit, the rate that has least left."""
    told = {}
    for unit in ("requests", "tokens"):
        of_unit = [one for one in standing if one.rate.unit == unit]
        if of_unit:
            tightest = min(of_unit, key=lambda one: one.remaining)
            told[f"x-ratelimit-limit-{unit}"] = str(tightest.limit)
            told[f"x-ratelimit-remaining-{unit}"] = str(tightest.remaining)
            told[f"x-ratelimit-reset-{unit}"] = duration(tightest.reset_us)
    return told


def duration(us: int) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `23h59m0s`; never less than it is."""
    milliseconds = math.ceil(us / 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{milliseconds / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def sentence(refused: Refused) -> str:
    """What the person reads whose request is refused."""
    whose = "Your team has" if refused.scope.kind == "tenant" else "You have"
    size = limit_of(refused.scope.limits, refused.name)
    if refused.name == "concurrency":
        reached = f"{whose} reached the limit of {_counted(size, 'requests')}"
        return f"{reached} at the same time. Please try again in a moment."
    rate = RATES[LIMIT_NAMES.index(refused.name)]
    reached = f"{whose} reached the limit of {_counted(size, rate.unit)}"
    return f"{reached} per {rate.period}. Please try again in {_spoken(refused.wait_us)}."


def _counted(size: int | None, units: str) -> str:
    return f"{size:,} {units if size != 1 else units.removesuffix('s')}"


def _spoken(us: int) -> str:
    """A time to wait in words, never less than it is."""
    amount, word = math.ceil(us / 1_000_000), "second"
    for size, larger in ((60, "minute"), (60, "hour")):
        if amount <= 2 * size:
            break
        amount, word = math.ceil(amount / size), larger
    return f"{amount} {word}{'' if amount == 1 else 's'}"


def moved(moments: Moments, by_us: int) -> Moments:
    """The same moments by a clock that is `by_us` ahead."""
    requests, minute, day = (Moment(one.us + by_us, one.rest) if one.us else one for one in moments)
    return requests, minute, day


def share_of(cost: Cost, replicas: int) -> Cost:
    """What a cost weighs in one of several replicas that cannot tell each other what they let in."""
    return Cost(cost.requests * replicas, cost.tokens * replicas)


def reserved_tokens(prompt_tokens: int, answer_tokens: int, choices: int, open_reserve: int | None) -> int:
    """What a request is charged when it comes.

    `open_reserve` is for a request that names no cap: the engine's is what the window leaves, and far too much.
    """
    answer = answer_tokens if open_reserve is None else min(answer_tokens, open_reserve)
    return prompt_tokens + answer * choices


def used_tokens(prompt_tokens: int, cached_tokens: int, completion_tokens: int, cached_price: float) -> int:
    """What a request is charged when it is over; a cached prompt token counts `cached_price` of one."""
    cached = min(cached_tokens, prompt_tokens)
    return prompt_tokens - cached + math.ceil(cached * cached_price) + completion_tokens
