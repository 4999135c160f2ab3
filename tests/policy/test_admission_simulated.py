"""The whole policy against a made-up engine: what it is there for, without a real machine's noise."""

import random
from dataclasses import replace
from statistics import fmean

import pytest

from server.policy.admission import Admission
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Capacity
from server.policy.tenants import TrafficClass
from tests.policy.simulated_engine import Job, SimulatedEngine, traffic

CAPACITY_PER_S = 4.5
KV_TOKENS = 6000
TTFT_SLO_S, TPOT_SLO_S = 5.0, 0.07
SECONDS = 60
SEEDS = (1, 2, 3)
Who = tuple[str, TrafficClass]


def gate() -> Admission:
    admission = Admission(Objectives({"default": TTFT_SLO_S, "critical": TTFT_SLO_S}, {"default": TPOT_SLO_S}))
    admission.open(Capacity(KV_TOKENS, 32, 256), Unloaded(0.1, 0.0265, 2000))
    return admission


def everyone(chance: random.Random) -> Who:
    number = chance.random()
    return ("heavy", "default") if number < 0.7 else ("vip", "critical") if number < 0.85 else ("jobs", "batch")


def only(tenant: str) -> Who:
    return (tenant, "default")


def served(load: float, seed: int, *, gated: bool = True) -> tuple[list[Job], SimulatedEngine]:
    """A minute of mixed traffic at `load` times the capacity."""
    jobs = traffic(load * CAPACITY_PER_S, SECONDS, everyone, seed)
    engine = SimulatedEngine(gate() if gated else None, KV_TOKENS)
    engine.serve(jobs, SECONDS)
    return jobs, engine


def goodput_per_s(jobs: list[Job]) -> float:
    return sum(job.good(TTFT_SLO_S, TPOT_SLO_S) for job in jobs if job.tenant != "jobs") / SECONDS


@pytest.fixture(scope="module")
def runs() -> dict[float, list[tuple[list[Job], SimulatedEngine]]]:
    return {load: [served(load, seed) for seed in SEEDS] for load in (0.5, 1.0, 2.0, 4.0)}


Runs = dict[float, list[tuple[list[Job], SimulatedEngine]]]


def test_goodput_at_four_times_the_capacity_is_what_it_was_at_the_capacity(runs: Runs) -> None:
    at = {load: fmean(goodput_per_s(jobs) for jobs, _ in several) for load, several in runs.items()}
    assert at[4.0] >= 0.9 * at[1.0]
    assert at[2.0] >= 0.9 * at[1.0]


def test_without_the_gate_the_same_machine_collapses(runs: Runs) -> None:
    gated = goodput_per_s(runs[2.0][0][0])
    alone = goodput_per_s(served(2.0, SEEDS[0], gated=False)[0])
    assert gated > 2 * alone


def test_critical_requests_hardly_notice(runs: Runs) -> None:
    critical = [job for jobs, _ in runs[4.0] for job in jobs if job.traffic_class == "critical"]
    assert fmean(job.ttft_s <= TTFT_SLO_S for job in critical) >= 0.99
    assert fmean(job.good(TTFT_SLO_S, TPOT_SLO_S) for job in critical) >= 0.9


def test_the_engine_hardly_ever_preempts(runs: Runs) -> None:
    assert sum(engine.preemptions for several in runs.values() for _, engine in several) <= 2


def test_most_who_are_refused_are_refused_at_once(runs: Runs) -> None:
    refused_s = [job.refused_after_s for jobs, _ in runs[4.0] for job in jobs if job.refused_after_s is not None]
    assert fmean(after_s < 0.5 for after_s in refused_s) >= 0.9


def test_a_standing_overload_teaches_the_gate_to_refuse_at_once() -> None:
    """Of those who come after the first seconds hardly anybody waits in vain, at no cost of what is served."""
    refused_s = []
    for seed in SEEDS:
        jobs, _ = served(4.0, seed)
        refused_s += [job.refused_after_s for job in jobs if job.at_s > 10 and job.refused_after_s is not None]
    assert len(refused_s) > 1000
    assert fmean(after_s > 0.5 for after_s in refused_s) < 0.005


def test_almost_nobody_is_refused_at_half_the_capacity(runs: Runs) -> None:
    jobs = [job for several, _ in runs[0.5] for job in several]
    assert fmean(job.refused_after_s is not None for job in jobs) < 0.02


def test_an_overload_that_is_over_refuses_nobody() -> None:
    """What a gate has learnt in it of waits, shares and paces holds for no longer than it has to."""
    afterwards = []
    for seed in SEEDS:
        before = traffic(4 * CAPACITY_PER_S, 20, everyone, seed)
        after = [replace(job, at_s=job.at_s + 30) for job in traffic(0.5 * CAPACITY_PER_S, 20, everyone, seed + 100)]
        SimulatedEngine(gate(), KV_TOKENS).serve([*before, *after], 60)
        afterwards += after
    assert fmean(job.refused_after_s is not None for job in afterwards) < 0.02


def test_nothing_is_left_behind(runs: Runs) -> None:
    for several in runs.values():
        for jobs, engine in several:
            assert engine.admission is not None
            assert engine.admission.ledger.reserved == 0
            assert all(job.end_s is not None or job.refused_after_s is not None for job in jobs)


def test_a_light_tenant_does_not_wait_behind_a_heavy_one() -> None:
    """Its steps are longer beside many streams, but its place is there within a second."""
    waits_s, ttfts_s = [], []
    for seed in SEEDS:
        heavy = traffic(4 * CAPACITY_PER_S, SECONDS, lambda _: only("heavy"), seed)
        light = traffic(0.05 * CAPACITY_PER_S, SECONDS, lambda _: only("light"), seed + 100)
        SimulatedEngine(gate(), KV_TOKENS).serve([*heavy, *light], SECONDS)
        waits_s += [job.held.admitted_s - job.at_s for job in light if job.held is not None]
        ttfts_s += [job.ttft_s for job in light]
    assert max(waits_s) < 1.5
    assert fmean(ttft_s <= TTFT_SLO_S for ttft_s in ttfts_s) >= 0.95
