"""A stack without an engine: operations and outputs that a test scripts by hand."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from prometheus_client import CollectorRegistry

from server.engine.calls import Call, Frame, Reply, StreamReply
from server.engine.traits import Traits
from server.policy.admission import Admission
from server.policy.bodies import MaxTokensDefaults
from server.policy.context import TruncationPolicy
from server.policy.ladder import LadderRules
from server.policy.objectives import Objectives
from server.policy.refusals import InvalidRequest, Refusal
from server.policy.reservations import Capacity
from server.serving.charging import Charging, Pricing
from server.serving.degradation import Degradation, DegradationRules
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Fallback, Upstream
from server.serving.fitting import ContextPolicy, HistoryFitter
from server.serving.generation import Generation
from server.serving.ladder import LadderSources, LadderWatch, LocalPins, Pins
from server.serving.queue import Gate
from server.serving.recovery import Recovery
from server.serving.requests import OpenRequests
from server.serving.service import BodyRules, Guards, Service
from server.serving.several import OneByOne
from server.store.connection import connect
from server.store.limit_script import LimitScript
from server.store.limiter import Limiter
from server.telemetry.admission import AdmissionMetrics
from server.telemetry.metrics import Metrics
from server.telemetry.resilience import ResilienceMetrics

if TYPE_CHECKING:  # the engine room imports vLLM
    from server.engine.seams import Demand
    from server.engine.stack import Stack

Operation = Callable[[Call], Awaitable[Reply | StreamReply]]

ERROR_FRAME = "data: error\n\n"
DONE_FRAME = "data: [DONE]\n\n"
_TRAITS = Traits("llama", generates=True, reasons=False, sees=False)


@dataclass(slots=True)
class FakeStack:
    """What `Service` asks of a stack."""

    operations: dict[tuple[str, str], Operation]
    uses_tools: bool = True
    max_model_len: int = 4096
    model_names: tuple[str, ...] = ("a-model",)
    alive: bool = True
    traits: Traits = _TRAITS

    def operation(self, method: str, path: str) -> Operation | None:
        return self.operations.get((method, path))


def slot_with(stack: FakeStack) -> EngineSlot:
    slot = EngineSlot()
    slot.fill(cast("Stack", stack))
    return slot


class RecordingOperation:
    """Answers `{}`, and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        self.calls.append(call)
        return Reply(b"{}", "application/json")


def new_fitter() -> HistoryFitter:
    return HistoryFitter(ContextPolicy(TruncationPolicy(), None), {}, Metrics(CollectorRegistry()))


def new_gate(max_running: int = 256) -> Gate:
    """A gate that is open, with far more room than a test needs."""
    gate = Gate(Admission(Objectives()), AdmissionMetrics(CollectorRegistry()))
    gate.open(Capacity(kv_tokens=1 << 20, block_tokens=16, max_running=max_running), None)
    return gate


def new_charging() -> Charging:
    """It charges nobody: tests of other things serve anyone, who has no limits. No Redis is reached."""
    limiter = Limiter(LimitScript(connect("unix:///nowhere")), "a-replica")
    return Charging(limiter, "a-replica", Pricing(), Metrics(CollectorRegistry()))


def new_generation(gate: Gate | None = None) -> Generation:
    return Generation(new_fitter(), gate or new_gate(), new_charging())


def new_service(
    slot: EngineSlot, requests: OpenRequests, rules: BodyRules | None = None, gate: Gate | None = None
) -> Service:
    rules = rules or BodyRules(frozenset(), MaxTokensDefaults())
    return Service(slot, requests, rules, new_fitter(), new_guards(slot, gate=gate))


def new_guards(
    slot: EngineSlot,
    *,
    gate: Gate | None = None,
    pins: Pins | None = None,
    upstreams: Sequence[Upstream] = (),
    canned_reply: str | None = None,
    restart_wait_s: float = 5.0,
    pressure: Callable[[], float] = lambda: 0.0,
    rules: LadderRules | None = None,
) -> Guards:
    """Gate, recovery, ladder and fallback, with whatever pin, pressure and upstreams a test gives."""
    metrics = ResilienceMetrics(CollectorRegistry())
    sources = LadderSources(pressure, lambda: False, slot, bool(upstreams))
    ladder = LadderWatch(rules or LadderRules(), sources, pins or LocalPins(), metrics)
    degradation = Degradation(ladder, DegradationRules(512, canned_reply), metrics)
    fallback = Fallback(upstreams, metrics, lambda: 0.5)
    one_by_one = OneByOne(plainly_described)
    return Guards(
        gate or new_gate(), new_charging(), Recovery(metrics), degradation, fallback, restart_wait_s, one_by_one
    )


def plainly_described(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """A refusal as the API would show it, nearly."""
    return 400, {"error": {"message": refusal.message, "code": None}}


@dataclass(slots=True)
class FakeProgress:
    """What an engine request has consumed, as the test says."""

    in_engine: bool = True
    prefilled: bool = False
    completion_tokens: int = 0
    cached_tokens: int = 0
    on_started: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class _Demand:
    prompt_tokens: int
    progress: FakeProgress
    max_tokens: int = 16
    n: int = 1
    max_model_len: int = 4096
    fills_window: bool = False


def demand(prompt_tokens: int = 7, progress: FakeProgress | None = None, n: int = 1) -> "Demand":
    """What an engine request asks for."""
    return cast("Demand", _Demand(prompt_tokens, progress or FakeProgress(), n=n))


def open_demand(prompt_tokens: int, progress: FakeProgress) -> "Demand":
    """What a request asks for that names no cap: all that the window leaves."""
    return cast("Demand", _Demand(prompt_tokens, progress, max_tokens=4096 - prompt_tokens, fills_window=True))


@dataclass(slots=True)
class StreamingOperation:
    """Streams like vLLM's chat endpoint: some frames, a frame for each output, `[DONE]`.

    The test says when an output comes (`say`, `fail`, `end`). As in vLLM a refusal becomes an error frame, and
    leaving the frames early does not close the generator below them. Every generator is kept, so that none is closed
    by nothing but the garbage collector; `streams` and `started` count those that began, `closed` and `freed` those
    that ended.
    """

    opening: Sequence[Frame] = ()
    media_type: str = "text/event-stream"
    generation: Generation = field(default_factory=new_generation)
    streams: int = 0
    closed: int = 0
    started: int = 0
    freed: int = 0
    _outputs: "asyncio.Queue[str | Exception | None]" = field(default_factory=asyncio.Queue)
    _kept: list[AsyncGenerator[Any, None]] = field(default_factory=list)

    def say(self, *outputs: str) -> None:
        for output in outputs:
            self._outputs.put_nowait(output)

    def fail(self, error: Exception) -> None:
        self._outputs.put_nowait(error)

    def end(self) -> None:
        self._outputs.put_nowait(None)

    async def __call__(self, call: Call) -> StreamReply:
        del call
        frames = self._frames()
        self._kept.append(frames)
        return StreamReply(frames, self.media_type, refusal_in)

    async def _frames(self) -> AsyncGenerator[Frame, None]:
        self.streams += 1
        try:
            for frame in self.opening:
                yield frame
            outputs = self.generation.generate(demand(), self._engine)
            self._kept.append(outputs)
            try:
                async for output in outputs:
                    yield f"data: {output}\n\n"
            except Refusal:
                yield ERROR_FRAME
            yield DONE_FRAME
        finally:
            self.closed += 1

    async def _engine(self) -> AsyncGenerator[str, None]:
        self.started += 1
        try:
            while (output := await self._outputs.get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            self.freed += 1


def refusal_in(frame: Frame) -> Refusal | None:
    return InvalidRequest("vLLM's words") if frame == ERROR_FRAME else None
