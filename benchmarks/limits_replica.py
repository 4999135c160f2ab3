"""One replica of `benchmarks.limits`: offers charges at a steady pace and prints what was let in, as JSON.

It is the limiter's own code without an engine, in a process of its own: no engine here asks often enough to press a
limiter. `python -m benchmarks.limits_replica` takes one JSON argument, the fields of `Offer`.
"""

import asyncio
import json
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass

import uvloop

from server.policy.limits import Cost, Scope
from server.policy.tenants import Limits
from server.store.connection import TIMEOUT_S, connect
from server.store.limit_script import LimitScript
from server.store.limiter import Charge, Granted, Limiter


@dataclass(frozen=True, slots=True)
class Offer:
    """`start_s` is the wall-clock time at which all replicas begin; `per_s` is this replica's part."""

    url: str
    name: str
    start_s: float
    duration_s: float
    per_s: float
    cost_tokens: int
    tokens_per_minute: int
    timeout_s: float = TIMEOUT_S


async def offered(offer: Offer) -> dict[str, float]:
    """What was let in between the first question and the last answer."""
    scopes = (Scope("tenant", "{offered}", Limits(tokens_per_minute=offer.tokens_per_minute)),)
    charge = Charge(scopes, Cost(1, offer.cost_tokens))
    admitted, local, waits_s = 0, 0, list[float]()
    client = connect(offer.url, offer.timeout_s)
    async with aclosing(client):
        limiter = Limiter(LimitScript(client), offer.name, offer.timeout_s)
        async with limiter.running():
            await asyncio.sleep(max(0.0, offer.start_s - time.time()))
            first_s, started_s = time.time(), time.perf_counter()
            for number in range(int(offer.duration_s * offer.per_s)):
                await asyncio.sleep(max(0.0, started_s + number / offer.per_s - time.perf_counter()))
                asked_s = time.perf_counter()
                verdict = await limiter.charge(charge)
                waits_s.append(time.perf_counter() - asked_s)
                local += limiter.mode == "local"
                if isinstance(verdict, Granted):
                    admitted += offer.cost_tokens
            last_s = time.time()
    return {
        "admitted_tokens": admitted,
        "local": local,
        "first_s": first_s,
        "last_s": last_s,
        "p50_ms": sorted(waits_s)[len(waits_s) // 2] * 1000,
        "p99_ms": sorted(waits_s)[int(0.99 * len(waits_s))] * 1000,
    }


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the server does
        print(json.dumps(runner.run(offered(Offer(**json.loads(sys.argv[1]))))))
