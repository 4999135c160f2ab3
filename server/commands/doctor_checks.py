"""What would keep a server from serving here, and what to do about it."""

import asyncio
import errno
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from server.commands.doctor_model import ModelReport
from server.commands.machine import SHARED_MEMORY, Machine
from server.policy.sizing import GIB
from server.settings import Settings
from server.store.connection import BadRedisUrl
from server.store.home import embedded_problem, reach_problem

Verdict = Literal["ok", "warning", "problem"]

_LEAST_FREE_BYTES: Final = GIB
_LEAST_SHARED_BYTES: Final = GIB
_REDIS_TIMEOUT_S: Final = 3.0
_SHORT_WINDOW: Final = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A problem prevents serving; a warning makes it worse."""

    verdict: Verdict
    what: str
    said: str


def check_all(settings: Settings, machine: Machine, model: ModelReport | None) -> list[Finding]:
    """Every check, in the order in which a start would meet it."""
    findings = [check_port(settings), *check_engine(machine), *check_data_folder(settings.data_path)]
    findings.append(check_redis(settings))
    if model is not None:
        findings += [*check_shared_memory(machine, model), *check_model(model, machine)]
    return findings


def check_port(settings: Settings) -> Finding:
    """Whether the server could listen where it is told to."""
    if settings.uds is not None:
        folder = Path(settings.uds).absolute().parent
        if Path(settings.uds).exists():
            return Finding("problem", "socket", f"{settings.uds} is there already: remove it, or choose another --uds.")
        if not os.access(folder, os.W_OK):
            return Finding("problem", "socket", f"{folder} is not writable: choose another --uds.")
        return Finding("ok", "socket", f"{settings.uds} is free")
    where = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        advice = "stop the program that listens there, or choose another --port"
        if error.errno == errno.EACCES:
            advice = "choose a --port above 1023"
        elif error.errno != errno.EADDRINUSE:
            advice = "choose another --host"
        return Finding("problem", "port", f"{where} cannot be listened on ({error.strerror}): {advice}.")
    return Finding("ok", "port", f"{where} is free")


def check_engine(machine: Machine) -> Iterator[Finding]:
    """Whether there is a vLLM, and whether it suits the machine."""
    if machine.engine is None:
        wanted = "tidegate[gpu]" if machine.gpus else "tidegate[cpu]"
        yield Finding("problem", "engine", f"vLLM is not installed: pip install '{wanted}'.")
        return
    yield Finding("ok", "engine", f"{machine.engine} {machine.engine_version}")
    if machine.serves_on_cpu:
        if machine.gpus:
            yield Finding(
                "warning", "GPU", "A GPU is here, and vLLM's CPU build is installed: pip install 'tidegate[gpu]'."
            )
        return
    if machine.gpu_problem is not None:
        yield Finding("problem", "driver", machine.gpu_problem)
    elif not machine.gpus:
        yield Finding(
            "problem", "GPU",
            "vLLM's CUDA build is installed and there is no NVIDIA GPU: in a container give it the GPU runtime "
            "(docker run --gpus all); on a CPU machine pip install 'tidegate[cpu]'.",
        )  # fmt: skip
    for kind, count in Counter((gpu.name, gpu.memory_bytes, gpu.driver) for gpu in machine.gpus).items():
        name, memory, driver = kind
        yield Finding("ok", "GPU", f"{count} x {name}, {_gib(memory)}, driver {driver}")
    for number, gpu in enumerate(machine.gpus):
        if gpu.memory_bytes and gpu.free_bytes < gpu.memory_bytes // 2:
            yield Finding(
                "warning", "GPU memory",
                f"{_gib(gpu.memory_bytes - gpu.free_bytes)} of GPU {number} ({gpu.name}) are taken by another program: "
                "end it, or lower --gpu-memory-utilization.",
            )  # fmt: skip


def check_data_folder(folder: Path) -> Iterator[Finding]:
    """Whether the server may keep its tenants, files and Redis data, and whether there is room."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(
            "problem", "data folder",
            f"{existing} cannot be written to ({error.strerror}): change its owner, or choose another --data-folder.",
        )  # fmt: skip
        return
    yield Finding("ok", "data folder", f"{folder} is writable")
    if (free := shutil.disk_usage(existing).free) < _LEAST_FREE_BYTES:
        yield Finding(
            "warning", "disk", f"{_gib(free)} are free where {folder} is: batches and Redis stop when the disk is full."
        )


def check_redis(settings: Settings) -> Finding:
    """Whether the Redis that is named answers, or the embedded one could run."""
    if settings.redis_url is None:
        problem = embedded_problem(settings.data_path)
        if problem is not None:
            return Finding("problem", "Redis", f"The embedded Redis would not run: {problem}")
        return Finding("ok", "Redis", "the embedded one can run")
    try:
        problem = asyncio.run(reach_problem(settings.redis_url, _REDIS_TIMEOUT_S))
    except BadRedisUrl as error:
        return Finding("problem", "Redis", str(error))
    if problem is not None:
        return Finding(
            "problem", "Redis",
            f"The Redis of --redis-url does not answer ({problem}): start it, check the address and the password, or "
            "leave --redis-url out to use the embedded one.",
        )  # fmt: skip
    return Finding("ok", "Redis", "answers")


def check_shared_memory(machine: Machine, model: ModelReport) -> Iterator[Finding]:
    """vLLM's ranks talk through shared memory, of which a container has 64 MB unless it is given more."""
    several = any(plan.tensor_parallel > 1 for plan in model.plans)
    shared = machine.shared_memory_bytes
    if several and (shared is None or shared < _LEAST_SHARED_BYTES):
        has = "is missing" if shared is None else f"has {_gib(shared)}"
        yield Finding(
            "warning", "shared memory",
            f"{SHARED_MEMORY} {has}, and several ranks talk through it: start the container with --ipc=host or "
            "--shm-size=8g.",
        )  # fmt: skip


def check_model(model: ModelReport, machine: Machine) -> Iterator[Finding]:
    """Whether the model fits, and its window with it."""
    on_cpu = machine.serves_on_cpu or not machine.gpus
    heads = model.shape.attention_heads
    for plan in model.plans:
        if heads % plan.tensor_parallel:
            yield Finding(
                "problem", "tensor parallel",
                f"{heads} attention heads do not divide by {plan.tensor_parallel}: choose another "
                "--tensor-parallel-size.",
            )  # fmt: skip
    best = model.best
    if best is None:
        yield Finding("problem", "memory", f"The model does not fit: {_needs(model, machine, on_cpu=on_cpu)}")
        return
    taken = (best.weights_bytes + best.kv_bytes) * best.tensor_parallel
    if on_cpu and taken > machine.available_bytes:
        yield Finding(
            "problem", "memory",
            f"Weights and KV cache take {_gib(taken)}, and {_gib(machine.available_bytes)} are available: end other "
            "programs, or lower VLLM_CPU_KVCACHE_SPACE.",
        )  # fmt: skip
    if model.asked_len is not None and best.fit.longest < min(model.asked_len, model.shape.max_positions):
        yield Finding(
            "problem", "window",
            f"--max-model-len {model.asked_len} does not fit: {best.fit.longest} does. {_remedies(on_cpu=on_cpu)}",
        )  # fmt: skip
    elif best.fit.longest < min(_SHORT_WINDOW, model.shape.max_positions):
        yield Finding("warning", "window", f"Only {best.fit.longest} tokens fit. {_remedies(on_cpu=on_cpu)}")


def _needs(model: ModelReport, machine: Machine, *, on_cpu: bool) -> str:
    room = f"{_gib(machine.memory_bytes)} of memory" if on_cpu else f"{len(machine.gpus)} GPU(s)"
    return (
        f"its weights take {_gib(model.weights_bytes)} and nothing is left for the KV cache on {room}. Serve a smaller "
        f"or quantized model. {_remedies(on_cpu=on_cpu)}"
    )


def _remedies(*, on_cpu: bool) -> str:
    if on_cpu:
        return "VLLM_CPU_KVCACHE_SPACE=GIB gives the KV cache more."
    return "More GPUs (--tensor-parallel-size), or --kv-cache-dtype fp8, give more room."


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.0f} MiB"
