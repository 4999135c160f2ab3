"""Tokens by tenant: the one metric that grows with the number of tenants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

Work = Literal["online", "batch"]
KINDS: Final = ("prompt", "cached", "completion")
OTHER: Final = "other"
_NAME: Final = "tidegate_tokens_total"
_HEAD: Final = (
    f"# HELP {_NAME} Tokens of engine requests that are over, by tenant; `cached` is the part of `prompt` that was "
    f"found in the prefix cache\n# TYPE {_NAME} counter\n"
)


class TokenMetrics:
    """The first `tenants_shown` tenants that use tokens have a label of their own, and the rest share `other`.

    prometheus-client takes about 20 µs for a sample, which is too much for thousands of them on the event loop. So the
    lines are written here. The names need no escaping (`server/policy/tenants.py`).
    """

    def __init__(self, tenants_shown: int) -> None:
        self._tenants_shown = tenants_shown
        self._shown: set[str] = set()
        self._totals: dict[tuple[str, Work], list[int]] = {}

    def used(self, tenant: str, work: Work, counts: tuple[int, int, int]) -> None:
        """Add the tokens of one engine request, in the order of `KINDS`."""
        totals = self._totals.setdefault((self._label(tenant), work), [0] * len(KINDS))
        for position, count in enumerate(counts):
            totals[position] += count

    def total(self, tenant: str, work: Work, kind: str) -> int:
        """What stands on the page for these labels."""
        return self._totals.get((tenant, work), [0] * len(KINDS))[KINDS.index(kind)]

    def page(self) -> str:
        """The metric in Prometheus' text format."""
        return _HEAD + "".join(self._lines())

    def _label(self, tenant: str) -> str:
        if tenant not in self._shown:
            if len(self._shown) >= self._tenants_shown:
                return OTHER
            self._shown.add(tenant)
        return tenant

    def _lines(self) -> Iterator[str]:
        for (tenant, work), totals in self._totals.items():
            for kind, total in zip(KINDS, totals, strict=True):
                yield f'{_NAME}{{tenant="{tenant}",work="{work}",kind="{kind}"}} {total}\n'
