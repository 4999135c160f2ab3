"""What tenants do: the metrics that grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

Work = Literal["online", "batch"]
Outcome = Literal["answered", "limited", "refused", "failed", "left"]
KINDS: Final = ("prompt", "cached", "completion")
OTHER: Final = "other"
_TOKENS: Final = "tidegate_tokens_total"
_REQUESTS: Final = "tidegate_tenant_requests_total"
_TOKENS_HEAD: Final = (
    f"# HELP {_TOKENS} Tokens of engine requests that are over, by tenant; `cached` is the part of `prompt` that was "
    f"found in the prefix cache\n# TYPE {_TOKENS} counter\n"
)
_REQUESTS_HEAD: Final = (
    f"# HELP {_REQUESTS} Requests for the engine by tenant and how they ended; `limited` is a 429, `refused` any other "
    f"4xx, `failed` a 5xx, `left` a client that did not wait\n# TYPE {_REQUESTS} counter\n"
)


class TenantCounts(msgspec.Struct, array_like=True):
    """What was counted, by tenant; tokens in the order of `KINDS`."""

    tokens: dict[tuple[str, Work], list[int]]
    requests: dict[tuple[str, Outcome], int]

    def used(self, tenant: str, work: Work, counts: Sequence[int]) -> None:
        totals = self.tokens.setdefault((tenant, work), [0] * len(KINDS))
        for position, count in enumerate(counts):
            totals[position] += count

    def ended(self, tenant: str, outcome: Outcome, count: int = 1) -> None:
        key = tenant, outcome
        self.requests[key] = self.requests.get(key, 0) + count

    def add(self, more: TenantCounts, label: Callable[[str], str]) -> None:
        """Add what was counted elsewhere, each tenant under the label it has here."""
        for (tenant, work), counts in more.tokens.items():
            self.used(label(tenant), work, counts)
        for (tenant, outcome), count in more.requests.items():
            self.ended(label(tenant), outcome, count)


class TenantMetrics:
    """The first `shown` tenants that come have a label of their own, and the rest share `other`.

    prometheus-client takes about 20 µs for a sample, which is too much for thousands of them on the event loop. So the
    lines are written here. The names need no escaping (`server/policy/tenants.py`).
    """

    def __init__(self, shown: int) -> None:
        self._most = shown
        self._shown: set[str] = set()
        self.counts = TenantCounts({}, {})

    def used(self, tenant: str, work: Work, counts: tuple[int, int, int]) -> None:
        """Add the tokens of one engine request, in the order of `KINDS`."""
        self.counts.used(self._label(tenant), work, counts)

    def ended(self, tenant: str, outcome: Outcome) -> None:
        """A client's request is over."""
        self.counts.ended(self._label(tenant), outcome)

    def add(self, counts: TenantCounts) -> None:
        """Take over for good what another process has counted."""
        self.counts.add(counts, self._label_of_others)

    def tokens(self, tenant: str, work: Work, kind: str) -> int:
        """What stands on the page for these labels."""
        return self.counts.tokens.get((tenant, work), [0] * len(KINDS))[KINDS.index(kind)]

    def page(self, others: Sequence[TenantCounts] = ()) -> str:
        """The metrics in Prometheus' text format, together with what other processes have counted.

        Tenants of others take labels here as those of this process do, so a tenant that once has a label keeps it.
        """
        counts = self.counts
        if others:
            counts = TenantCounts({key: [*totals] for key, totals in counts.tokens.items()}, dict(counts.requests))
            for other in others:
                counts.add(other, self._label_of_others)
        return f"{_TOKENS_HEAD}{''.join(_token_lines(counts))}{_REQUESTS_HEAD}{''.join(_request_lines(counts))}"

    def _label(self, tenant: str) -> str:
        if tenant not in self._shown:
            if len(self._shown) >= self._most:
                return OTHER
            self._shown.add(tenant)
        return tenant

    def _label_of_others(self, label: str) -> str:
        """The label here of what has this one in another process; `other` needs none of its own."""
        return OTHER if label == OTHER else self._label(label)


def _token_lines(counts: TenantCounts) -> Iterator[str]:
    for (tenant, work), totals in counts.tokens.items():
        for kind, total in zip(KINDS, totals, strict=True):
            yield f'{_TOKENS}{{tenant="{tenant}",work="{work}",kind="{kind}"}} {total}\n'


def _request_lines(counts: TenantCounts) -> Iterator[str]:
    for (tenant, outcome), total in counts.requests.items():
        yield f'{_REQUESTS}{{tenant="{tenant}",outcome="{outcome}"}} {total}\n'
