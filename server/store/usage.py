"""What each tenant has used, by model: today's figures and this month's. Days and months are UTC."""

from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

from server.store.connection import Client

_DAY_S: Final = 86_400
_DAY_KEPT_S: Final = 35 * _DAY_S
_MONTH_KEPT_S: Final = 400 * _DAY_S
_TENANTS_AT_ONCE: Final = 50


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """`cached_tokens` are those of the prompt tokens that were found in the prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """One engine request's share in a tenant's figures."""

    tenant: str
    model: str
    counts: TokenCounts
    at: datetime

    @property
    def keys(self) -> list[str]:
        return [_day_key(self.tenant, self.at), _month_key(self.tenant, self.at)]

    @property
    def arguments(self) -> list[str | int]:
        """As `settle` in `limits.lua` takes them."""
        counts = self.counts
        return [
            self.model, _DAY_KEPT_S, _MONTH_KEPT_S,
            counts.requests, counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Usage:
    """Figures by model."""

    day: Mapping[str, TokenCounts]
    month: Mapping[str, TokenCounts]


class UsageBook:
    """Reads what the limiter has written."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self, tenant: str, at: datetime | None = None) -> Usage:
        """The figures of the day and the month around `at` (now). Raises one of `FAILURES`."""
        moment = (at or datetime.now(UTC)).astimezone(UTC)
        return Usage(
            day=await self._figures(_day_key(tenant, moment)), month=await self._figures(_month_key(tenant, moment))
        )

    async def today(self, tenants: Sequence[str], at: datetime | None = None) -> dict[str, TokenCounts]:
        """Each tenant's figures of the day, over its models. Raises one of `FAILURES`.

        Many are asked for in one round trip, but not all at once: streams wait while an answer is read.
        """
        moment = (at or datetime.now(UTC)).astimezone(UTC)
        figures: dict[str, TokenCounts] = {}
        for start in range(0, len(tenants), _TENANTS_AT_ONCE):
            some = tenants[start : start + _TENANTS_AT_ONCE]
            async with self._client.pipeline(transaction=False) as asked:
                for tenant in some:
                    asked.hgetall(_day_key(tenant, moment))
                found: list[dict[bytes, bytes]] = await asked.execute()
            figures.update((tenant, _summed(fields)) for tenant, fields in zip(some, found, strict=True))
        return figures

    async def _figures(self, key: str) -> dict[str, TokenCounts]:
        fields = await cast(Awaitable[dict[bytes, bytes]], self._client.hgetall(key))
        figures: dict[str, dict[str, int]] = {}
        for field, value in fields.items():
            model, _, name = field.decode().rpartition("|")
            figures.setdefault(model, {})[name] = int(value)
        return {model: TokenCounts(**counts) for model, counts in sorted(figures.items())}


def _summed(fields: Mapping[bytes, bytes]) -> TokenCounts:
    sums: Counter[str] = Counter()
    for field, value in fields.items():
        sums[field.decode().rpartition("|")[2]] += int(value)
    return TokenCounts(**sums)


def _day_key(tenant: str, at: datetime) -> str:
    return f"tidegate:{tenant_tag(tenant)}:usage:{at.date().isoformat()}"


def _month_key(tenant: str, at: datetime) -> str:
    return _day_key(tenant, at)[: -len("-DD")]


def tenant_tag(tenant: str) -> str:
    """The part of a key that a cluster hashes, so that all keys of a tenant lie in one place."""
    return f"{{{tenant}}}"
