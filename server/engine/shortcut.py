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

from vllm import envs
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    OutputProcessorOutput,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.metrics.stats import IterationStats

from server.engine.progress import FollowedOutputProcessor

# Writes a choice's new text, made of these tokens, at once, or does not (None): then it goes the long way.
Deliver = Callable[[int, str, Sequence[int]], "Delivered | None"]
# Counts a choice's tokens whose text comes with a later frame, or does not.
Hold = Callable[[int, Sequence[int]], bool]


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
    """vLLM's state of one sequence, with a way around the outputs that are made of it.

    `texts_alone`: tokens become text by vLLM's fast detokenizer, and nothing is looked for in the text. `held`: tokens
    whose text was not shown yet, though it might have been.
    """

    deliver: Deliver
    hold: Hold
    texts_alone: bool
    held: int

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
        says_more = finish_reason is not None or any(more) or self.sampling_mask_chunks or self.routed_experts_chunks
        if not says_more and queue.idle and self.stream_interval == 1:
            text = detokenizer.get_next_output_text(finished=False, delta=True)
            if self.delivered(text, new_token_ids):
                return None
        return self._output_with(text, new_token_ids, pooling_output, finish_reason, *more, **others)

    def delivered(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether the new text could be written; what a full connection leaves of it is the task's."""
        self.held = 0
        delivered = self.deliver(self.request_index, text, token_ids)
        if delivered is not None and delivered.rest is not None:
            assert isinstance(self.queue, ShortcutCollector)
            self.queue.wake_for(delivered.rest)
        return delivered is not None

    def held_back(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens' text is to come with a later frame."""
        if not self.hold(self.request_index, token_ids):
            return False
        self.held += len(token_ids)
        return True

    def hand_over(self, text: str, token_ids: list[int]) -> None:
        """Give text that was not delivered to the request's task."""
        output = self._output_with(text, token_ids, None, None, None, None, None)
        if output is not None:
            assert self.queue is not None
            self.queue.put(output)

    def _output_with(self, text: str, *told: Any, **others: Any) -> RequestOutput | PoolingRequestOutput | None:
        """vLLM's output, with text in front that the detokenizer takes for shown."""
        self.held = 0
        output = super().make_request_output(*told, **others)
        if text and isinstance(output, RequestOutput):
            output.outputs[0].text = text + output.outputs[0].text
        return output


class ShortcutOutputProcessor(FollowedOutputProcessor):
    """vLLM's output processor, which delivers tokens that are nothing but that before it looks at the others.

    vLLM asks a dozen functions about each token, and nearly all have nothing to do for a plain one in a stream of text.
    While the event loop is `behind` the engine, whose next step is there already, a stream's tokens wait for those of
    that step, up to `coalesced_tokens`: a frame of several costs hardly more than a frame of one.
    """

    behind: Callable[[], bool]
    coalesced_tokens: int
    holding: dict[str, ShortcutState]

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        if weight_version is None and not envs.VLLM_COMPUTE_NANS_IN_LOGITS:
            engine_core_outputs = self._not_delivered(
                engine_core_outputs, engine_core_timestamp or 0.0, iteration_stats
            )
        return super().process_outputs(
            engine_core_outputs, engine_core_timestamp, iteration_stats, weight_version=weight_version
        )

    def _not_delivered(
        self, outputs: list[EngineCoreOutput], timestamp_s: float, stats: IterationStats | None
    ) -> list[EngineCoreOutput]:
        """Deliver what can be, with what vLLM does for it on the way, and return the others."""
        states, others, tokens, gaps_s = self.request_states, [], 0, []
        most_held = self.coalesced_tokens - 1 if self.behind() else 0
        for output in outputs:
            state = states.get(output.request_id)
            if type(state) is not ShortcutState or not state.texts_alone or not _is_nothing_but_tokens(output):
                others.append(output)
                continue
            queue, detokenizer, token_ids = state.queue, state.detokenizer, output.new_token_ids
            if not queue._waiting or queue.output is not None:  # its `idle`, without the call
                others.append(output)
                continue
            if stats is not None:
                own = state.stats
                tokens += len(token_ids)
                own.num_generation_tokens += len(token_ids)
                gaps_s.append(timestamp_s - own.last_token_ts)
                own.last_token_ts = timestamp_s
            text = _decoded(detokenizer, token_ids)
            if state.held + len(token_ids) <= most_held and state.held_back(token_ids):
                detokenizer.output_text += text
                self.holding[output.request_id] = state
                continue
            if state.held:
                self.holding.pop(output.request_id, None)
                text = _shown(detokenizer) + text
            if not state.delivered(text, token_ids):
                state.hand_over(text, token_ids)
        if stats is not None:
            stats.num_generation_tokens += tokens
            stats.inter_token_latencies_iter += gaps_s
        if self.holding:
            self._let_go(others, all_of_it=not most_held)
        return others

    def _let_go(self, others: Iterable[EngineCoreOutput], *, all_of_it: bool) -> None:
        """Forget what goes vLLM's way now, and show what was held back of streams that have had no token since."""
        for output in others:
            self.holding.pop(output.request_id, None)
        if not all_of_it:
            return
        holding, self.holding = self.holding, {}
        for request_id, state in holding.items():
            if not state.held or self.request_states.get(request_id) is not state:
                continue
            assert isinstance(state.queue, ShortcutCollector)
            text = _shown(state.detokenizer)
            if not (state.queue.idle and state.delivered(text, ())):
                state.hand_over(text, [])


def _is_nothing_but_tokens(output: EngineCoreOutput) -> bool:
    """Whether a sequence goes on, and there is nothing to be done for it but to show its new tokens."""
    return (
        output.finish_reason is None
        and output.events is None
        and output.prefill_stats is None
        and output.new_logprobs is None
        and output.new_prompt_logprobs_tensors is None
        and output.prompt_token_id_logprobs is None
        and output.new_sampling_mask is None
        and output.pooling_output is None
        and output.routed_experts is None
        and output.spec_decode_metrics is None
        and output.kv_transfer_params is None
        and output.ec_transfer_params is None
        and output.mm_cache_miss_hashes is None
    )


def _decoded(detokenizer: Any, token_ids: Sequence[int]) -> str:
    """What `update` of vLLM's fast detokenizer adds to its text, where there is nothing to look for.

    Of a stream nothing is asked for that was shown before. So a text that is shown at once need not be added: vLLM
    copies all of an answer for each of its tokens.
    """
    detokenizer.token_ids += token_ids
    step = detokenizer._protected_step
    if len(token_ids) == 1:
        return step(token_ids[0]) or ""
    return "".join([step(token_id) or "" for token_id in token_ids])


def _shown(detokenizer: Any) -> str:
    """The text that was held back, as its `get_next_output_text` gives it."""
    text: str = detokenizer.output_text[detokenizer._last_output_text_offset :]
    detokenizer._last_output_text_offset = len(detokenizer.output_text)
    return text


def _texts_alone(state: RequestState) -> bool:
    detokenizer = state.detokenizer
    return (
        type(detokenizer) is FastIncrementalDetokenizer
        and not detokenizer.stop
        and detokenizer.spaces_between_special_tokens
        and state.stream_interval == 1
        and not state.is_prefilling
        and not state.streaming_input
    )


def open_shortcut(states: Iterable[RequestState], deliver: Deliver, hold: Hold) -> None:
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
        texts_alone = _texts_alone(state)
        state.__class__ = ShortcutState
        assert isinstance(state, ShortcutState)
        state.deliver, state.hold, state.texts_alone, state.held = deliver, hold, texts_alone, 0


def deliver_plain_tokens(processor: OutputProcessor, behind: Callable[[], bool], coalesced_tokens: int) -> None:
    """Put it into a live engine in place, as `follow_requests` does, and with it."""
    processor.__class__ = ShortcutOutputProcessor
    assert isinstance(processor, ShortcutOutputProcessor)
    processor.behind, processor.coalesced_tokens, processor.holding = behind, coalesced_tokens, {}
