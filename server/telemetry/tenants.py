"""What tenants do: the metrics that grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

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


class TenantMetrics:
    """The first `shown` tenants that come have a label of their own, and the rest share `other`.

    prometheus-client takes about 20 µs for a sample, which is too much for thousands of them on the event loop. So the
    lines are written here. The names need no escaping (`server/policy/tenants.py`).
    """

    def __init__(self, shown: int) -> None:
        self._most = shown
        self._shown: set[str] = set()
        self._tokens: dict[tuple[str, Work], list[int]] = {}
        self._requests: dict[tuple[str, Outcome], int] = {}

    def used(self, tenant: str, work: Work, counts: tuple[int, int, int]) -> None:
        """Add the tokens of one engine request, in the order of `KINDS`."""
        totals = self._tokens.setdefault((self._label(tenant), work), [0] * len(KINDS))
        for position, count in enumerate(counts):
            totals[position] += count

    def ended(self, tenant: str, outcome: Outcome) -> None:
        """A client's request is over."""
        key = self._label(tenant), outcome
        self._requests[key] = self._requests.get(key, 0) + 1

    def tokens(self, tenant: str, work: Work, kind: str) -> int:
        """What stands on the page for these labels."""
        return self._tokens.get((tenant, work), [0] * len(KINDS))[KINDS.index(kind)]

    def page(self) -> str:
        """The metrics in Prometheus' text format."""
        return f"{_TOKENS_HEAD}{''.join(self._token_lines())}{_REQUESTS_HEAD}{''.join(self._request_lines())}"

    def _label(self, tenant: str) -> str:
        if tenant not in self._shown:
            if len(self._shown) >= self._most:
                return OTHER
            self._shown.add(tenant)
        return tenant

    def _token_lines(self) -> Iterator[str]:
        for (tenant, work), totals in self._tokens.items():
            for kind, total in zip(KINDS, totals, strict=True):
                yield f'{_TOKENS}{{tenant="{tenant}",work="{work}",kind="{kind}"}} {total}\n'

    def _request_lines(self) -> Iterator[str]:
        for (tenant, outcome), total in self._requests.items():
            yield f'{_REQUESTS}{{tenant="{tenant}",outcome="{outcome}"}} {total}\n'
