"""Where the running engine stands: empty while it loads or is replaced, filled when it serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from server.policy.refusals import NotReady

if TYPE_CHECKING:  # importing the engine room imports vLLM, which takes seconds that the port does not wait for
    from server.engine.stack import Stack

_LOADING_RETRY_AFTER_S = 5.0
_REPLACING = "replacing the engine"


class EngineSlot:
    """Holds the stack that serves now, or the stage of its loading."""

    def __init__(self) -> None:
        self._stage = "starting"
        self.default_model = ""  # of the stack that serves or served last
        self._stack: Stack | None = None
        self._has_served = False
        self._filled = asyncio.Event()

    @property
    def stack(self) -> Stack:
        """The serving stack. Raises `NotReady` while there is none."""
        if self._stack is None:
            message = f"The model is not ready yet ({self.stage}). Please try again in a moment."
            raise NotReady(message, retry_after_s=_LOADING_RETRY_AFTER_S)
        return self._stack

    @property
    def stage(self) -> str:
        """What the engine does, for a person who asks."""
        return _REPLACING if self._stack is not None and not self._stack.alive else self._stage

    @property
    def ready(self) -> bool:
        return self._stack is not None and self._stack.alive

    @property
    def down(self) -> bool:
        """Whether an engine that served has died, and the next one is not there yet."""
        return self._has_served and not self.ready

    async def filled(self) -> None:
        """Wait for the first stack."""
        while not self._has_served:
            await self._filled.wait()

    async def wait(self, timeout_s: float) -> None:
        """Wait while the slot is down, `timeout_s` at most."""
        if not self.down:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while self.down:
                    self._filled.clear()
                    await self._filled.wait()
        except TimeoutError:
            return

    def enter(self, stage: str) -> None:
        """Tell how far loading has come."""
        self._stage = stage

    def fill(self, stack: Stack) -> None:
        self._stack, self._stage, self._has_served = stack, "ready", True
        self.default_model = stack.model_names[0]
        self._filled.set()

    def empty(self, stage: str) -> Stack | None:
        """Take the stack out; requests that still run on it keep it."""
        stack, self._stack, self._stage = self._stack, None, stage
        return stack
