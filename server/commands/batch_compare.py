"""`tidegate batch compare`: what several runs answered to the same questions, side by side."""

import csv
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import jinja2
from rich.console import Console
from rich.table import Table

from server.commands.batch_inputs import Asking, BadRecord, Question, read_questions

if TYPE_CHECKING:  # they take a second to import
    from server.commands.scores import Scores

_FORMATS: Final = (".jsonl", ".csv", ".html")
_TEMPLATE: Final = "compare.html.jinja"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one run. `latency_ms` None: the run did not note it."""

    text: str
    completion_tokens: int
    latency_ms: float | None
    scores: "Scores | None" = None

    def fields(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "answer": self.text,
            "characters": len(self.text),
            "completion_tokens": self.completion_tokens,
            "latency_ms": self.latency_ms,
        }
        return {**shown, **(asdict(self.scores) if self.scores is not None else {})}


@dataclass(frozen=True, slots=True)
class Row:
    """One question and what each run answered; None where a run has no answer."""

    custom_id: str
    question: str
    reference: str | None
    answers: tuple[Answer | None, ...]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--questions", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The file that the runs answered: for the questions, and the known answers of ShareGPT and Alpaca data.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Table to write: .jsonl, .csv or .html.")
def compare(runs: tuple[Path, ...], questions: Path | None, output: Path | None) -> None:
    """Put the answers of RUNS, the output files of `tidegate batch run`, side by side.

    Where a known answer is there, each answer is scored against it: exact match, ROUGE-L and BLEU-4.
    """
    if output is not None and output.suffix not in _FORMATS:
        raise click.UsageError(f"--output must end in {', '.join(_FORMATS)}.")
    try:
        rows = _rows(runs, questions)
    except BadRecord as error:
        raise click.ClickException(str(error)) from error
    names = _names(runs)
    if output is not None:
        _write(output, names, rows)
    _summary(names, rows)


def _rows(runs: Sequence[Path], questions: Path | None) -> list[Row]:
    answers = [_read_run(path) for path in runs]
    asked = {} if questions is None else {item.custom_id: item for item in read_questions(questions, Asking())}
    ids = dict.fromkeys([*asked, *(custom_id for run in answers for custom_id in run)])
    return [_row(custom_id, asked.get(custom_id), [run.get(custom_id) for run in answers]) for custom_id in ids]


def _row(custom_id: str, question: Question | None, answers: Sequence[Answer | None]) -> Row:
    reference = None if question is None else question.reference
    scored = tuple(answer if answer is None or reference is None else _scored(answer, reference) for answer in answers)
    return Row(custom_id, "" if question is None else question.text, reference, scored)


def _scored(answer: Answer, reference: str) -> Answer:
    from server.commands.scores import score

    return Answer(answer.text, answer.completion_tokens, answer.latency_ms, score(answer.text, reference))


def _read_run(path: Path) -> dict[str, Answer]:
    """The answers in an output file, by the name of their question."""
    with path.open(encoding="utf-8") as lines:
        try:
            records = [json.loads(line) for line in lines if line.strip()]
            return {str(record["custom_id"]): _answer(record["response"]) for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecord(f"{path} is not the output of a batch ({error}).") from error


def _answer(response: Mapping[str, Any]) -> Answer:
    body = response["body"]
    usage = body.get("usage") or {}
    tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return Answer(_text(body), int(tokens or 0), response.get("latency_ms"))


def _text(body: Mapping[str, Any]) -> str:
    """The words of a chat completion, a completion or a response."""
    if choices := body.get("choices"):
        choice = choices[0]
        return str(choice["message"].get("content") or "") if "message" in choice else str(choice.get("text") or "")
    parts = [part for item in body.get("output") or () for part in item.get("content") or ()]
    return "".join(str(part.get("text") or "") for part in parts)


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names for the runs, told apart."""
    short = [path.stem for path in runs]
    return short if len(set(short)) == len(short) else [str(path) for path in runs]


def _write(output: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    if output.suffix == ".html":
        output.write_text(_html(names, rows), encoding="utf-8")
        return
    flat = list(_flat(names, rows))
    with output.open("w", encoding="utf-8", newline="") as target:
        if output.suffix == ".jsonl":
            target.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in flat)
            return
        columns = dict.fromkeys(name for row in flat for name in row)
        writer = csv.DictWriter(target, list(columns))
        writer.writeheader()
        writer.writerows(flat)


def _flat(names: Sequence[str], rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """One flat object for each question; the columns of a run begin with its name."""
    for row in rows:
        flat: dict[str, Any] = {"custom_id": row.custom_id, "question": row.question, "reference": row.reference}
        for name, answer in zip(names, row.answers, strict=True):
            for field, value in (answer or Answer("", 0, None)).fields().items():
                flat[f"{name}.{field}"] = None if answer is None else value
        yield flat


def _html(names: Sequence[str], rows: Sequence[Row]) -> str:
    source = files("server.commands").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(names=names, rows=rows, figures=_figures(names, rows))


def _figures(names: Sequence[str], rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for each run: how much it answered, how long that took, and how near it came."""
    lines: list[dict[str, str]] = []
    for position, name in enumerate(names):
        answers = [answer for row in rows if (answer := row.answers[position]) is not None]
        latencies = sorted(answer.latency_ms for answer in answers if answer.latency_ms is not None)
        scores = [answer.scores for answer in answers if answer.scores is not None]
        lines.append(
            {
                "run": name,
                "answered": f"{len(answers)} of {len(rows)}",
                "mean tokens": _mean([answer.completion_tokens for answer in answers], "{:.1f}"),
                "median latency": f"{statistics.median(latencies):.0f} ms" if latencies else "",
                "exact": _mean([score.exact for score in scores], "{:.1%}"),
                "ROUGE-L": _mean([score.rouge_l for score in scores], "{:.3f}"),
                "BLEU-4": _mean([score.bleu_4 for score in scores], "{:.3f}"),
            }
        )
    return lines


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.fmean(values)) if values else ""


def _summary(names: Sequence[str], rows: Sequence[Row]) -> None:
    figures = _figures(names, rows)
    columns = [column for column in figures[0] if any(line[column] for line in figures)]
    table = Table(*columns)
    for line in figures:
        table.add_row(*(line[column] for column in columns))
    Console().print(table)
