"""`tidegate batch` against the real application over HTTP, with a real Redis and without an engine."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from server.cli import cli
from server.commands.scores import score
from server.engine.calls import Call, Reply
from server.policy.refusals import InvalidRequest
from tests.api.running_application import running
from tests.serving.batch_files import CHAT, jsonl, line, records
from tests.serving.chat_operation import ChatOperation
from tests.serving.fake_stack import FakeStack


async def models(_: Call) -> Reply:
    return Reply(b'{"data": [{"id": "a-model"}]}', "application/json")


@pytest.fixture
def chat() -> ChatOperation:
    return ChatOperation()


@pytest.fixture
def server(store_url: str, tmp_path: Path, chat: ChatOperation) -> Iterator[httpx.Client]:
    stack = FakeStack({("POST", CHAT): chat, ("GET", "/v1/models"): models})
    with running(stack, redis_url=store_url, data_folder=tmp_path / "data") as client:
        yield client


def tidegate(*args: Any) -> Result:
    return CliRunner().invoke(cli, ["batch", *map(str, args)], catch_exceptions=False)


def run(server: httpx.Client, questions: Path, output: Path, *args: Any) -> Result:
    return tidegate("run", questions, "-o", output, "--url", server.base_url, *args)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    data = [{"instruction": f"question {n}", "output": f"QUESTION {n}"} for n in range(12)]
    file.write_bytes(jsonl(data))
    return file


def test_a_run_answers_every_question_in_order(server: httpx.Client, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run(server, questions, output)
    assert result.exit_code == 0, result.output
    assert "12 answered" in result.output
    found = records(output.read_bytes())
    assert [item["custom_id"] for item in found] == [f"line-{n}" for n in range(1, 13)]
    assert [path.name for path in tmp_path.glob("out.jsonl*")] == ["out.jsonl"]


def test_running_again_asks_only_what_has_no_answer(
    server: httpx.Client, questions: Path, tmp_path: Path, chat: ChatOperation
) -> None:
    output = tmp_path / "out.jsonl"
    chat.failing["question 5"] = InvalidRequest("Not now.")
    first = run(server, questions, output)
    assert "1 not" in first.output
    assert [item["custom_id"] for item in records((tmp_path / "out.jsonl.errors.jsonl").read_bytes())] == ["line-6"]
    chat.failing.clear()
    chat.asked.clear()
    assert run(server, questions, output).exit_code == 0
    assert chat.asked == ["question 5"]
    assert len({item["custom_id"] for item in records(output.read_bytes())}) == 12
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()
    assert "Every question has its answer" in run(server, questions, output).output


def test_a_run_that_was_cut_off_takes_up_its_batch(
    server: httpx.Client, questions: Path, tmp_path: Path, chat: ChatOperation
) -> None:
    output, note = tmp_path / "out.jsonl", tmp_path / "out.jsonl.batch.json"
    run(server, questions, output)
    batch = server.get("/v1/batches").json()["data"][0]["id"]
    output.unlink()
    note.write_text(json.dumps({"batch": batch, "questions": hashlib.sha256(questions.read_bytes()).hexdigest()}))
    chat.asked.clear()
    assert run(server, questions, output).exit_code == 0
    assert chat.asked == []
    assert len(records(output.read_bytes())) == 12
    note.write_text(json.dumps({"batch": batch, "questions": "others"}))
    assert "other questions" in run(server, questions, output).output


def test_a_batch_that_the_server_has_forgotten_is_sent_again(
    server: httpx.Client, questions: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256(questions.read_bytes()).hexdigest()
    (tmp_path / "out.jsonl.batch.json").write_text(json.dumps({"batch": "batch_gone", "questions": digest}))
    assert run(server, questions, tmp_path / "out.jsonl").exit_code == 0


def test_a_failed_batch_says_why(server: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a"), line("a")]))
    result = run(server, file, tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert "line 2: The custom_id for this request is a duplicate" in result.output


def test_a_server_that_is_not_there_is_said_in_a_sentence(questions: Path, tmp_path: Path) -> None:
    result = tidegate("run", questions, "-o", tmp_path / "out", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "No server answers at http://127.0.0.1:9" in result.output
    assert "--local" in tidegate("run", questions, "-o", tmp_path / "out", "some-model").output


def output_file(folder: Path, name: str, answers: dict[str, str]) -> Path:
    def record(custom_id: str, text: str) -> dict[str, Any]:
        body = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 3}}
        return {"custom_id": custom_id, "response": {"status_code": 200, "latency_ms": 12.5, "body": body}}

    file = folder / f"{name}.jsonl"
    file.write_bytes(jsonl(record(custom_id, text) for custom_id, text in answers.items()))
    return file


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    data = tmp_path / "data.jsonl"
    data.write_bytes(jsonl({"instruction": f"q{n}", "output": f"the answer is {n}"} for n in (1, 2)))
    base = output_file(tmp_path, "base", {"line-1": "I do not know", "line-2": "<b>2</b>"})
    tuned = output_file(tmp_path, "tuned", {"line-1": "the answer is 1"})
    return data, base, tuned


def test_runs_are_compared_with_the_known_answers(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, base, tuned = runs
    table = tmp_path / "table.jsonl"
    result = tidegate("compare", base, tuned, "--questions", data, "-o", table)
    assert result.exit_code == 0, result.output
    assert "1 of 2" in result.output
    first, second = records(table.read_bytes())
    assert (first["question"], first["reference"]) == ("q1", "the answer is 1")
    assert (first["tuned.exact"], first["tuned.rouge_l"], first["tuned.bleu_4"]) == (1.0, 1.0, pytest.approx(1.0))
    assert first["base.exact"] == 0.0
    assert first["base.rouge_l"] < 0.5
    assert (first["base.latency_ms"], first["base.completion_tokens"], first["base.characters"]) == (12.5, 3, 13)
    assert second["tuned.answer"] is None


def test_a_table_can_be_csv_or_html(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, base, tuned = runs
    tidegate("compare", base, tuned, "--questions", data, "-o", tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["base.answer"] == "I do not know"
    tidegate("compare", base, tuned, "--questions", data, "-o", tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "<b>2</b>" not in page
    assert tidegate("compare", base, "-o", tmp_path / "t.txt").exit_code == 2
    assert "not the output of a batch" in tidegate("compare", data).output


def test_scores_know_words_in_languages_without_spaces() -> None:
    same, near, far = (score(answer, "巴黎是法国的首都") for answer in ("巴黎是法国的首都", "巴黎是首都", "不知道"))
    assert (same.exact, same.rouge_l) == (1.0, 1.0)
    assert same.rouge_l > near.rouge_l > far.rouge_l
    assert near.rouge_l == pytest.approx(2 * 5 / (5 + 8))


def test_rouge_l_is_what_lin_says() -> None:
    """Lin (2004), section 3.1: police killed the gunman / police kill the gunman share 3 of 4 words in order."""
    assert score("police kill the gunman", "police killed the gunman").rouge_l == pytest.approx(0.75)
    assert score("the gunman kill police", "police killed the gunman").rouge_l == pytest.approx(0.5)
    assert score("", "police").rouge_l == 0.0
