"""Several processes on one Redis: together they let in what one would."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.limits_replica import Offer
from server.store.redis_server import EmbeddedRedis
from tests.store.running_redis import running_redis

PROJECT = Path(__file__).parents[2]
START_S = 4.0
DURATION_S = 3.0
TOKENS_PER_MINUTE = 60_000
COST_TOKENS = 200
PATIENT_S = 5.0  # what a slow Redis does is tested elsewhere; here the machine may be busy


def run(offers: list[Offer]) -> list[dict[str, float]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limits_replica", json.dumps(asdict(offer))],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for offer in offers
    ]
    return [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with running_redis(tmp_path) as embedded:
        yield embedded


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_together_replicas_let_in_the_rate_and_one_burst_and_never_more(
    own_redis: EmbeddedRedis, replicas: int
) -> None:
    """More than ten times the limit is offered: 150 tokens for each that drains, on top of the burst."""
    per_s = 750 / replicas
    start_s = time.time() + START_S
    results = run(
        [
            Offer(own_redis.url, f"r{n}", start_s, DURATION_S, per_s, COST_TOKENS, TOKENS_PER_MINUTE, PATIENT_S)
            for n in range(replicas)
        ]
    )
    span_s = max(r["last_s"] for r in results) - min(r["first_s"] for r in results)
    allowed = TOKENS_PER_MINUTE * (1 + span_s / 60)
    assert sum(r["local"] for r in results) == 0
    assert 0.97 * allowed <= sum(r["admitted_tokens"] for r in results) <= allowed
