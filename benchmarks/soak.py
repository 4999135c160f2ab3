"""Whether memory stays flat: hundreds of thousands of requests of all kinds, and what the server holds meanwhile."""

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from benchmarks.command import embedded_model
from benchmarks.comparison import machine, say
from benchmarks.contenders import TIDEGATE, Contender, ContenderFailed, shown_settings, started
from benchmarks.front_end import SATURATED_STEPS_PER_S, instant
from benchmarks.soak_crowd import Crowd
from benchmarks.soak_mix import tenants_file
from benchmarks.soak_report import Soak

_REQUESTS: Final = 200_000
_QUICK_REQUESTS: Final = 5_000
# Nobody is refused for the machine being slow. A cache that has a size is small enough to be full in the first half.
_FLAGS: Final = (
    "--ttft-slo", "600", "--tpot-slo", "60", "--highest-automatic-level", "0", "--context-count-cache-entries", "20000",
)  # fmt: skip


@contextmanager
def _server(model: str, flags: Sequence[str], *, real_engine: bool) -> Iterator[Contender]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        tenants = Path(folder) / "tenants.toml"
        tenants.write_text(tenants_file(), encoding="utf-8")
        given = [*_FLAGS, "--tenants-file", str(tenants), *flags]
        if real_engine:
            with started(TIDEGATE, model, given) as contender:
                yield contender
        else:
            with instant(TIDEGATE, model, SATURATED_STEPS_PER_S, given) as measured:
                yield measured.contender


def measure(model: str, requests: int, flags: Sequence[str], *, real_engine: bool) -> Soak:
    """Raises `ContenderFailed`."""
    with _server(model, flags, real_engine=real_engine) as contender:
        say(f"ready after {contender.wait_until_ready():.1f} s")
        crowd = Crowd(contender, requests)
        asyncio.run(crowd.run())
    return Soak(crowd.samples, crowd.outcomes, crowd.unexpected)


@click.command("soak")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- TIDEGATE FLAGS]")
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--requests", type=click.IntRange(20), default=_REQUESTS, show_default=True, help="How many.")
@click.option("--quick", is_flag=True, help=f"{_QUICK_REQUESTS:,} requests: a minute or two.")
@click.option("--real-engine", is_flag=True, help="With the model's engine instead of one that takes no time.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
def command(
    flags: tuple[str, ...], model: str | None, requests: int, *, quick: bool, real_engine: bool, as_json: bool
) -> None:
    """What Tidegate holds under streams, answers, cut histories, refusals and clients that leave, for long."""
    model = model or embedded_model()
    try:
        soak = measure(model, _QUICK_REQUESTS if quick else requests, flags, real_engine=real_engine)
    except ContenderFailed as failure:
        raise click.ClickException(str(failure)) from failure
    soak.print()
    if as_json:
        settings: dict[str, Any] = {**shown_settings(model, [*_FLAGS, *flags]), "real_engine": real_engine}
        said = {"benchmark": "soak", "settings": settings, "machine": machine(), **soak.as_dict()}
        click.echo(json.dumps(said))
