"""Where an engine takes its place: the slot that operations run on, and the gate that lets requests in to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.serving.engine_slot import EngineSlot
from server.serving.queue import Gate

if TYPE_CHECKING:  # importing the engine room imports vLLM
    from server.engine.stack import Stack


class Seat:
    """Fills and empties both together."""

    def __init__(self, slot: EngineSlot, gate: Gate) -> None:
        self._slot = slot
        self._gate = gate

    def fill(self, stack: Stack) -> None:
        """Requests run on this stack from now on, as many as it has room for."""
        self._gate.open(stack.capacity, stack.unloaded)
        self._slot.fill(stack)

    def empty(self, stage: str) -> Stack | None:
        """No stack serves until the next one is there."""
        self._gate.close()
        return self._slot.empty(stage)
