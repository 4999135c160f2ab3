"""What several front-end processes on one engine carry, next to one: CPU of all of them, and of the busiest.

The engine is a process of its own here, with an executor that takes no time (`instant_executor.py`), since a stand-in
inside one front-end cannot serve a second.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import psutil

from benchmarks import instant_executor, load
from benchmarks.comparison import Comparison, Metric, Row, say
from benchmarks.contenders import (
    MODEL_NAME,
    PLAIN,
    TIDEGATE,
    Contender,
    ContenderFailed,
    Kind,
    cpu_s,
    shown_settings,
    started,
    variables_set,
)
from benchmarks.load import Load

_STEPS_PER_S: Final = 25
_ALL_AT_WORK_S: Final = 120.0
_LEAST_SHARE: Final = 0.05
_FLAGS: Final = ("--max-num-seqs", "1024", "--no-async-scheduling", "--distributed-executor-backend")


@dataclass(frozen=True, slots=True)
class Work:
    """A load, and what its CPU is divided by: `unit` is `token` or `request`."""

    name: str
    load: Load
    unit: str

    @property
    def metrics(self) -> tuple[Metric, Metric]:
        """Of all front-ends together, and of the busiest."""
        return (
            Metric(f"cpu_us_per_{self.unit}", f"front-ends µs CPU/{self.unit}", "lower"),
            Metric(f"busiest_us_per_{self.unit}", f"busiest one µs CPU/{self.unit}", "lower"),
        )


@dataclass(frozen=True, slots=True)
class FrontEnds:
    """A server and how many processes of it speak HTTP."""

    contender: Contender
    count: int

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds so far of every process that listens on the server's port."""
        port = int(self.contender.url.rsplit(":", 1)[1])
        return {pid: cpu_s(pid) for pid in listening(self.contender, port)}

    def turn(self, work: Work) -> tuple[float, float]:
        """Microseconds of CPU per unit: all of them, and the busiest."""
        before = self.cpu_s()
        asyncio.run(load.run(self.contender.url, MODEL_NAME, work.load))
        used_us = [1e6 * (after_s - before.get(pid, 0.0)) for pid, after_s in self.cpu_s().items()]
        units = work.load.requests * (work.load.max_tokens if work.unit == "token" else 1)
        return sum(used_us) / units, max(used_us) / units

    def wait_until_all_work(self, work: Work) -> None:
        """Until each has its share: a further one begins to serve after the first. Raises `ContenderFailed`."""
        deadline_s = time.monotonic() + _ALL_AT_WORK_S
        while True:
            before = self.cpu_s()
            asyncio.run(load.run(self.contender.url, MODEL_NAME, work.load))
            used_s = [after_s - before.get(pid, 0.0) for pid, after_s in self.cpu_s().items()]
            self.contender.wait_until_idle()
            if sum(share > _LEAST_SHARE * sum(used_s) for share in used_s) >= self.count:
                return
            if time.monotonic() > deadline_s:
                raise ContenderFailed(f"{self.contender.name}: not all {self.count} front-ends take requests.")


def listening(contender: Contender, port: int) -> list[int]:
    """The processes of a server that listen on a port."""
    front = psutil.Process(contender.process.pid)
    return [
        member.pid
        for member in (front, *front.children(recursive=True))
        if any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in member.net_connections("tcp")
        )
    ]


def compare(kind: Kind, count: int, model: str, flags: Sequence[str], *, pairs: int, quick: bool) -> Comparison:
    """A server with `count` front-ends next to the same with one."""
    works = (
        Work("256 streams", Load(256, 256, 32 if quick else 128, True, seed=1), "token"),
        Work("answers of 1 token", Load(256, 1000 if quick else 4000, 1, False, seed=2), "request"),
    )
    rows: list[Row] = []
    with served(kind, count, model, flags) as several, served(kind, 1, model, flags) as one:
        for server in (several, one):
            server.contender.wait_until_ready()
            server.wait_until_all_work(works[1])
        for work in works:
            rows += _measure(work, several, one, pairs)
    settings = {**shown_settings(model, _FLAGS[:-1]), "pairs": pairs, "api_server_count": count}
    bounds = {row.load: 1 / statistics.median(row.ratios) for row in rows if row.metric.key.startswith("busiest")}
    said = ", ".join(f"{bound:.2f} times the {name}" for name, bound in bounds.items())
    note = f"With a core for each, {kind.name} carries with {count} at most {said}."
    return Comparison((f"{kind.name}, {count}", f"{kind.name}, 1"), settings, rows, [note])


@contextmanager
def served(kind: Kind, count: int, model: str, flags: Sequence[str]) -> Iterator[FrontEnds]:
    """A server with so many front-ends, over an engine that takes no time."""
    variables = {instant_executor.STEPS_PER_S_ENV: str(_STEPS_PER_S)}
    given = (*_FLAGS, instant_executor.BACKEND, "--api-server-count", str(count), *flags)
    with variables_set(variables), started(kind, model, given) as contender:
        yield FrontEnds(contender, count)


def both(count: int, model: str, flags: Sequence[str], *, pairs: int, quick: bool) -> list[Comparison]:
    """Ours and vLLM's, one after the other: four servers at a time would leave no core for the load."""
    ours = compare(TIDEGATE, count, model, flags, pairs=pairs, quick=quick)
    theirs = compare(replace(PLAIN, command=_plain), count, model, (), pairs=pairs, quick=quick)
    return [ours, theirs]


def _plain(model: str, port: int, flags: Sequence[str]) -> list[str]:
    where = ("--host", "127.0.0.1", "--port", str(port))
    return [sys.executable, "-m", "benchmarks.plain_serve", "--model", model, *where, *flags]


def _measure(work: Work, several: FrontEnds, one: FrontEnds, pairs: int) -> list[Row]:
    turns: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(pairs):
        turn = replace(work, load=replace(work.load, seed=1000 * (number + 1) + work.load.seed))
        if number % 2 == 0:
            pair = several.turn(turn), one.turn(turn)
        else:
            second = one.turn(turn)
            pair = several.turn(turn), second
        turns.append(pair)
        say(f"{work.name}: pair {number + 1} of {pairs}, busiest ratio {pair[0][1] / pair[1][1]:.3f}")
    return [
        Row(work.name, metric, [first[index] for first, _ in turns], [second[index] for _, second in turns])
        for index, metric in enumerate(work.metrics)
    ]
