"""A gate whose clock a test turns."""

from dataclasses import replace

from server.policy.admission import Admission
from server.policy.backlog import Ticket
from server.policy.ledger import Held
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Ask, Capacity
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed

UNLOADED = Unloaded(ttft_s=0.1, tpot_s=0.03, prefill_tokens_per_s=1000)
DONE = Consumed(50, 0, finished=True)
USUAL = Ask(100, 100)


class Door:
    """A gate's decisions, with a clock that the test turns."""

    def __init__(self, kv_tokens: int = 10_000, max_running: int = 16, ttft_slo_s: float = 5.0) -> None:
        self.admission = Admission(Objectives({"default": ttft_slo_s, "critical": ttft_slo_s}, {"default": 0.1}))
        self.admission.open(Capacity(kv_tokens, 16, max_running), UNLOADED)
        self.admission.cap = replace(self.admission.cap, starting=False)  # its size is known to be right
        self.admission.gap_cap = self.admission.cap
        self.now_s = 100.0
        self.kv_tokens = kv_tokens
        self.running: list[Held] = []

    def arrive(
        self, tenant: str = "a", name: TrafficClass = "default", ask: Ask = USUAL, timeout_s: float | None = None
    ) -> Enqueue | Shed:
        return self.admission.arrive(Terms(name, timeout_s), tenant, ask, self.now_s, self.now_s)

    def ticket(self, tenant: str = "a", name: TrafficClass = "default", ask: Ask = USUAL) -> Ticket:
        verdict = self.arrive(tenant, name, ask)
        assert isinstance(verdict, Enqueue)
        return verdict.ticket

    def let_in(self) -> list[Held]:
        """Everything that may go in now; the engine takes each of them up at once."""
        held = []
        while (verdict := self.admission.next(self.now_s)) is not None:
            assert isinstance(verdict, Admit)
            held.append(verdict.held)
            self.running.append(verdict.held)
            self.admission.prefilled(verdict.held)
            self.admission.kv_usage_ratio = sum(each.prompt_tokens for each in self.running) / self.kv_tokens
        return held

    def fill_with_lines(self, most: int = 100, ask: Ask = USUAL) -> list[Held]:
        """Lines of a batch until one has to wait; it goes on waiting."""
        held: list[Held] = []
        for _ in range(most):
            assert isinstance(self.line(ask), Enqueue)
            new = self.let_in()
            held += new
            if not new:
                break
        return held

    def line(self, ask: Ask = USUAL) -> Enqueue | Shed:
        """One line of a batch arrives."""
        return self.admission.arrive(Terms("batch", 3600, offline=True), "jobs", ask, self.now_s, self.now_s)

    def give_up(self) -> list[Held]:
        """What is driven out goes back into the queue."""
        victims = self.admission.victims()
        for held in victims:
            self.running.remove(held)
            self.admission.release(held, Consumed(), self.now_s)
            self.admission.put_back(held, self.now_s)
        return victims

    def fill(self, tenant: str = "a", name: TrafficClass = "default") -> list[Held]:
        """Arrivals of one tenant until one has to wait."""
        held: list[Held] = []
        while isinstance(verdict := self.arrive(tenant, name), Enqueue):
            new = self.let_in()
            if not new:
                self.admission.leave(verdict.ticket)
                break
            held += new
        return held

    def finish(self, held: Held, after_s: float = 2.0) -> None:
        self.now_s += after_s
        self.running.remove(held)
        self.admission.release(held, DONE, self.now_s)
