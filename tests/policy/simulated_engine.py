"""A made-up engine without a clock of its own: requests come, steps take the time that a small CPU machine takes."""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from server.policy.admission import Admission
from server.policy.forecast import Step
from server.policy.ledger import Held
from server.policy.reservations import Ask
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed

_STEP_S = 0.025
_PER_STREAM_S = 0.0015
_PREFILL_TOKENS_PER_S = 2000
_PREFILL_BUDGET = 512


@dataclass(slots=True)
class Job:
    """One request and what becomes of it."""

    at_s: float
    tenant: str
    traffic_class: TrafficClass
    ask: Ask
    answer_tokens: int
    first_token_s: float | None = None
    end_s: float | None = None
    refused_after_s: float | None = None
    prefilled: int = 0
    generated: int = 0
    held: Held | None = None

    @property
    def kv_tokens(self) -> int:
        return self.prefilled + self.generated

    @property
    def ttft_s(self) -> float:
        return float("inf") if self.first_token_s is None else self.first_token_s - self.at_s

    def good(self, ttft_slo_s: float, tpot_slo_s: float) -> bool:
        if self.first_token_s is None or self.end_s is None:
            return False
        pace_s = (self.end_s - self.first_token_s) / max(1, self.answer_tokens - 1)
        return self.ttft_s <= ttft_slo_s and pace_s <= tpot_slo_s


@dataclass
class SimulatedEngine:
    """Runs jobs through an `Admission`, or straight into the engine where there is none."""

    admission: Admission | None
    kv_tokens: int
    max_running: int = 256
    now_s: float = 0.0
    preemptions: int = 0
    evictions: int = 0
    running: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    coming: list[Job] = field(default_factory=list)
    _queued: dict[int, Job] = field(default_factory=dict)

    def serve(self, jobs: Iterable[Job], until_s: float) -> None:
        """All arrivals up to `until_s`, and as long again for what they left behind."""
        due = [(job.at_s, number, job) for number, job in enumerate(jobs)]
        heapq.heapify(due)
        while self.now_s < 2 * until_s and (due or self.running or self.waiting or self._queued):
            while due and due[0][0] <= self.now_s:
                self._arrive(heapq.heappop(due)[2])
            self._let_in()
            if not self.running and not self.waiting:
                self._take_up()
            if self.running or self.waiting:
                self._step()
            elif due:
                self.now_s = max(self.now_s, due[0][0])
            else:
                self.now_s += 0.1

    def _take_up(self) -> None:
        """What was sent during one step is seen after it."""
        self.waiting += self.coming
        self.coming = []

    def _arrive(self, job: Job) -> None:
        if self.admission is None:
            self.waiting.append(job)
            return
        match self.admission.arrive(Terms(job.traffic_class), job.tenant, job.ask, job.at_s, self.now_s):
            case Enqueue(ticket=ticket):
                self._queued[ticket.number] = job
            case Shed():
                job.refused_after_s = self.now_s - job.at_s

    def _let_in(self) -> None:
        if self.admission is None:
            return
        while (verdict := self.admission.next(self.now_s)) is not None:
            match verdict:
                case Admit(held):
                    job = self._queued.pop(held.ticket.number)
                    job.held = held
                    self.coming.append(job)
                case Shed(ticket=ticket):
                    assert ticket is not None
                    job = self._queued.pop(ticket.number)
                    job.refused_after_s = self.now_s - job.at_s
        for victim in self.admission.victims():
            job = next(job for job in (*self.running, *self.waiting, *self.coming) if job.held is victim)
            next(place for place in (self.running, self.waiting, self.coming) if job in place).remove(job)
            self.admission.release(victim, Consumed(), self.now_s)
            self.admission.put_back(victim, self.now_s)
            job.prefilled, job.generated, job.held = 0, 0, None
            self._queued[victim.ticket.number] = job
            self.evictions += 1

    def _step(self) -> None:
        began_s = self.now_s
        while self.waiting and len(self.running) < self.max_running and self._free() > 0:
            self.running.append(self.waiting.pop(0))
        decoding = [job for job in self.running if job.generated]
        fresh, worked_off = self._prefill()
        self._take_up()
        self.now_s += _STEP_S + _PER_STREAM_S * len(decoding) + worked_off / _PREFILL_TOKENS_PER_S
        for job in (*decoding, *fresh):
            job.generated += 1
            if job.first_token_s is None:
                job.first_token_s = self.now_s
        preempted = self._make_room()
        self._finish()
        if self.admission is None:
            return
        for job in fresh:
            if job.held is not None:
                self.admission.prefilled(job.held)
        took_s, usage = self.now_s - began_s, 1 - self._free() / self.kv_tokens
        done = sum(job.ask.prompt_tokens for job in fresh)
        step = Step(len(self.running), len(self.waiting), usage, preempted, took_s if decoding else None, done)
        self.admission.stepped(
            replace(step, generated_tokens=len(decoding) + len(fresh), prefilling=worked_off > 0, duration_s=took_s)
        )

    def _prefill(self) -> tuple[list[Job], int]:
        """Work on prompts; returns those that are complete now, and the tokens of this step."""
        left, fresh = _PREFILL_BUDGET, []
        for job in self.running:
            if not job.generated and left > 0:
                part = min(left, job.ask.prompt_tokens - job.prefilled)
                job.prefilled, left = job.prefilled + part, left - part
                if job.prefilled == job.ask.prompt_tokens:
                    fresh.append(job)
        return fresh, _PREFILL_BUDGET - left

    def _make_room(self) -> int:
        """Take out the newest until the rest fits."""
        preempted = 0
        while self._free() < 0:
            victim = self.running.pop()
            victim.prefilled, victim.generated = 0, 0
            self.waiting.insert(0, victim)
            preempted += 1
        self.preemptions += preempted
        return preempted

    def _finish(self) -> None:
        for job in [job for job in self.running if job.generated >= job.answer_tokens]:
            self.running.remove(job)
            job.end_s = self.now_s
            if self.admission is not None and job.held is not None:
                self.admission.release(job.held, Consumed(job.generated, 0, finished=True), self.now_s)

    def _free(self) -> int:
        return self.kv_tokens - sum(job.kv_tokens for job in self.running)


def traffic(
    rate_per_s: float, until_s: float, who: Callable[[random.Random], tuple[str, TrafficClass]], seed: int
) -> list[Job]:
    """Poisson arrivals with lognormal lengths; answers use up what they may."""
    chance, at_s, jobs = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate_per_s)) < until_s:
        tenant, traffic_class = who(chance)
        prompt = min(1200, max(1, round(chance.lognormvariate(4.85, 0.8))))
        answer = min(160, max(4, round(chance.lognormvariate(3.48, 0.7))))
        jobs.append(Job(at_s, tenant, traffic_class, Ask(prompt, answer), answer))
    return jobs
