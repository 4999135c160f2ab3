"""Tokens that are delivered in one loop: the same text and the same statistics as on vLLM's way."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.metrics.stats import IterationStats, PrefillStats

from server.engine.shortcut import (
    DELIVERED,
    Delivered,
    ShortcutCollector,
    ShortcutState,
    deliver_plain_tokens,
    open_shortcut,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("still_clock")]

_PROMPT = [504, 216, 3]
_SPECIAL = 2  # the end of a turn
_HALF_A_CHARACTER = [181, 219, 237]  # bytes that are no character alone

Steps = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(embedded_model)


@dataclass
class Client:
    """What one stream's client has read. Now and then its connection does not take a frame on the short way."""

    refuses: set[int] = field(default_factory=set)
    text: str = ""
    offered: int = 0
    counted: int = 0

    def deliver(self, index: int, text: str, token_ids: Any) -> Delivered | None:
        assert index == 0
        self.offered += 1
        if self.offered in self.refuses:
            return None
        self.text += text
        self.counted += len(token_ids)
        return DELIVERED

    def hold(self, index: int, token_ids: Any) -> bool:
        assert index == 0
        self.counted += len(token_ids)
        return True


class Engine:
    """vLLM's output processor with some requests in it that have had their first tokens."""

    def __init__(self, tokenizer: Any, names: list[str], params: SamplingParams, *, ours: bool) -> None:
        self.processor = OutputProcessor(tokenizer, log_stats=True)
        if ours:
            deliver_plain_tokens(self.processor, lambda: self.behind, coalesced_tokens=4)
        self.behind = False
        self.collectors = {name: RequestOutputCollector(RequestOutputKind.DELTA, name) for name in names}
        self.clients = {name: Client() for name in names}
        for name in names:
            request = EngineCoreRequest(name, _PROMPT, None, params, None, 0.0, None, None, None)
            request.external_req_id = name
            self.processor.add_request(request, "prompt", None, 0, self.collectors[name])
        first = [EngineCoreOutput(name, [504], prefill_stats=PrefillStats(num_prompt_tokens=3)) for name in names]
        self.processor.process_outputs(first, 1.0, IterationStats())
        self._read()

    def open(self) -> None:
        for name, client in self.clients.items():
            open_shortcut([self.processor.request_states[name]], client.deliver, client.hold)

    def step(self, number: int, outputs: list[EngineCoreOutput]) -> IterationStats:
        for collector in self.collectors.values():
            if isinstance(collector, ShortcutCollector):
                collector._waiting = True
        stats = IterationStats()
        self.processor.process_outputs(outputs, 2.0 + number, stats)
        self._read()
        return stats

    def _read(self) -> None:
        for name, collector in self.collectors.items():
            if (output := collector.get_nowait()) is not None:
                assert isinstance(output, RequestOutput)
                self.clients[name].text += output.outputs[0].text
                self.clients[name].counted += len(output.outputs[0].token_ids)


def _made(step: dict[str, list[int]], *, last: bool) -> list[EngineCoreOutput]:
    reason = FinishReason.LENGTH if last else None
    return [EngineCoreOutput(name, list(ids), finish_reason=reason) for name, ids in step.items()]


_IDS = st.one_of(st.integers(1000, 30_000), st.sampled_from([_SPECIAL, *_HALF_A_CHARACTER]))
_STEPS = st.lists(
    st.fixed_dictionaries({}, optional={name: st.lists(_IDS, min_size=1, max_size=3) for name in "abc"}), max_size=8
)


@settings(max_examples=150)
@given(
    steps=_STEPS,
    refused=st.sets(st.integers(1, 8)),
    behind=st.sets(st.integers(0, 7)),
    show_special=st.booleans(),
    stop=st.booleans(),
)
def test_text_and_statistics_are_vllms(
    tokenizer: Any, steps: Steps, refused: set[int], behind: set[int], show_special: bool, stop: bool
) -> None:
    params = SamplingParams(
        output_kind=RequestOutputKind.DELTA,
        skip_special_tokens=not show_special,
        spaces_between_special_tokens=not show_special,
        stop=["never said"] if stop else None,
    )
    ours, theirs = (Engine(tokenizer, list("abc"), params, ours=is_ours) for is_ours in (True, False))
    ours.open()
    ours.clients["a"].refuses = refused
    steps = [*steps, {name: [2000] for name in "abc"}]
    for number, step in enumerate(steps):
        ours.behind = number in behind
        told = [engine.step(number, _made(step, last=number == len(steps) - 1)) for engine in (ours, theirs)]
        mine, vllms = told
        assert mine.num_generation_tokens == vllms.num_generation_tokens
        assert sorted(mine.inter_token_latencies_iter) == sorted(vllms.inter_token_latencies_iter)
        assert [done.decode_time for done in mine.finished_requests] == [
            done.decode_time for done in vllms.finished_requests
        ]
        _assert_same_sequences(ours, theirs)
        if not ours.behind:
            assert _read(ours) == _read(theirs)
    assert _read(ours) == _read(theirs)


def _read(engine: Engine) -> dict[str, tuple[str, int]]:
    return {name: (client.text, client.counted) for name, client in engine.clients.items()}


def _assert_same_sequences(ours: Engine, theirs: Engine) -> None:
    for name, state in ours.processor.request_states.items():
        other = theirs.processor.request_states[name]
        assert state.detokenizer is not None
        assert other.detokenizer is not None
        assert state.detokenizer.token_ids == other.detokenizer.token_ids
        assert ours.behind or _unshown(state) == _unshown(other)
        assert state.stats == other.stats


def _unshown(state: RequestState) -> str:
    detokenizer: Any = state.detokenizer
    text: str = detokenizer.output_text[detokenizer._last_output_text_offset :]
    return text


def test_a_plain_token_is_delivered_without_an_output(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tokenizer, ["a"], SamplingParams(output_kind=RequestOutputKind.DELTA), ours=True)
    engine.open()
    monkeypatch.setattr(ShortcutState, "make_request_output", None)  # vLLM would call it
    engine.step(0, [EngineCoreOutput("a", [2000])])
    assert engine.clients["a"].offered == 1
    assert engine.clients["a"].text == tokenizer.decode([504, 2000])


def test_special_tokens_in_a_row_have_no_spaces_between_them_where_none_are_wanted() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "hello": 1}, "<unk>")))
    words.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    params = SamplingParams(
        output_kind=RequestOutputKind.DELTA, skip_special_tokens=False, spaces_between_special_tokens=False
    )
    ours, theirs = (Engine(words, ["a"], params, ours=is_ours) for is_ours in (True, False))
    ours.open()
    for number, token_id in enumerate([1, 2, 3, 2, 1]):
        for engine in (ours, theirs):
            engine.step(number, [EngineCoreOutput("a", [token_id])])
    assert ours.clients["a"].text == theirs.clients["a"].text
    assert ours.clients["a"].text.endswith(" hello <a><b><a> hello")


def test_tokens_share_a_frame_while_the_loop_is_behind_and_never_else(tokenizer: Any) -> None:
    engine = Engine(tokenizer, ["a"], SamplingParams(output_kind=RequestOutputKind.DELTA), ours=True)
    engine.open()
    engine.behind = True
    for number in range(6):
        engine.step(number, [EngineCoreOutput("a", [2000 + number])])
    client = engine.clients["a"]
    assert (client.offered, client.text) == (1, tokenizer.decode([504, 2000, 2001, 2002, 2003]))
    engine.behind = False
    engine.step(6, [])  # of other streams
    assert (client.offered, client.text) == (2, tokenizer.decode([504, *range(2000, 2006)]))
    engine.step(7, [EngineCoreOutput("a", [2006])])
    assert client.offered == 3


def test_what_is_held_of_a_stream_that_ends_or_is_aborted_goes_with_it(tokenizer: Any) -> None:
    engine = Engine(tokenizer, ["a", "b"], SamplingParams(output_kind=RequestOutputKind.DELTA), ours=True)
    engine.open()
    engine.behind = True
    engine.step(0, [EngineCoreOutput(name, [2000]) for name in "ab"])
    engine.processor.abort_requests(["b"], internal=True)
    engine.step(1, [EngineCoreOutput("a", [2001], finish_reason=FinishReason.LENGTH)])
    assert engine.clients["a"].text == tokenizer.decode([504, 2000, 2001])
    engine.behind = False
    engine.step(2, [])
    assert not engine.processor.request_states
    assert engine.clients["b"].offered == 0


def test_what_vllm_has_shown_meanwhile_is_not_shown_again(tokenizer: Any) -> None:
    engine = Engine(tokenizer, ["a"], SamplingParams(output_kind=RequestOutputKind.DELTA), ours=True)
    engine.open()
    engine.behind = True
    engine.step(0, [EngineCoreOutput("a", [2000])])
    engine.processor.process_outputs([EngineCoreOutput("a", [2001])], 3.0, IterationStats(), weight_version="new")
    engine.behind = False
    shown = engine.clients["a"].offered
    engine.step(1, [])
    assert (engine.clients["a"].offered, engine.clients["a"].text) == (shown, tokenizer.decode([504, 2000, 2001]))


def test_what_carries_more_than_tokens_goes_vllms_way(tokenizer: Any) -> None:
    engine = Engine(tokenizer, ["a"], SamplingParams(output_kind=RequestOutputKind.DELTA), ours=True)
    engine.open()
    collector = engine.collectors["a"]
    assert isinstance(collector, ShortcutCollector)
    collector._waiting = True
    output = EngineCoreOutput("a", [2000], kv_transfer_params={"block": 1})
    engine.processor.process_outputs([output], 2.0, IterationStats())
    handed_over = collector.get_nowait()
    assert isinstance(handed_over, RequestOutput)
    assert handed_over.kv_transfer_params == {"block": 1}
    assert engine.clients["a"].offered == 0
