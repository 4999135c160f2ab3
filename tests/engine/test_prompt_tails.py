"""Answers whose detokenizer knows the end of the prompt only: the same text as with all of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from server.engine.progress import follow_requests

pytestmark = pytest.mark.engine

_WORDS = ["the", "tide", "潮", "水", ".", ",", "n't", "é", "do", "##s", "lock"]


def _with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a character of its own, dropped at the beginning of a text; unknown ones are bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *bytes_, *_WORDS, *(f"▁{word}" for word in _WORDS), "▁"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _with_word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: a space before each word, taken out again before a full stop."""
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", *_WORDS])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _with_metaspace() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *_WORDS, *(f"▁{word}" for word in _WORDS)]
    backend = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def all_tokenizers(embedded_model: Path) -> dict[str, Any]:
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    made = {
        "byte level": AutoTokenizer.from_pretrained(embedded_model),
        "byte fallback": _with_byte_fallback(),
        "word pieces": _with_word_pieces(),
        "metaspace": _with_metaspace(),
    }
    for name, tokenizer in made.items():
        if name != "byte level":
            tokenizer.add_special_tokens(special)
    return made


def _detokenizer(
    tokenizer: Any, prompt: Sequence[int], params: SamplingParams, *, ours: bool
) -> FastIncrementalDetokenizer:
    processor = OutputProcessor(tokenizer, log_stats=False)
    if ours:
        follow_requests(processor)
    request = EngineCoreRequest("a", list(prompt), None, params, None, 0.0, None, None, None)
    request.external_req_id = "a"
    processor.add_request(request, None, None, 0, RequestOutputCollector(RequestOutputKind.DELTA, "a"))
    detokenizer = processor.request_states["a"].detokenizer
    assert isinstance(detokenizer, FastIncrementalDetokenizer)
    return detokenizer


def _texts(detokenizer: FastIncrementalDetokenizer, answer: Sequence[int]) -> list[str]:
    said = []
    for token_id in answer:
        detokenizer.update([token_id], stop_terminated=False)
        said.append(detokenizer.get_next_output_text(finished=False, delta=True))
    return said


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "word pieces", "metaspace"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_the_text_is_the_same(all_tokenizers: dict[str, Any], name: str, data: st.DataObject) -> None:
    tokenizer = all_tokenizers[name]
    ids = st.integers(0, len(tokenizer) - 1)
    if name == "byte level":  # half characters are rare among its tokens
        ids |= st.sampled_from([2, 181, 219, 237])
    prompt = data.draw(st.lists(ids, min_size=1, max_size=80))
    answer = data.draw(st.lists(ids, min_size=1, max_size=12))
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, skip_special_tokens=data.draw(st.booleans()))
    ours, theirs = (_texts(_detokenizer(tokenizer, prompt, params, ours=is_ours), answer) for is_ours in (True, False))
    assert ours == theirs


@pytest.mark.parametrize(
    ("ending", "kept"),
    [
        pytest.param([504] * 200, True, id="words"),
        pytest.param([504] * 200 + [237], False, id="half a character at the end"),
        pytest.param([504] * 32, False, id="short"),
        pytest.param([504] * 200 + [2] * 40, False, id="no text at the end"),
    ],
)
def test_the_end_of_a_long_prompt_is_enough(
    all_tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ending: list[int], kept: bool
) -> None:
    begun = _counted_streams(monkeypatch)
    _detokenizer(all_tokenizers["byte level"], ending, SamplingParams(), ours=True)
    assert begun == ([len(ending), 32] if kept else [len(ending)])


def _counted_streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With how many tokens of a prompt each stream of text begins."""
    begun: list[int] = []
    make: Callable[..., Any] = decoders.DecodeStream

    def counted(ids: list[int], skip_special_tokens: bool) -> Any:
        begun.append(len(ids))
        return make(ids=ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(decoders, "DecodeStream", counted)
    return begun


def test_more_input_does_not_begin_the_answer_anew(all_tokenizers: dict[str, Any]) -> None:
    processor = OutputProcessor(all_tokenizers["byte level"], log_stats=False)
    follow_requests(processor)
    streams = []
    for _ in range(2):
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        request = EngineCoreRequest("a", [504] * 100, None, params, None, 0.0, None, None, None, resumable=True)
        request.external_req_id = "a"
        processor.add_request(request, None, None, 0, RequestOutputCollector(RequestOutputKind.DELTA, "a"))
        detokenizer = processor.request_states["a"].detokenizer
        assert isinstance(detokenizer, FastIncrementalDetokenizer)
        streams.append(detokenizer.stream)
    assert streams[0] is streams[1]
