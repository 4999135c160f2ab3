"""More traffic than the machine can serve: who still completes useful work, and for whom.

Three servers get the same arrivals, in turns: plain vLLM; plain vLLM with its concurrency and its queue
capped at what was measured to be best for this machine; Tidegate. Useful is an answer whose first token and whose pace
are within the objectives (goodput).
"""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import click
import httpx

from benchmarks import open_loop
from benchmarks.command import embedded_model
from benchmarks.comparison import machine, say
from benchmarks.contenders import (
    KV_CACHE_FLAG,
    PLAIN,
    TIDEGATE,
    Contender,
    ContenderFailed,
    Kind,
    shown_settings,
    started,
)
from benchmarks.open_loop import Run
from benchmarks.overload_report import OURS, TUNED, Measured, Objective, headline, print_table, write_curves
from benchmarks.traffic import Arrival, Caller, Traffic

LOADS: Final = (0.5, 1.0, 2.0, 4.0)
_SEEDS: Final = (11, 12, 13)
_TTFT_SLO_S: Final = 5.0
# Twice the unloaded pace, as in Tidegate's own defaults, but never asking for more than 20 tokens a second.
_TPOT_FACTOR: Final = 2.0
_LEAST_TPOT_S: Final = 0.05
_CONCURRENCIES: Final = (1, 2, 4, 8, 16, 32)
_WARM_UP: Final = (8, 4, 2, 1)
_ALONE: Final = 6  # requests, one after the other
# Small enough that a plain server preempts: about 6,000 tokens of the embedded model.
_KV_CACHE_BYTES: Final = 140 << 20
_LIGHT_SHARE: Final = 0.2
_GRACE_FACTOR: Final = 2.0
_BURSTINESS: Final = 3.0

# Who asks. The light tenant asks at the same small rate under every load; the shares of the others fill the rest.
HEAVY: Final = Caller("heavy", "default", 0.70, "tg-bench-heavy-0123456789abcdef")
CRITICAL: Final = Caller("critical", "critical", 0.15, "tg-bench-critical-0123456789abcdef")
JOBS: Final = Caller("jobs", "batch", 0.15, "tg-bench-jobs-0123456789abcdef")
LIGHT: Final = Caller("light", "default", 1.0, "tg-bench-light-0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: seconds of arrivals in a turn, and turns with other arrivals.

    `light_everywhere`: plain vLLM too is asked by a light tenant beside a heavy one. `tuned_from`: the least load that
    the tuned one gets.
    """

    duration_s: float
    seeds: Sequence[int]
    loads: Sequence[float]
    bursts: bool
    light_everywhere: bool
    tuned_from: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What plain vLLM does here: `capacity_per_s` requests at the most streams that still keep the pace."""

    capacity_per_s: float
    streams: int
    residence_s: float
    objective: Objective


_FULL: Final = Plan(30, _SEEDS, LOADS, bursts=True, light_everywhere=True, tuned_from=0.0)
_QUICK: Final = Plan(20, _SEEDS[:1], LOADS, bursts=False, light_everywhere=False, tuned_from=2.0)


def measure(plan: Plan, model: str, flags: Sequence[str], chosen: Sequence[str]) -> dict[str, Any]:
    """All turns of all contenders. Raises `ContenderFailed`.

    Their servers stand side by side and take turns at each load, so that a slow minute of the machine is everybody's.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        servers: dict[str, Contender] = {}

        def start(kind: Kind, extra: Sequence[str]) -> Contender:
            servers[kind.name] = stack.enter_context(started(kind, model, [*flags, *extra]))
            _warm_up(servers[kind.name])
            return servers[kind.name]

        plain = start(PLAIN, ())
        found = _calibrate(plain.url)
        if not chosen or TUNED in chosen:
            start(replace(PLAIN, name=TUNED), _tuned_flags(found))
        found = _calibrated_again(plain, found)
        if not chosen or OURS in chosen:
            start(TIDEGATE, _our_flags(found, folder))
        measured = _turns([servers[name] for name in chosen or servers], list(servers.values()), plan, found)
    return {
        "settings": {**shown_settings(model, flags), "duration_s": plan.duration_s, "seeds": list(plan.seeds)},
        "capacity_per_s": found.capacity_per_s,
        "capacity_streams": found.streams,
        "ttft_slo_s": found.objective.ttft_s,
        "tpot_slo_s": found.objective.tpot_s,
        "machine": machine(),
        "turns": [turn.as_dict(found.objective) for turn in measured],
        **headline(measured, found.objective),
        "measured": measured,
        "objective": found.objective,
    }


def _tuned_flags(found: Calibration) -> list[str]:
    in_queue = int(found.streams * 0.8 * found.objective.ttft_s / found.residence_s)
    return ["--max-num-seqs", str(found.streams), "--max-num-queued-reqs", str(found.streams + max(1, in_queue))]


def _our_flags(found: Calibration, folder: Path) -> list[str]:
    slo = found.objective
    return ["--ttft-slo", f"{slo.ttft_s:g}", "--tpot-slo", f"{slo.tpot_s:.4f}", *tenant_flags(folder)]


def _warm_up(contender: Contender) -> None:
    """Unmeasured requests: the engine makes its kernels when a shape comes for the first time."""
    say(f"{contender.name} ready after {contender.wait_until_ready():.1f} s")
    for streams in _WARM_UP:
        asyncio.run(_closed(contender.url, streams, 2 * streams))


def _calibrate(url: str) -> Calibration:
    """Closed-loop turns against plain vLLM: its pace alone, and its throughput at several numbers of streams."""
    alone, slo = _alone(url)
    best = _found(alone, 1, slo)
    for streams in _CONCURRENCIES[1:]:
        turn = asyncio.run(_closed(url, streams, 3 * streams))
        pace_s = _mean_tpot_s(turn)
        say(f"{streams} streams: {len(turn.outcomes) / turn.wall_s:.2f} requests/s, {pace_s:.4f} s/token")
        if pace_s > slo.tpot_s:
            break
        best = _found(turn, streams, slo)
    say(f"capacity: {best.capacity_per_s:.2f} requests/s with {best.streams} streams; pace {slo.tpot_s:.4f} s/token")
    return best


def _calibrated_again(contender: Contender, found: Calibration) -> Calibration:
    """With the slower of two paces alone, minutes apart: what an idle machine cannot keep up is nobody's objective."""
    contender.wait_until_idle()
    _, slo = _alone(contender.url)
    say(f"pace {slo.tpot_s:.4f} s/token some minutes later")
    return replace(found, objective=max(found.objective, slo, key=lambda objective: objective.tpot_s))


def _alone(url: str) -> tuple[Run, Objective]:
    alone = asyncio.run(_closed(url, 1, _ALONE))
    return alone, Objective(_TTFT_SLO_S, max(_LEAST_TPOT_S, _TPOT_FACTOR * _mean_tpot_s(alone)))


def _found(turn: Run, streams: int, slo: Objective) -> Calibration:
    residence_s = sum(outcome.total_s or 0.0 for outcome in turn.outcomes) / len(turn.outcomes)
    return Calibration(len(turn.outcomes) / turn.wall_s, streams, residence_s, slo)


async def _closed(url: str, streams: int, requests: int) -> Run:
    """So many requests, so many of them at a time."""
    arrivals = Traffic(requests / 10, 1000, (LIGHT,), seed=streams).arrivals()[:requests]
    lanes = [[replace(arrival, at_s=0.0) for arrival in arrivals[i::streams]] for i in range(streams)]

    async def one_after_the_other(lane: Sequence[Arrival]) -> list[Run]:
        return [await open_loop.run(url, [arrival], grace_s=300) for arrival in lane]

    loop = asyncio.get_running_loop()
    started_s = loop.time()
    turns = [turn for lane in await asyncio.gather(*map(one_after_the_other, lanes)) for turn in lane]
    return Run([outcome for turn in turns for outcome in turn.outcomes], wall_s=loop.time() - started_s)


def _mean_tpot_s(turn: Run) -> float:
    paces_s = [outcome.tpot_s for outcome in turn.outcomes if outcome.tpot_s is not None]
    return sum(paces_s) / len(paces_s)


def _turns(asked: Sequence[Contender], servers: Sequence[Contender], plan: Plan, found: Calibration) -> list[Measured]:
    """The light tenant alone, then beside a heavy one, then all at every load; the other `servers` rest meanwhile."""
    measured: list[Measured] = []

    def turn(contender: Contender, load: float, traffic: Traffic) -> None:
        for server in servers:
            server.wait_until_idle()
        measured.append(_turn(contender, load, traffic, found))

    light_rate = _LIGHT_SHARE * found.capacity_per_s
    alone = Traffic(light_rate, plan.duration_s, (LIGHT,), 0)
    pair = (replace(HEAVY, share=max(plan.loads) * found.capacity_per_s - light_rate), replace(LIGHT, share=light_rate))
    beside = replace(alone, rate_per_s=max(plan.loads) * found.capacity_per_s, callers=pair)
    for contender in asked:
        if plan.light_everywhere or contender.name == OURS:
            for seed in plan.seeds:
                turn(contender, 0.0, replace(alone, seed=seed))
                turn(contender, max(plan.loads), replace(beside, seed=seed))
    for load, burstiness, seed in product(plan.loads, (1.0, _BURSTINESS) if plan.bursts else (1.0,), plan.seeds):
        for contender in asked:
            if contender.name != TUNED or load >= plan.tuned_from:
                turn(contender, load, _mixed(load, burstiness, seed, plan, found))
    return measured


def _mixed(load: float, burstiness: float, seed: int, plan: Plan, found: Calibration) -> Traffic:
    """Everybody's arrivals at this multiple of the capacity."""
    light_rate = _LIGHT_SHARE * found.capacity_per_s
    rest = load * found.capacity_per_s - light_rate
    scaled = [replace(caller, share=caller.share * rest) for caller in (HEAVY, CRITICAL, JOBS)]
    callers = (*scaled, replace(LIGHT, share=light_rate))
    return Traffic(load * found.capacity_per_s, plan.duration_s, callers, seed, burstiness)


def _turn(contender: Contender, load: float, traffic: Traffic, found: Calibration) -> Measured:
    before = _preemptions(contender.url)
    arrivals = traffic.arrivals()
    turn = asyncio.run(open_loop.run(contender.url, arrivals, grace_s=_GRACE_FACTOR * found.objective.ttft_s))
    callers = tuple(caller.name for caller in traffic.callers)
    measured = Measured(contender.name, load, traffic.burstiness, traffic.duration_s, callers, turn)
    measured.preemptions = _preemptions(contender.url) - before
    seen = measured.as_dict(found.objective)
    said = f"{seen['goodput_per_s']:.2f}/s good, {seen['refused']} refused of {len(arrivals)}"
    say(f"{contender.name} at {load:g}x: {said}, first token p99 {seen['ttft_p99_s'] or 0:.2f} s")
    return measured


def _preemptions(url: str) -> int:
    page = httpx.get(f"{url}/metrics", timeout=30).text
    lines = (line for line in page.splitlines() if line.startswith("vllm:num_preemptions_total"))
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def tenant_flags(folder: Path) -> list[str]:
    """The flags that make a server know the benchmark's callers, without limits; plain vLLM takes any key."""
    declared = [
        f'[tenants.{caller.name}]\nclass = "{caller.traffic_class}"\nkeys = [{{ sha256 = "{_digest(caller.key)}" }}]\n'
        for caller in (HEAVY, CRITICAL, JOBS, LIGHT)
    ]
    tenants = folder / "tenants.toml"
    tenants.write_text("\n".join(declared), encoding="utf-8")
    return ["--tenants-file", str(tenants), "--data-folder", str(folder / "data")]


def _digest(key: str | None) -> str:
    return hashlib.sha256((key or "").encode()).hexdigest()


@click.command("overload")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--quick", is_flag=True, help="One seed and shorter turns: ten minutes.")
@click.option("--load", "loads", type=float, multiple=True, help="Only this multiple of the capacity; repeatable.")
@click.option("--only", multiple=True, type=click.Choice([PLAIN.name, TUNED, OURS]), help="Only this server.")
@click.option("--duration-s", type=float, help="Seconds of arrivals in a turn.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the curves to this SVG file.")
@click.option("as_json", "--json", is_flag=True, help="Add one JSON object as the last line.")
def command(
    engine_flags: tuple[str, ...],
    model: str | None,
    loads: tuple[float, ...],
    only: tuple[str, ...],
    duration_s: float | None,
    plot: Path | None,
    *,
    quick: bool,
    as_json: bool,
) -> None:
    """Goodput, waits and refusals at 0.5, 1, 2 and 4 times the capacity, of Tidegate and of plain vLLM."""
    plan = _QUICK if quick else _FULL
    plan = replace(plan, loads=loads or plan.loads, duration_s=duration_s or plan.duration_s)
    flags = [KV_CACHE_FLAG, str(_KV_CACHE_BYTES), "--block-size", "32", *engine_flags]
    try:
        figures = measure(plan, model or embedded_model(), flags, only)
    except ContenderFailed as failure:
        raise click.ClickException(str(failure)) from failure
    measured, objective = figures.pop("measured"), figures.pop("objective")
    print_table(measured, objective)
    if plot is not None:
        plot.write_text(write_curves(measured, objective), encoding="utf-8")
    if as_json:
        click.echo(json.dumps({"benchmark": "overload", **figures}))
