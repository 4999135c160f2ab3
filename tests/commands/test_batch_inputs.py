import json
from pathlib import Path
from typing import Any

import pytest

from server.commands.batch_inputs import Asking, BadRecord, Question, read_questions

ALPACA = {"instruction": "Translate.", "input": "Bonjour", "output": "Hello", "system": "You translate."}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "More"},
    ]
}
BATCH = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 5}}


def read(folder: Path, *records: Any, asking: Asking | None = None, array: bool = False) -> list[Question]:
    file = folder / "data.json"
    lines = json.dumps(records, indent=2) if array else "\n\n".join(json.dumps(record) for record in records)
    file.write_text(lines, encoding="utf-8")
    return list(read_questions(file, asking or Asking()))


@pytest.mark.parametrize("array", [False, True])
def test_alpaca_asks_its_instruction_and_knows_its_output(tmp_path: Path, array: bool) -> None:
    (question,) = read(tmp_path, ALPACA, array=array)
    assert question.request["body"]["messages"] == [
        {"role": "system", "content": "You translate."},
        {"role": "user", "content": "Translate.\nBonjour"},
    ]
    assert (question.custom_id, question.text, question.reference) == ("line-1", "Translate.\nBonjour", "Hello")


def test_alpaca_brings_its_history(tmp_path: Path) -> None:
    (question,) = read(tmp_path, {"instruction": "Now?", "output": "", "history": [["One?", "1"], ["Two?", "2"]]})
    contents = [message["content"] for message in question.request["body"]["messages"]]
    assert contents == ["One?", "1", "Two?", "2", "Now?"]
    assert question.reference is None


def test_sharegpt_asks_its_last_question_and_knows_its_last_answer(tmp_path: Path) -> None:
    (question,) = read(tmp_path, SHAREGPT)
    roles = [message["role"] for message in question.request["body"]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert (question.text, question.reference) == ("And?", "More")


def test_messages_in_openais_form_are_read_like_sharegpt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (question,) = read(tmp_path, {"id": "mine", "messages": messages})
    assert (question.custom_id, question.text, question.reference) == ("mine", "Hi", "Hello")


def test_batch_lines_pass_as_they_are(tmp_path: Path) -> None:
    (question,) = read(tmp_path, BATCH)
    assert question.request == BATCH
    assert (question.text, question.reference) == ("Once", None)


def test_a_run_adds_what_a_question_leaves_open(tmp_path: Path) -> None:
    asking = Asking(model="m", max_tokens=9, temperature=0.0, system="Be short.")
    alpaca, batch = read(tmp_path, {**ALPACA, "system": ""}, BATCH, asking=asking)
    assert alpaca.request["body"]["messages"][0] == {"role": "system", "content": "Be short."}
    assert (alpaca.request["body"]["max_tokens"], batch.request["body"]["max_tokens"]) == (9, 5)
    assert batch.request["body"]["model"] == "m"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "hm"}, "no batch line"),
        ([1], "not a JSON object"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "observation"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "does not end with a question"),
        ({"conversations": ["x"]}, "a turn is not an object"),
        ({"conversations": []}, "does not end with a question"),
    ],
)
def test_a_record_of_no_known_form_is_named(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(BadRecord, match=f"record 2: .*{said}"):
        read(tmp_path, ALPACA, record)


@pytest.mark.parametrize(("content", "said"), [(b'{"a": ', "neither JSONL nor"), (b'{"a": "\xff"}', "not UTF-8")])
def test_a_file_of_no_known_form_is_said_so(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(BadRecord, match=said):
        list(read_questions(tmp_path / "data", Asking()))
