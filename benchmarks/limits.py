"""What limits cost, and whether they hold: the limiter alone, on a Redis of its own, without an engine."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import machine, say
from benchmarks.contenders import PROJECT
from benchmarks.limits_replica import Offer
from server.policy.limits import Cost, Scope
from server.policy.refusals import RateLimited
from server.policy.tenants import Limits, Tenant
from server.serving.charging import Charging, Pricing, scopes_of
from server.serving.requests import OpenRequest
from server.store.connection import connect
from server.store.limit_script import LimitScript
from server.store.limiter import Charge, Denied, Granted, Limiter
from server.store.redis_server import EmbeddedRedis
from server.store.usage import TokenCounts, UsageEntry
from server.telemetry.metrics import Metrics

_REPLICAS: Final = (1, 2, 4, 8)
_TOKENS_PER_MINUTE: Final = 600_000
_COST_TOKENS: Final = 1_000
_OVERLOAD: Final = 10
_START_S: Final = 4.0
_CHARGES: Final = 5_000
_KEYS: Final = 20_000
_ALL_KEYS: Final = 1_000_000
_GIB: Final = 1 << 30
_FULL: Final = Limits(requests_per_minute=1000, tokens_per_minute=100_000, tokens_per_day=10_000_000, concurrency=8)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure beside the bar it has to meet."""

    name: str
    measured: str
    bar: str
    met: bool


@click.command("limits")
@click.option("--quick", is_flag=True, help="Shorter runs.")
@click.option("as_json", "--json", is_flag=True, help="Add one JSON object as the last line.")
def command(quick: bool, as_json: bool) -> None:
    """Measure the limiter: what it adds to a request, what it lets in, and what a Redis that hangs costs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the server does
        figures = runner.run(_measured(12.0 if quick else 30.0))
    table = Table("figure", "measured", "bar", "met", box=box.MARKDOWN)
    for figure in figures:
        table.add_row(figure.name, figure.measured, figure.bar, "yes" if figure.met else "no")
    Console(width=160).print(table)
    if as_json:
        click.echo(json.dumps({"benchmark": "limits", "machine": machine(), "figures": [asdict(f) for f in figures]}))


async def _measured(duration_s: float) -> list[Figure]:
    figures = []
    async with _own_redis() as embedded:
        figures += await _latency(embedded)
        figures += await _refusal(embedded)
        for replicas in _REPLICAS:
            figures.append(await _admitted(embedded, replicas, duration_s))
            say(f"{replicas} replicas: {figures[-1].measured}")
        figures += await _memory(embedded)
        figures += await _hang(embedded)
    return figures


@asynccontextmanager
async def _own_redis() -> AsyncIterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory() as folder:
        embedded = EmbeddedRedis(Path(folder))
        async with embedded.running():
            await embedded.wait_until_up()
            yield embedded


@asynccontextmanager
async def _limiter(embedded: EmbeddedRedis) -> AsyncIterator[tuple[Limiter, Redis]]:
    """A limiter on an empty Redis."""
    client = connect(embedded.url)
    assert isinstance(client, Redis)
    async with aclosing(client):
        await client.flushall()
        limiter = Limiter(LimitScript(client), "a-replica")
        async with limiter.running():
            yield limiter, client


async def _latency(embedded: EmbeddedRedis) -> list[Figure]:
    """Charge and settle one after the other, with every limit set."""
    scopes = (Scope("tenant", "{one}", _FULL),)
    waits_ms = []
    async with _limiter(embedded) as (limiter, _):
        for number in range(_CHARGES):
            lease = str(number)
            started_s = time.perf_counter()
            verdict = await limiter.charge(Charge(scopes, Cost(0, 1), lease))
            waits_ms.append((time.perf_counter() - started_s) * 1000)
            assert isinstance(verdict, Granted)
            limiter.settle(verdict, Cost(), lease, None)
            await asyncio.sleep(0.001)
    p50, p99 = statistics.median(waits_ms), statistics.quantiles(waits_ms, n=100)[98]
    return [Figure("charge, p50 and p99", f"{p50:.2f} and {p99:.2f} ms", "p99 < 1 ms", p99 < 1)]


async def _refusal(embedded: EmbeddedRedis) -> list[Figure]:
    """A tenant that is over its limit and asks on, until the request would be tokenized."""
    tenant = Tenant("hammering", limits=Limits(requests_per_minute=1))
    async with _limiter(embedded) as (limiter, _):
        charging = Charging(limiter, "a-replica", Pricing(), Metrics(CollectorRegistry()))
        for _ in range(2):
            verdict = await limiter.charge(Charge(scopes_of(tenant, None), Cost(1, 1)))
        assert isinstance(verdict, Denied)
        charging.remember(verdict)
        took_ms = [_time_ms(lambda: charging.check(OpenRequest("", "", tenant=tenant))) for _ in range(_CHARGES)]
    mean = statistics.mean(took_ms)
    return [Figure("a refusal that is remembered", f"{mean * 1000:.0f} µs", "< 1 ms", mean < 1)]


def _time_ms(refused: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    try:
        refused()
    except RateLimited:
        return (time.perf_counter() - started_s) * 1000
    raise AssertionError("the request was not refused")


async def _admitted(embedded: EmbeddedRedis, replicas: int, duration_s: float) -> Figure:
    async with _limiter(embedded):
        per_s = _OVERLOAD * _TOKENS_PER_MINUTE / 60 / _COST_TOKENS / replicas
        start_s = time.time() + _START_S
        offers = [
            Offer(embedded.url, f"r{n}", start_s, duration_s, per_s, _COST_TOKENS, _TOKENS_PER_MINUTE)
            for n in range(replicas)
        ]
        results = await asyncio.to_thread(_run, offers)
    span_s = max(r["last_s"] for r in results) - min(r["first_s"] for r in results)
    allowed = _TOKENS_PER_MINUTE * (1 + span_s / 60)
    share = sum(r["admitted_tokens"] for r in results) / allowed
    name = f"let in by {replicas} {'replica' if replicas == 1 else 'replicas'} at {_OVERLOAD} times the limit"
    p99, local = max(r["p99_ms"] for r in results), sum(r["local"] for r in results)
    return Figure(
        name,
        f"{share:.2%} ({local:.0f} without Redis, p99 {p99:.2f} ms)",
        "97 % to 100 % of rate·t + burst",
        0.97 <= share <= 1,
    )


def _run(offers: list[Offer]) -> list[dict[str, float]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limits_replica", json.dumps(asdict(offer))],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
        )
        for offer in offers
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


async def _memory(embedded: EmbeddedRedis) -> list[Figure]:
    """Redis's own account of what a key's limits take, while it is in use and with its usage kept."""
    figures = []
    async with _limiter(embedded) as (limiter, client):
        before = (await client.info("memory"))["used_memory"]
        now = datetime.now(UTC)
        for number in range(_KEYS):
            scopes = (Scope("tenant", f"{{team-{number:06d}}}", _FULL),)
            verdict = await limiter.charge(Charge(scopes, Cost(1, 1000), f"{number}"))
            assert isinstance(verdict, Granted)
        limits = (await client.info("memory"))["used_memory"] - before
        for number in range(_KEYS):
            limiter.record(UsageEntry(f"team-{number:06d}", "a-model", TokenCounts(1, 100, 0, 20), now))
            if number % 100 == 0:
                await asyncio.sleep(0.02)
        await _until_told(limiter)
        usage = (await client.info("memory"))["used_memory"] - before - limits
    for name, size in (("limits and a lease", limits), ("limits, a lease and usage", limits + usage)):
        whole = size / _KEYS * _ALL_KEYS / _GIB
        figures.append(
            Figure(
                f"memory of 1 million keys: {name}", f"{whole:.2f} GiB ({size / _KEYS:.0f} B each)", "1 GiB", whole <= 1
            )
        )
    return figures


async def _until_told(limiter: Limiter) -> None:
    for _ in range(10_000):
        if limiter.untold == 0:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("Redis did not take the settles")


async def _hang(embedded: EmbeddedRedis) -> list[Figure]:
    """One request each 2 ms, before and after Redis is stopped."""
    scopes = (Scope("tenant", "{one}", Limits(tokens_per_minute=10**9)),)
    waits_ms = []
    async with _limiter(embedded) as (limiter, _):
        for number in range(1000):
            if number == 500:
                assert embedded.pid is not None
                os.kill(embedded.pid, signal.SIGSTOP)
            started_s = time.perf_counter()
            await limiter.charge(Charge(scopes, Cost(1, 1)))
            waits_ms.append((time.perf_counter() - started_s) * 1000)
            await asyncio.sleep(0.002)
        assert embedded.pid is not None
        os.kill(embedded.pid, signal.SIGCONT)
    slow = [wait_ms for wait_ms in waits_ms[500:] if wait_ms > 2]
    measured = f"{len(slow)} of 500 waited, {max(slow, default=0):.0f} ms at most"
    met = len(slow) <= 3 and max(slow, default=0) <= 60
    return [Figure("after Redis hangs", measured, "at most 3, at most 60 ms", met)]
