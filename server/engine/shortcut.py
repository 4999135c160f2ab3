"""From the engine's output to the client's connection without waking the task between them.

A token of a stream wakes the request's task, and passes vLLM's generator and ours on its way out. Where the frames of a
stream are put together from its text alone (`plain_streams`), nobody on that way has anything left to decide before the
stream ends. So while the task waits for the next output, with everything before it sent, an output may be written where
it arrives. What ends a stream, what fails, and what a full connection does not take goes the long way, as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

# Writes an output at once, or does not (None): then it goes the long way.
Deliver = Callable[[RequestOutput], "Delivered | None"]


class Delivered:
    """An output is written. `rest`: the connection was full, and this has to be awaited before the next."""

    __slots__ = ("rest",)

    def __init__(self, rest: Awaitable[None] | None = None) -> None:
        self.rest = rest


DELIVERED = Delivered()


class ShortcutCollector(RequestOutputCollector):
    """vLLM's hand-over from the engine's loop to a request's task, with a way around it."""

    deliver: Deliver
    _waiting: bool
    _rest: Awaitable[None] | None

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take an output. It is delivered only if everything before it was, and its task waits for it."""
        delivered = None
        if self._waiting and self.output is None and isinstance(output, RequestOutput):
            delivered = self.deliver(output)
        if delivered is None:
            super().put(output)
        elif delivered.rest is not None:
            self._waiting, self._rest = False, delivered.rest
            self.ready.set()

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        """The next output that was not delivered."""
        while self.output is None:
            self._waiting = True
            try:
                await self.ready.wait()
            finally:
                self._waiting = False
            if (rest := self._rest) is not None:
                self._rest = None
                if self.output is None:
                    self.ready.clear()
                await rest
        return await super().get()


def open_shortcut(collector: RequestOutputCollector, deliver: Deliver) -> None:
    """Let a request's outputs take the shortcut from now on. Called in its task, which therefore does not wait."""
    collector.__class__ = ShortcutCollector
    assert isinstance(collector, ShortcutCollector)
    collector.deliver, collector._waiting, collector._rest = deliver, False, None
