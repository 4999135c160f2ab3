"""`tidegate batch`: run a file of questions, and compare what several runs answered."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.commands.batch_client import BatchClient
from server.commands.batch_compare import compare
from server.commands.batch_inputs import CHAT_ENDPOINT, Asking, BadRecord, read_questions
from server.commands.local_server import local_server

_DEFAULT_URL: Final = "http://127.0.0.1:8000"
_LOOK_INTERVAL_S: Final = 1.0
_ERRORS_SHOWN: Final = 10
_GOING_ON: Final = frozenset({"validating", "in_progress", "finalizing", "cancelling"})


@click.group()
def batch() -> None:
    """Run many prompts at once, and compare the answers."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run: where its answers go, and what is noted next to them while it goes on."""

    questions: Path
    output: Path

    @property
    def errors(self) -> Path:
        return self.output.with_name(f"{self.output.name}.errors.jsonl")

    @property
    def note(self) -> Path:
        return self.output.with_name(f"{self.output.name}.batch.json")


@batch.command(context_settings={"ignore_unknown_options": True})
@click.argument("questions", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File for the answers.")
@click.option("--url", default=_DEFAULT_URL, show_default=True, help="Address of the server.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Key for the server.")
@click.option("--local", is_flag=True, help="Start a server for this run, and stop it afterwards.")
@click.option("--model", help="Model or adapter to ask, instead of the ones that the questions name.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, for questions that name none.")
@click.option("--temperature", type=click.FloatRange(0), help="Temperature, for questions that name none.")
@click.option("--system", help="System message, for data that has none.")
def run(**given: Any) -> None:
    """Answer the QUESTIONS of a file: OpenAI batch lines, ShareGPT or Alpaca, as JSONL or JSON.

    Run it again after it was cut off, and it goes on. With --local, MODEL and any flag of vLLM may follow.
    """
    job = Job(given["questions"], given["output"])
    if given["vllm_args"] and not given["local"]:
        raise click.UsageError(f"`{given['vllm_args'][0]}` is for a server of its own: add --local.")
    asking = Asking(given["model"], given["max_tokens"], given["temperature"], given["system"])
    with _client(given) as client:
        try:
            _run(job, asking, client)
        except BadRecord as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            said = "Stopped. What is answered is kept; run the same command again to go on."
            raise click.ClickException(said) from None


batch.add_command(compare)


@contextmanager
def _client(given: Mapping[str, Any]) -> Iterator[BatchClient]:
    if not given["local"]:
        with closing(BatchClient(given["url"], given["api_key"])) as client:
            yield client
        return
    with ExitStack() as running:
        with Console(stderr=True).status("Starting a server …"):
            socket = running.enter_context(local_server(given["vllm_args"], given["output"]))
        yield running.enter_context(closing(BatchClient("http://local", None, socket)))


def _run(job: Job, asking: Asking, client: BatchClient) -> None:
    """Take up the batch that an earlier run left, or send what has no answer yet."""
    found = _noted(job, client)
    if found is None:
        with NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as sent:
            endpoint = _write_unanswered(job, asking, client, sent)
            if endpoint is None:
                click.echo("Every question has its answer.", err=True)
                return
            found = client.create(client.upload(Path(sent.name)), endpoint)
        job.note.write_text(json.dumps({"batch": found["id"], "questions": _digest(job.questions)}), encoding="utf-8")
    ended = _watched(found, client)
    _fetch(ended, job, client)
    job.note.unlink()
    _say_how_it_went(ended, job)


def _noted(job: Job, client: BatchClient) -> dict[str, Any] | None:
    """The batch of an earlier run on the same questions, if the server still knows it."""
    if not job.note.exists():
        return None
    note = json.loads(job.note.read_text(encoding="utf-8"))
    if note.get("questions") != _digest(job.questions):
        raise click.ClickException(
            f"{job.note} belongs to a run on other questions. Remove it to begin anew, or choose another --output."
        )
    return client.batch(note["batch"])


def _write_unanswered(job: Job, asking: Asking, client: BatchClient, target: IO[str]) -> str | None:
    """Write the questions that have no answer yet as batch lines. Returns their endpoint, None where there are none."""
    answered, endpoint, model = _answered(job.output), None, asking.model
    for question in read_questions(job.questions, asking):
        if question.custom_id in answered:
            continue
        request = question.request
        if "model" not in request["body"]:
            model = model or client.model()
            request = {**request, "body": {**request["body"], "model": model}}
        endpoint = endpoint or str(request.get("url", CHAT_ENDPOINT))
        target.write(json.dumps(request, ensure_ascii=False) + "\n")
    target.flush()
    return endpoint


def _answered(output: Path) -> set[str]:
    if not output.exists():
        return set()
    with output.open("rb") as lines:
        return {str(json.loads(line)["custom_id"]) for line in lines if line.strip()}


def _watched(batch: dict[str, Any], client: BatchClient) -> dict[str, Any]:
    """Show the batch's progress until it has ended."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    started_s, tokens_before = time.monotonic(), _tokens(batch)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(batch["status"], total=None, speed="")
        while True:
            counts = batch["request_counts"]
            tokens_per_s = (_tokens(batch) - tokens_before) / max(time.monotonic() - started_s, 1e-6)
            progress.update(
                bar,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                speed=f"{tokens_per_s:.0f} tokens/s",
            )
            if batch["status"] not in _GOING_ON:
                return batch
            time.sleep(_LOOK_INTERVAL_S)
            if (now := client.batch(batch["id"])) is None:
                raise click.ClickException("The server does not know this batch any more. Run the command again.")
            batch = now


def _tokens(batch: Mapping[str, Any]) -> int:
    usage = batch.get("usage") or {}
    return int(usage.get("output_tokens") or 0)


def _fetch(batch: Mapping[str, Any], job: Job, client: BatchClient) -> None:
    """Add the answers to the output, in the order of the questions; the errors are those of this batch."""
    answered = _answered(job.output)
    places = {question.custom_id: i for i, question in enumerate(read_questions(job.questions, Asking()))}
    lines = [(json.loads(line)["custom_id"], line) for line in client.lines(batch["output_file_id"])]
    lines.sort(key=lambda named: places.get(named[0], len(places)))
    part = job.output.with_name(f"{job.output.name}.part")
    if job.output.exists():
        shutil.copyfile(job.output, part)
    with part.open("ab") as target:
        target.writelines(line + b"\n" for name, line in lines if name not in answered)
    part.rename(job.output)
    errors = [line + b"\n" for line in client.lines(batch["error_file_id"])]
    job.errors.unlink(missing_ok=True)
    if errors:
        job.errors.write_bytes(b"".join(errors))


def _say_how_it_went(batch: Mapping[str, Any], job: Job) -> None:
    counts: Mapping[str, int] = batch["request_counts"]
    click.echo(f"{batch['status']}: {counts['completed']} answered, {counts['failed']} not → {job.output}", err=True)
    if job.errors.exists():
        click.echo(f"Why not: {job.errors}", err=True)
    errors: Sequence[Mapping[str, Any]] = (batch.get("errors") or {}).get("data") or ()
    for error in errors[:_ERRORS_SHOWN]:
        where = f"line {error['line']}: " if error.get("line") else ""
        click.echo(f"  {where}{error['message']}", err=True)
    if batch["status"] != "completed":
        raise SystemExit(1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
