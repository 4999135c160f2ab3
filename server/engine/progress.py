"""What an engine request has consumed, read from vLLM's own state of it.

vLLM's output processor keeps a state for each sequence of a request, whatever of it the client is shown: an answer in
one piece shows nothing before its end, and an aborted one perhaps nothing at all. We keep these states, so the
figures are exact at any moment and cost nothing per token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from server.engine.prompt_tails import begin_with_tail

Output = TypeVar("Output")


class Progress:
    """What one engine request has consumed so far; all of it is 0 until the engine has it.

    `on_started` is told the engine's own name for each choice when it is given to the engine.
    """

    def __init__(self) -> None:
        self._states: list[RequestState] = []
        self.on_started: Callable[[str], None] | None = None

    @property
    def in_engine(self) -> bool:
        """Whether the engine was given the request."""
        return bool(self._states)

    @property
    def prefilled(self) -> bool:
        """Whether every choice has its first token, whatever of it the client is shown."""
        return bool(self._states) and not any(state.is_prefilling for state in self._states)

    @property
    def completion_tokens(self) -> int:
        """Generated tokens over all `n` choices, as `usage` counts them."""
        return sum(state.detokenizer.num_output_tokens() for state in self._states if state.detokenizer is not None)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, by the choice that found fewest: the others find what it left."""
        return min((state.num_cached_tokens for state in self._states if not state.is_prefilling), default=0)

    @property
    def states(self) -> Sequence[RequestState]:
        """vLLM's states of its choices."""
        return self._states

    def restart(self) -> None:
        """Forget what was consumed: the request is run again from its beginning."""
        self._states = []

    def follow(self, state: RequestState) -> None:
        if state not in self._states:  # streamed input adds to the same one
            self._states.append(state)
            if self.on_started is not None:
                self.on_started(state.request_id)


_followed: ContextVar[Progress | None] = ContextVar("followed_progress", default=None)


def followed(
    progress: Progress, outputs: Callable[[], AsyncGenerator[Output, None]]
) -> Callable[[], AsyncGenerator[Output, None]]:
    """`outputs` with its progress followed. The first step must be made in the context that called it."""

    def start() -> AsyncGenerator[Output, None]:
        progress.restart()
        _followed.set(progress)
        return outputs()

    return start


def progress_here() -> Progress | None:
    """The progress of the engine request that was started last in this task."""
    return _followed.get()


class FollowedOutputProcessor(OutputProcessor):
    """vLLM's output processor, which hands each new state to the progress that is followed in its context.

    Of a prompt it gives the detokenizer as much as that needs.
    """

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        goes_on = request.request_id in self.request_states  # streamed input adds to a state that is there
        super().add_request(request, prompt, parent_req, request_index, queue)
        if (state := self.request_states.get(request.request_id)) is None:
            return  # streamed input has ended after its answer
        if not goes_on:
            begin_with_tail(state.detokenizer, request.prompt_token_ids)
        if (progress := _followed.get()) is not None:
            progress.follow(state)


def follow_requests(processor: OutputProcessor) -> None:
    """Put it into a live engine in place: the engine builds its processor itself, and keeps references to it."""
    processor.__class__ = FollowedOutputProcessor
