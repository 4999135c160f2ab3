"""What every benchmark's command line has in common: its options, and how the result is printed."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import click

from benchmarks.comparison import Comparison
from benchmarks.contenders import PLAIN, PROJECT, TIDEGATE, ContenderFailed, Kind


@dataclass(frozen=True, slots=True)
class Options:
    """`pairs` is None where the benchmark's own number applies; `engine_flags` go to both contenders."""

    model: str
    quick: bool
    pairs: int | None
    noise: bool
    engine_flags: tuple[str, ...]

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        """Who is compared with whom: the second is the measure of the first."""
        return (dataclasses.replace(PLAIN, name="again"), PLAIN) if self.noise else (TIDEGATE, PLAIN)


def benchmark(name: str, run: Callable[[Options], Comparison]) -> click.Command:
    """A command that runs `run`, whose docstring is the help text."""

    def callback(as_json: bool, model: str | None, **given: object) -> None:
        options = Options(model=model or embedded_model(), **given)  # type: ignore[arg-type]
        try:
            comparison = run(options)
        except ContenderFailed as failure:
            raise click.ClickException(str(failure)) from failure
        comparison.print()
        if as_json:
            click.echo(json.dumps({"benchmark": name, **comparison.as_dict()}))

    return click.Command(
        name,
        callback=callback,
        help=run.__doc__,
        params=[
            click.Argument(["engine_flags"], nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]"),
            click.Option(["--model"], help="Model folder or name. [default: the embedded model]"),
            click.Option(["--quick"], is_flag=True, help="Less load and fewer pairs: minutes, and more noise."),
            click.Option(["--pairs"], type=click.IntRange(1), help="How many pairs of turns are measured."),
            click.Option(["--noise"], is_flag=True, help="Compare plain vLLM with itself: the noise of this machine."),
            click.Option(["as_json", "--json"], is_flag=True, help="Add one JSON object as the last line."),
        ],
    )


def embedded_model() -> str:
    fetched = subprocess.run(
        [sys.executable, "-m", "server", "model", "fetch"], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=False
    )
    if fetched.returncode != 0:
        raise click.ClickException("The embedded model could not be fetched (see above); name another with --model.")
    return fetched.stdout.splitlines()[-1]
