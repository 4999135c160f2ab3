"""What a router is worth: 1 to 64 replicas, simulated (`fleet.py`). No server runs."""

import dataclasses
import json

import click
from rich.console import Console
from rich.table import Table

from benchmarks.fleet import ROUTERS, Machine, People, simulate

_TABLE_WIDTH = 110
_SIZES = (1, 2, 4, 8, 16, 32, 64)


@click.command("replicas")
@click.option("--conversations-per-s", default=People().conversations_per_s, show_default=True, help="Per replica.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Up to 8 replicas.")
@click.option("as_json", "--json", is_flag=True, help="Add one JSON object as the last line.")
def command(conversations_per_s: float, seed: int, quick: bool, as_json: bool) -> None:
    """What a router is worth: 1 to 64 replicas, simulated."""
    machine, people = Machine(), dataclasses.replace(People(), conversations_per_s=conversations_per_s)
    table = Table("replicas", "router", "prefix hits", "refused", "TTFT p50, s", "TTFT p99, s", "busiest / mean")
    lines = []
    for replicas in [size for size in _SIZES if size <= 8 or not quick]:
        for name, router in ROUTERS.items():
            outcome = simulate(replicas, router(), machine, people, seed)
            lines.append({"replicas": replicas, "router": name, **dataclasses.asdict(outcome)})
            table.add_row(
                str(replicas), name, f"{outcome.hit_ratio:.0%}", f"{outcome.refused_ratio:.1%}",
                f"{outcome.ttft_p50_s:.2f}", f"{outcome.ttft_p99_s:.2f}", f"{outcome.imbalance:.2f}",
            )  # fmt: skip
    Console(width=_TABLE_WIDTH).print(table)
    if as_json:
        click.echo(json.dumps({"benchmark": "replicas", "lines": lines}))
