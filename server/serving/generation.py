"""The story of one generation: the file to read to know what the server does between tokens and outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from server.policy.edits import Edits
from server.policy.forecast import Step
from server.policy.refusals import Refusal
from server.policy.tenants import ANYONE
from server.policy.terms import DEFAULT_TERMS
from server.serving.charging import Charging
from server.serving.fitting import HistoryFitter
from server.serving.queue import Slot
from server.serving.requests import OpenRequest, Running, current_request
from server.telemetry.traces import Traces

if TYPE_CHECKING:
    from server.engine.conversations import Conversation, Rendered, TextPrompts
    from server.engine.seams import Demand

Output = TypeVar("Output")


class Entrance(Protocol):
    """A gate, as far as generations pass it."""

    def slot(self, request: OpenRequest, demand: Demand) -> Slot:
        """A place in the engine, for `async with`: entering waits for it. Raises `Overloaded` and `InvalidRequest`."""
        ...

    def stepped(self, step: Step) -> None:
        """Take in the figures of one engine step."""
        ...


class Generation:
    """What happens at the engine's two seams, for every endpoint alike."""

    def __init__(
        self, fitter: HistoryFitter, gate: Entrance, charging: Charging, traces: Traces | None = None
    ) -> None:  # fmt: skip
        self._fitter = fitter
        self._gate = gate
        self._charging = charging
        self._traces = traces or Traces()

    def stepped(self, step: Step) -> None:
        """The engine made a step."""
        self._gate.stepped(step)

    def engine_priority(self, asked: int) -> int:
        """The priority of an engine request among those that the engine queues itself; lower is earlier.

        `asked` is what vLLM read from the request. It can only add to what the request's class has.
        """
        request = current_request()
        return (DEFAULT_TERMS if request is None else request.terms).engine_priority(asked)

    def owner(self) -> str:
        """The tenant whose request runs here, by name."""
        request = current_request()
        return (ANYONE if request is None else request.tenant).name

    def trace_headers(self) -> dict[str, str]:
        """By these the engine adds to the trace of the request that runs here; empty where it is in none."""
        return self._traces.carrier()

    async def render(self, conversation: Conversation) -> Rendered:
        """Seam 1: messages become tokens."""
        request = _request()
        try:
            with self._traces.part("render"):
                return await self._fitter.render(conversation, request)
        except Refusal as refusal:
            request.refusal = refusal
            raise

    async def render_text(self, prompts: TextPrompts) -> list[Any]:
        """Seam 1 for plain prompts."""
        return await self._fitter.render_text(prompts, _request())

    async def generate(
        self, demand: Demand, outputs: Callable[[], AsyncGenerator[Output, None]]
    ) -> AsyncGenerator[Output, None]:
        """Seam 2: tokens become outputs. Leaving it closes the engine's generator, which frees its KV blocks."""
        request = _request()
        request.prompt_tokens += demand.prompt_tokens
        _note_clamp(demand, request)
        try:
            async with self._charging.charge(request, demand), self._gate.slot(request, demand) as slot:
                while True:
                    request.admitted()
                    running, begun = Running(outputs()), False
                    request.running.add(running)
                    request.exposed = request.exposed or not request.lost_its_engine
                    try:
                        async for output in running.generator:
                            if not begun:
                                begun = request.producing = True
                                slot.streamed()
                            yield output
                            running.consumer = asyncio.current_task()
                    except asyncio.CancelledError:
                        if begun or request.letting_go or not slot.gave_up():
                            raise
                    else:
                        slot.finished = True
                        return
                    finally:
                        await running.close()
                        request.running.discard(running)
                    await slot.wait_again()
        except Refusal as refusal:
            request.refusal = refusal
            raise


def _request() -> OpenRequest:
    """The open request, or a stand-in for work that no client waits for; its owner is charged all the same."""
    request = current_request()
    if request is None:
        return OpenRequest(request_id="", path="")
    return request.stand_in() if request.detached else request


def _note_clamp(demand: Demand, request: OpenRequest) -> None:
    """vLLM lowers `max_tokens` to what the window leaves, and says nothing."""
    asked, granted = request.asked_max_tokens, demand.max_tokens
    if asked is not None and granted < asked and demand.fills_window:
        request.edited(Edits(max_tokens=(asked, granted)))
