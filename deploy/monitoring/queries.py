"""The PromQL that the dashboards are made of. `$instance` is the reader's choice of replicas."""

from typing import Final

from deploy.monitoring.panels import Panel, Query, Unit

_HERE: Final = 'instance=~"$instance"'
_WINDOW: Final = "[$__rate_interval]"
INTERACTIVE: Final = 'class!="batch"'
PROMPT: Final = 'kind="prompt"'
LIMITED: Final = 'outcome="limited"'
CACHED: Final = 'kind="cached"'


def only(*labels: str) -> str:
    """The selector of the chosen replicas, with further label matchers."""
    return "{" + ",".join((_HERE, *labels)) + "}"


def rate(name: str, *labels: str) -> str:
    return f"rate({name}{only(*labels)}{_WINDOW})"


def summed(by: str, name: str, *labels: str) -> str:
    """The rate of a counter, added up over what is not in `by`."""
    return f"sum by ({by}) ({rate(name, *labels)})"


def quantiles(name: str, by: str = "class") -> tuple[Query, ...]:
    buckets = summed(f"{by}, le", f"{name}_bucket")
    return tuple(
        Query(f"histogram_quantile({share}, {buckets})", f"{{{{{by}}}}} p{round(share * 100)}")
        for share in (0.5, 0.95, 0.99)
    )


def gauge(name: str, legend: str, *labels: str) -> Query:
    return Query(f"{name}{only(*labels)}", legend)


def number(title: str, about: str, expression: str, unit: Unit, limits: tuple[float, float] | None = None) -> Panel:
    return Panel(title, about, (Query(expression, title),), unit, "stat", limits=limits)


def missed(objective: str) -> str:
    matching = f'objective="{objective}"'
    missed, asked = (
        f"sum({rate(name, INTERACTIVE, matching)})"
        for name in ("tidegate_slo_missed_total", "tidegate_slo_requests_total")
    )
    return f"{missed} / ({asked} > 0) or vector(0)"
