"""A gate with few places, and engine requests that run until the test ends them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from server.policy.admission import Admission
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Capacity
from server.policy.running_cap import RunningCap
from server.policy.tenants import Tenant, TrafficClass
from server.policy.terms import Terms
from server.serving.generation import Generation
from server.serving.queue import Gate, Surroundings
from server.serving.requests import OpenRequest, OpenRequests
from server.telemetry.admission import AdmissionMetrics
from tests.serving.fake_stack import demand, new_charging, new_fitter

UNLOADED = Unloaded(ttft_s=0.1, tpot_s=0.03, prefill_tokens_per_s=10_000)


@dataclass
class Bench:
    """A gate with so many places, and engine requests that run until the test ends them."""

    places: int = 1
    ttft_slo_s: float = 30.0
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: OpenRequests = field(default_factory=OpenRequests)
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    go_on: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        admission = Admission(Objectives({"default": self.ttft_slo_s, "critical": self.ttft_slo_s}))
        self.gate = Gate(admission, AdmissionMetrics(self.registry), Surroundings(jitter=lambda: 0.5))
        self.open()
        self.generation = Generation(new_fitter(), self.gate, new_charging())

    def open(self) -> None:
        self.gate.open(Capacity(100_000, 16, self.places), UNLOADED)
        self.gate.admission.cap = RunningCap(self.places, self.places, starting=False)
        self.gate.admission.gap_cap = self.gate.admission.cap

    @property
    def nothing_held(self) -> bool:
        admission = self.gate.admission
        return (admission.ledger.reserved, admission.ledger.sequences, len(admission.backlog)) == (0, 0, 0)

    def request(
        self, name: str, traffic_class: TrafficClass = "default", timeout_s: float | None = None
    ) -> OpenRequest:
        tenant = Tenant(name.rstrip("0123456789"), traffic_class)
        return OpenRequest(name, "/v1/chat/completions", tenant, terms=Terms(traffic_class, timeout_s))

    async def outputs(self, name: str, silent: bool) -> AsyncGenerator[str, None]:
        self.started.append(name)
        try:
            if not silent:
                yield "first"
            await self.go_on.setdefault(name, asyncio.Event()).wait()
            yield "last"
        finally:
            self.ended.append(name)
            await asyncio.sleep(0)  # the engine is told to abort

    def run(self, opened: OpenRequest, silent: bool = False) -> "asyncio.Task[list[str]]":
        """One client's request with one engine request; `silent` produces nothing until it is told to go on."""
        name = opened.request_id

        async def answer() -> list[str]:
            async with self.requests.open(opened):
                outputs = self.generation.generate(demand(), lambda: self.outputs(name, silent))
                return [output async for output in outputs]

        return asyncio.create_task(answer())

    def finish(self, name: str) -> None:
        self.go_on.setdefault(name, asyncio.Event()).set()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def until(reached: Callable[[], bool]) -> None:
    """Turn by turn, so that nothing after the moment has happened yet."""
    for _ in range(100):
        if reached():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")
