"""`python -m benchmarks` lists the benchmarks, `python -m benchmarks NAME` runs one."""

import signal
import sys

import click

from benchmarks import (
    batch_gaps,
    cut_table,
    engine_kills,
    fit_overhead,
    front_end,
    limits,
    load_test,
    long_chat,
    long_renders,
    overload,
    replicas,
    serving,
    side_by_side,
    soak,
    start_up,
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def benchmarks(context: click.Context) -> None:
    """Compare Tidegate with plain vLLM on this machine. `NAME --help` lists a benchmark's options."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


benchmarks.add_command(serving.command)
benchmarks.add_command(start_up.command)
benchmarks.add_command(long_chat.command)
benchmarks.add_command(cut_table.command)
benchmarks.add_command(fit_overhead.command)
benchmarks.add_command(engine_kills.command)
benchmarks.add_command(front_end.command)
benchmarks.add_command(long_renders.command)
benchmarks.add_command(overload.command)
benchmarks.add_command(limits.command)
benchmarks.add_command(load_test.command)
benchmarks.add_command(batch_gaps.command)
benchmarks.add_command(replicas.command)
benchmarks.add_command(soak.command)
benchmarks.add_command(side_by_side.command)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the contenders are ended
    benchmarks.main(prog_name="python -m benchmarks")
