"""From the engine's output to the client's connection without waking the task between them.

A token of a stream wakes the request's task, and passes vLLM's generator and ours on its way out. Where the frames of a
stream are put together from its text alone (`plain_streams`), nobody on that way has anything left to decide before the
stream ends. So while the task waits for the next output, with everything before it sent, a token's text may be written
where it arrives, before vLLM has made an output of it. What ends a stream, what fails, and what a full connection does
not take goes the long way, as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

# Writes a choice's new text, made of these tokens, at once, or does not (None): then it goes the long way.
Deliver = Callable[[int, str, Sequence[int]], "Delivered | None"]


class Delivered:
    """A text is written. `rest`: the connection was full, and this has to be awaited before the next."""

    __slots__ = ("rest",)

    def __init__(self, rest: Awaitable[None] | None = None) -> None:
        self.rest = rest


DELIVERED = Delivered()


class ShortcutCollector(RequestOutputCollector):
    """vLLM's hand-over from the engine's loop to a request's task, which knows whether the task waits."""

    _waiting: bool
    _rest: Awaitable[None] | None

    @property
    def idle(self) -> bool:
        """Whether everything before is sent: nothing is handed over, and the task waits for what comes."""
        return self._waiting and self.output is None

    def wake_for(self, rest: Awaitable[None]) -> None:
        """Let the task await the rest of a write."""
        self._waiting, self._rest = False, rest
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


class ShortcutState(RequestState):
    """vLLM's state of one sequence, with a way around the outputs that are made of it."""

    deliver: Deliver

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        *more: Any,
        **others: Any,
    ) -> RequestOutput | PoolingRequestOutput | None:
        """None where there is nothing to hand over, since it is delivered."""
        queue, detokenizer = self.queue, self.detokenizer
        assert isinstance(queue, ShortcutCollector)
        assert detokenizer is not None
        text = ""
        if finish_reason is None and queue.idle and self.stream_interval == 1:
            text = detokenizer.get_next_output_text(finished=False, delta=True)
            if (delivered := self.deliver(self.request_index, text, new_token_ids)) is not None:
                if delivered.rest is not None:
                    queue.wake_for(delivered.rest)
                return None
        output = super().make_request_output(new_token_ids, pooling_output, finish_reason, *more, **others)
        if text and isinstance(output, RequestOutput):
            output.outputs[0].text = text + output.outputs[0].text
        return output


def open_shortcut(states: Iterable[RequestState], deliver: Deliver) -> None:
    """Let the outputs of a request's sequences take the shortcut from now on.

    Called in the request's task, which therefore does not wait.
    """
    for state in states:
        collector = state.queue
        assert collector is not None
        if not isinstance(collector, ShortcutCollector):  # all sequences of a request share one
            collector.__class__ = ShortcutCollector
            assert isinstance(collector, ShortcutCollector)
            collector._waiting, collector._rest = False, None
        state.__class__ = ShortcutState
        assert isinstance(state, ShortcutState)
        state.deliver = deliver
