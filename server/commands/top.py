"""`tidegate top`: what the server is doing, in a terminal."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from server.commands.operator_client import OperatorClient, operator_options
from server.commands.top_figures import Figures, Snapshot, Spread, figures_between

_PATH: Final = "/admin/overview"
_NONE: Final = "-"
_BETWEEN_S: Final = 1.0
_ROWS: Final = 10
_LEVEL_STYLES: Final = ("green", "yellow", "yellow", "yellow", "red", "red")
_PLAIN_WIDTH: Final = 110
_NUMBERS: Final = frozenset(
    {"running", "waiting", "requests today", "tokens read", "generated", "done", "failed", "times"}
)


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.5, 60), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one look, over one second, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one snapshot as the server gives it, and end.")
@operator_options
def top(client: OperatorClient, interval: float, once: bool, as_json: bool) -> None:
    """Show what the server is doing and why, until Ctrl-C."""
    if as_json:
        click.echo(json.dumps(client.call("GET", _PATH), indent=2, ensure_ascii=False))
    elif once:
        before = client.call("GET", _PATH)
        time.sleep(_BETWEEN_S)
        console = Console()
        console = console if console.is_terminal else Console(width=_PLAIN_WIDTH)
        console.print(screen(before, client.call("GET", _PATH)))
    else:
        _follow(client, interval)


def _follow(client: OperatorClient, interval_s: float) -> None:
    before: Snapshot = client.call("GET", _PATH)
    with Live(screen(before, before), screen=True, auto_refresh=False) as live:
        try:
            for after in _snapshots(client, live, interval_s):
                live.update(screen(before, after), refresh=True)
                before = after
        except KeyboardInterrupt:
            return


def _snapshots(client: OperatorClient, live: Live, interval_s: float) -> Iterator[Snapshot]:
    """One every `interval_s`; a server that does not answer is asked again."""
    while True:
        time.sleep(interval_s)
        try:
            snapshot = client.call("GET", _PATH)
        except click.ClickException as problem:
            live.update(Panel(Text(problem.message), title="no answer", border_style="red"), refresh=True)
        else:
            yield snapshot


def screen(before: Snapshot, after: Snapshot) -> RenderableType:
    """One look. Everything that comes from outside is plain text, without control characters."""
    figures = figures_between(before, after)
    parts: list[RenderableType] = [_head(after), Columns([_speed(figures), _load(after), _engine(after)])]
    for table in (_tenants(after["tenants"]), _batches(after["batches"]), _recent(after["recent"]["refusals"])):
        if table is not None:
            parts += [Text(), table]
    return Group(*parts)


def _head(s: Snapshot) -> Text:
    engine, level = s["engine"], s["level"]
    line = Text(f"Tidegate {s['versions']['tidegate']}  ")
    line.append(plain(engine["stage"]), "green" if engine["ready"] else "bold red")
    line.append(f"  level {level['level']} {plain(level['name'])}", _LEVEL_STYLES[level["level"]])
    if (pin := level["pin"]) is not None:
        line.append(f", held by {plain(pin['by'])} for {pin['ttl_s']:.0f} s: {plain(pin['reason'])}")
    else:
        line.append(f" ({plain(level['because'])} {level['pressure']})")
    line.append(f"  {plain(', '.join(engine['models']))}  up {_span(s['uptime_s'])}", "dim")
    return line


def _speed(f: Figures) -> Panel:
    return _pairs(
        "speed",
        {
            "generated": f"{_rate(f.completion_tokens)} tokens/s",
            "read": f"{_rate(f.prompt_tokens)} tokens/s",
            "answers": "  ".join(f"{group} {_rate(value)}/s" for group, value in f.requests.items()),
            "first token": _both(f.ttft),
            "between tokens": _both(f.itl),
            "queue wait": _both(f.queue_wait),
        },
    )


def _load(s: Snapshot) -> Panel:
    kv = s["kv"]
    capacity = kv["capacity_tokens"]
    return _pairs(
        "load",
        {
            "running": _classes(s["requests"]["running"]),
            "waiting": _classes(s["requests"]["waiting"]),
            "running cap": str(s["requests"]["running_cap"] or _NONE),
            "KV used": f"{kv['used_tokens']:,} of {capacity:,}",
            "KV reserved": f"{kv['reserved_tokens'] / capacity:.0%}" if capacity else _NONE,
            "shortened": f"{s['counters']['truncated_requests'] or 0:,.0f} requests",
        },
    )


def _engine(s: Snapshot) -> Panel:
    engine, limits = s["engine"], s["limits"]
    fallbacks = [f"{plain(one['name'])} {'up' if one['up'] else 'down'}" for one in s["fallbacks"]]
    return _pairs(
        "engine and services",
        {
            "replaced": _reasons(engine["restarts"]) or "never",
            "failed tries": str(engine["failed_restarts"]),
            "window": f"{engine['max_model_len']:,} tokens" if engine["max_model_len"] else _NONE,
            "limits": f"in Redis (replicas: {limits['replicas']})" if limits["mode"] == "redis" else "here alone",
            "fallbacks": ", ".join(fallbacks) or "none",
            "preempted": f"{s['counters']['preemptions'] or 0:,.0f} sequences",
        },
    )


def _tenants(tenants: Mapping[str, Any]) -> RenderableType | None:
    if tenants["problem"]:
        return Text(plain(tenants["problem"]), "red")
    table = _table("tenant", "class", "running", "waiting", "requests today", "tokens read", "generated")
    for tenant in tenants["shown"][:_ROWS]:
        today = tenant["today"]
        figures = (tenant["running"], tenant["waiting"], *(today[f] for f in ("requests", "prompt_tokens")))
        table.add_row(
            Text(plain(tenant["name"])), tenant["class"], *(f"{n:,}" for n in (*figures, today["completion_tokens"]))
        )
    return table if table.row_count else None


def _batches(batches: Mapping[str, Any]) -> Table | None:
    table = _table("batch", "tenant", "state", "done", "failed")
    for batch in batches["shown"][:_ROWS]:
        done = f"{batch['completed'] + batch['failed']:,} of {batch['total']:,}"
        names = (Text(plain(batch[field])) for field in ("id", "tenant", "status"))
        table.add_row(*names, done, f"{batch['failed']:,}")
    return table if table.row_count else None


def _recent(entries: list[Mapping[str, Any]]) -> Table | None:
    table = _table("last", "times", "refused", "tenant", "said")
    for entry in entries[:_ROWS]:
        at = time.strftime("%H:%M:%S", time.localtime(entry["last_s"]))
        words = (Text(plain(entry[field] or _NONE)) for field in ("code", "tenant", "detail"))
        table.add_row(at, f"{entry['count']:,}", *words)
    return table if table.row_count else None


def _table(*columns: str) -> Table:
    heads = (Column(name, justify="right" if name in _NUMBERS else "left") for name in columns)
    return Table(*heads, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _pairs(title: str, pairs: Mapping[str, str]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(Text(name, "dim"), Text(value))
    return Panel(table, title=title, title_align="left", border_style="dim")


def plain(text: Any) -> str:
    """Text from outside without control characters, which could steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _classes(by_class: Mapping[str, int]) -> str:
    return "  ".join(f"{name} {count}" for name, count in by_class.items())


def _reasons(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {plain(reason)}" for reason, count in by_reason.items() if count)


def _rate(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _both(spread: Spread) -> str:
    return f"{_seconds(spread.p50_s)}, 95 %: {_seconds(spread.p95_s)}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _span(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (left, "s"))
    return " ".join([f"{n} {unit}" for n, unit in parts if n][:2]) or "0 s"
