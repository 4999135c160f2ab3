"""`tidegate doctor`: what fits and what is wrong, before anything is loaded."""

import json
import re
import sys
from argparse import ArgumentError, Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Column, Table

from server.commands.doctor_checks import Finding, check_all
from server.commands.doctor_model import ModelReport, parse_flags, report_on
from server.commands.machine import Gpu, Machine, this_machine
from server.policy.model_shape import UnknownShape
from server.policy.sizing import GIB
from server.settings import Settings

_SIGNS: Final = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}
_GPUS: Final = re.compile(r"(?P<count>[1-9][0-9]{0,3})x(?P<gib>[1-9][0-9]{0,3}(\.[0-9]+)?)")
_KIB: Final = 1024
_WIDE: Final = 160


def examine(settings: Settings, vllm_args: Sequence[str], other: str | None, *, as_json: bool) -> int:
    """Print the report; the exit code is 1 where something prevents serving. Raises `click.UsageError`.

    `other` describes GPUs that are not here, such as `4x80`: four with 80 GiB each.
    """
    opens_with_model = bool(vllm_args) and not vllm_args[0].startswith("-")
    named = ("--model", settings.model) if settings.model else ()
    first, rest = (vllm_args[:1], vllm_args[1:]) if opens_with_model else ((), vllm_args)
    try:
        model, args = parse_flags((*first, *named, *settings.vllm_flags, *rest))
    except (ArgumentError, ValueError) as error:
        raise click.UsageError(f"{error}.") from error
    machine = this_machine() if other is None else with_gpus(this_machine(), other)
    report, finding = _model(model, args, machine)
    findings = [*check_all(settings, machine, report), *([finding] if finding is not None else [])]
    command = None if report is None else report.command(vllm_args, on_cpu=machine.serves_on_cpu)
    if as_json:
        click.echo(json.dumps({"serve": command, **_as_json(report, machine, findings)}, indent=2))
    else:
        _print(report, machine, findings)
        if command is not None:
            click.echo(f"\nServe it, with your other options:\n  {command}")
    return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def with_gpus(machine: Machine, described: str) -> Machine:
    """The machine with other GPUs in it, as if vLLM's CUDA build were installed. Raises `click.UsageError`."""
    if (found := _GPUS.fullmatch(described)) is None:
        raise click.UsageError(f"--gpus {described}: write the number and the memory in GiB, such as 4x80.")
    memory_bytes = int(float(found["gib"]) * GIB)
    gpus = (Gpu("GPU", memory_bytes, memory_bytes, "not asked"),) * int(found["count"])
    return replace(machine, gpus=gpus, gpu_problem=None, engine="vllm")


def _model(model: str | None, args: Namespace, machine: Machine) -> tuple[ModelReport | None, Finding | None]:
    """The report on the model, or what is wrong with its files."""
    from server.engine.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
    from server.engine.model_files import CONFIG, UnreadableModel, model_folder

    name = model or EMBEDDED_MODEL_NAME
    if name.endswith(".gguf"):
        advice = "vLLM 0.32 has no reader for GGUF files: serve the model's safetensors (see docs/models.md)."
        return None, Finding("problem", "model", f"{name}: {advice}")
    folder = model_folder(model, args.revision) if model is not None else embedded_model_path()
    if model is None and folder is not None and not (folder / CONFIG).is_file():
        return None, Finding("ok", "model", f"{name} is unpacked at the first start (tidegate model fetch does it now)")
    if folder is None or not (folder / CONFIG).is_file():
        return None, Finding("problem", "model", _not_here(name, folder))
    try:
        report = report_on(model or name, folder, args, machine)
    except (UnreadableModel, UnknownShape) as error:
        return None, Finding("problem", "model", str(error))
    if not report.weights_known:
        said = f"{folder} has no weights yet: their size is estimated from config.json"
        return report, Finding("warning", "weights", said)
    return report, None


def _not_here(name: str, folder: Path | None) -> str:
    if folder is not None:
        adapter = (folder / "adapter_config.json").is_file()
        advice = "serve its base model with --lora-modules NAME=FOLDER" if adapter else "give the folder that has one"
        return f"{folder} has no config.json{' and holds an adapter' if adapter else ''}: {advice}."
    return (
        f"{name} is no folder, and not in the cache: download it first (hf download {name}), or at least its "
        "config.json, from which the rest is estimated."
    )


def _print(report: ModelReport | None, machine: Machine, findings: Sequence[Finding]) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)
    if report is not None:
        _print_model(console, report, machine)
    console.print("What was looked at:")
    for finding in findings:
        console.print(f"  {_SIGNS[finding.verdict]:8} {finding.what}: {finding.said}", soft_wrap=True)


def _print_model(console: Console, report: ModelReport, machine: Machine) -> None:
    shape = report.shape
    known = "" if report.weights_known else " (estimated)"
    kind = "MLA" if shape.latent_dim else f"{shape.attention_heads} heads, {shape.kv_heads} KV heads"
    windowed = f", {shape.count('window')} of them see {shape.window} tokens" if shape.count("window") else ""
    console.print(f"{report.name}: {shape.model_type}, {len(shape.layers)} layers{windowed}, {kind}", soft_wrap=True)
    console.print(f"  weights {report.weights_bytes / GIB:.2f} GiB{known}; knows {shape.max_positions:,} tokens")
    if shape.count("state"):
        console.print(
            f"  {shape.count('state')} layers keep a state of fixed size, which is not counted: what fits is less.",
            soft_wrap=True,
        )
    if not machine.serves_on_cpu:
        console.print("  what a GPU keeps for the KV cache is an estimate; `gate open` in the log says it exactly")
    lengths = sorted({length for plan in report.plans for length in plan.by_length})
    fixed = ("ranks", "weights each", "KV cache each", "KV per token", "KV tokens", "longest")
    columns = [Column(title, justify="right") for title in (*fixed, *(f"x {length:,}" for length in lengths))]
    table = Table(*columns, title="What fits (the last columns: requests at a time, by their tokens)")
    for plan in report.plans:
        cells = [
            str(plan.tensor_parallel), f"{plan.weights_bytes / GIB:.2f} GiB", f"{max(0, plan.kv_bytes) / GIB:.2f} GiB",
            f"{plan.kv_token_bytes / _KIB:.1f} KiB", f"{plan.fit.kv_tokens:,}", f"{plan.fit.longest:,}",
        ]  # fmt: skip
        table.add_row(*cells, *(str(plan.by_length.get(length, "")) for length in lengths))
    console.print(table)


def _as_json(report: ModelReport | None, machine: Machine, findings: Sequence[Finding]) -> dict[str, Any]:
    shown = None
    if report is not None:
        shown = {
            "name": report.name,
            "weights_bytes": report.weights_bytes,
            "weights_known": report.weights_known,
            "shape": {**asdict(report.shape), "layers": len(report.shape.layers)},
            "plans": [
                {
                    "tensor_parallel": plan.tensor_parallel,
                    "weights_bytes": plan.weights_bytes,
                    "kv_bytes": plan.kv_bytes,
                    "kv_bytes_per_token": plan.kv_token_bytes,
                    "kv_tokens": plan.fit.kv_tokens,
                    "longest_context": plan.fit.longest,
                    "concurrency": {str(length): count for length, count in plan.by_length.items()},
                }
                for plan in report.plans
            ],
        }
    return {"model": shown, "machine": asdict(machine), "findings": [asdict(finding) for finding in findings]}
