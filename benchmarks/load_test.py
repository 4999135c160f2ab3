"""A load test of any server that speaks OpenAI's chat API, and of two in turn.

The load generator is vLLM's own (`vllm bench serve`), called as a library; profiles, comparison and report are ours.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import httpx

from benchmarks.comparison import Comparison, Metric, Row, machine, say
from benchmarks.load import percentile
from benchmarks.load_profiles import PROFILES, Profile
from benchmarks.load_report import write_report

_CHAT_PATH: Final = "/v1/chat/completions"
_PERCENTILES: Final = (50, 95, 99)
_METRICS: Final = (
    Metric("tokens_per_s", "tokens/s", "higher"),
    Metric("requests_per_s", "requests/s", "higher"),
    Metric("ttft_p50_ms", "TTFT p50, ms", "lower"),
    Metric("ttft_p99_ms", "TTFT p99, ms", "lower"),
    Metric("itl_p50_ms", "ITL p50, ms", "lower"),
    Metric("itl_p99_ms", "ITL p99, ms", "lower"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test. `model` None: the first that it lists."""

    url: str
    key: str | None = None
    model: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def with_model(self) -> "Target":
        """Raises `click.ClickException` where the server does not say which models it has."""
        if self.model is not None:
            return self
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=30)
            answer.raise_for_status()
            return dataclasses.replace(self, model=answer.json()["data"][0]["id"])
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise click.ClickException(
                f"{self.url} does not list its models ({error}). Name one with --model."
            ) from error


def turn(target: Target, profile: Profile, seed: int, *, ignore_eos: bool) -> dict[str, Any]:
    """One profile against one server: vLLM's figures of every request, and what they come to."""
    # Seconds of imports, which `--help` need not wait for.
    from vllm.benchmarks.datasets.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(prompt="", prompt_len=0, expected_output_len=profile.answer_tokens, chat_messages=chat)
        for chat in profile.chats(seed)
    ]
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        measured = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=target.url + _CHAT_PATH,
                base_url=target.url,
                model_id=str(target.model),
                model_name=str(target.model),
                tokenizer=None,
                input_requests=requests,
                logprobs=None,
                request_rate=profile.rate_per_s,
                burstiness=profile.burstiness,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[],
                ignore_eos=ignore_eos,
                goodput_config_dict={},
                max_concurrency=profile.concurrency,
                lora_modules=None,
                extra_headers=target.headers,
                extra_body={"temperature": 0},
                ready_check_timeout_sec=0,
            )
        )
    cpu_ratio = (time.process_time() - cpu_s) / (time.perf_counter() - wall_s)
    return _figures(measured) | {"generator_cpu_ratio": cpu_ratio, "samples": _samples(measured)}


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    samples = _samples(measured)
    return {
        "answered": measured["completed"],
        "errors": dict(Counter(error.strip().splitlines()[-1] for error in measured["errors"] if error)),
        "tokens_per_s": measured["output_throughput"],
        "requests_per_s": measured["request_throughput"],
        "duration_s": measured["duration"],
        **{
            f"{name}_p{percent}_ms": percentile(values, percent) if values else 0.0
            for name, values in samples.items()
            for percent in _PERCENTILES
        },
    }


def _samples(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds, of the requests that were answered."""
    good = [number for number, error in enumerate(measured["errors"]) if not error]
    return {
        "ttft": [1000 * measured["ttfts"][number] for number in good],
        "itl": [1000 * gap_s for number in good for gap_s in measured["itls"][number]],
        "total": [1000 * measured["latencies"][number] for number in good],
    }


def compared(turns: Sequence[tuple[dict[str, Any], dict[str, Any]]], urls: tuple[str, str], profile: str) -> Comparison:
    """Ratios over pairs of turns. Raises `click.ClickException` where a turn had no answer."""
    if not all(figures["answered"] for pair in turns for figures in pair):
        raise click.ClickException("One of the servers answered nothing in a turn; there is no ratio.")
    rows = [
        Row(profile, metric, [first[metric.key] for first, _ in turns], [second[metric.key] for _, second in turns])
        for metric in _METRICS
        if all(figures[metric.key] for pair in turns for figures in pair)
    ]
    return Comparison(urls, {"profile": profile, "pairs": len(turns)}, rows)


def _show(url: str, figures: dict[str, Any]) -> None:
    lost = sum(figures["errors"].values())
    say(
        f"{url}: {figures['answered']} answered, {lost} not; {figures['tokens_per_s']:.1f} tokens/s, first token p50 "
        f"{figures['ttft_p50_ms']:.0f} ms, p99 {figures['ttft_p99_ms']:.0f} ms; the load tool took "
        f"{figures['generator_cpu_ratio']:.0%} of a core"
    )
    for error, count in figures["errors"].items():
        say(f"  {count} times: {error}")


def _overridden(profile: Profile, given: dict[str, Any]) -> Profile:
    return dataclasses.replace(profile, **{name: value for name, value in given.items() if value is not None})


@click.command("load")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--compare", help="A second server, asked in turn with the first.")
@click.option("--profile", "name", type=click.Choice(list(PROFILES)), default="chat", show_default=True)
@click.option("--key", envvar="OPENAI_API_KEY", help="API key, of both servers. [env: OPENAI_API_KEY]")
@click.option("--model", help="[default: the first that a server lists]")
@click.option("--requests", type=click.IntRange(1), help="How many in a turn.")
@click.option("--concurrency", type=click.IntRange(1), help="How many at a time.")
@click.option("--rate", "rate_per_s", type=click.FloatRange(0, min_open=True), help="Arrivals per second.")
@click.option("--answer-tokens", type=click.IntRange(1), help="Length of an answer.")
@click.option("--turns", "pairs", type=click.IntRange(1), default=None, help="How often. [1; 5 with --compare]")
@click.option("--may-end/--full-length", default=False, help="Whether an answer may end by itself.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report with plots.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object as the last line.")
def command(
    url: str, compare: str | None, name: str, key: str | None, model: str | None, pairs: int | None, *, may_end: bool,
    html: Path | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Load-test the server at URL, or two servers in turn. Nothing is started: the servers run already."""
    profile = _overridden(PROFILES[name], given)
    targets = [Target(one.rstrip("/").removesuffix("/v1"), key, model).with_model() for one in (url, compare) if one]
    turns: list[dict[str, dict[str, Any]]] = []
    for number in range(pairs or (5 if compare else 1)):
        figures: dict[str, dict[str, Any]] = {}
        for target in targets if number % 2 == 0 else reversed(targets):
            figures[target.url] = turn(target, profile, number, ignore_eos=not may_end)
            _show(target.url, figures[target.url])
        turns.append(figures)
    said: dict[str, Any] = {"benchmark": "load", "profile": name, **dataclasses.asdict(profile), "machine": machine()}
    if profile.rate_per_s == math.inf:
        said["rate_per_s"] = None
    if len(targets) == 2:
        first, second = (target.url for target in targets)
        comparison = compared([(both[first], both[second]) for both in turns], (first, second), name)
        comparison.print()
        said["comparison"] = comparison.as_dict()["rows"]
    if html is not None:
        html.write_text(write_report(said, turns), encoding="utf-8")
    said["turns"] = [
        {one: {key: value for key, value in figures.items() if key != "samples"} for one, figures in both.items()}
        for both in turns
    ]
    if as_json:
        click.echo(json.dumps(said))
