"""The processes of one engine and what they leave behind when they are killed.

A killed process cleans nothing up: its workers may outlive it, and its shared memory stays until this server ends,
because multiprocessing's resource tracker belongs to the server. So both are noted while the engine is well.
"""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psutil
import structlog

log = structlog.get_logger(__name__)

SOCKETS_FOLDER: Final = "VLLM_RPC_BASE_PATH"  # where vLLM puts its engine's sockets
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps it
_EXIT_TIMEOUT_S: Final = 5.0
_EXIT_LOOK_S: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_INODE: Final = 4  # its column in /proc/PID/maps


@dataclass(frozen=True, slots=True)
class EngineFamily:
    """An engine's processes with all their descendants, and the names of the shared memory they share."""

    processes: tuple[psutil.Process, ...]
    shared_memory: frozenset[str]

    @classmethod
    def of(cls, pids: Iterable[int]) -> "EngineFamily":
        """The family of the processes with these ids, as it is now."""
        members: dict[int, psutil.Process] = {}
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                head = psutil.Process(pid)
                members |= {member.pid: member for member in (head, *head.children(recursive=True))}
        return cls(tuple(members.values()), frozenset().union(*(_shared_memory_of(pid) for pid in members)))

    def cpu_s(self) -> float | None:
        """Processor seconds used so far, or None when a member is stopped or gone."""
        used_s = 0.0
        for member in self.processes:
            try:
                if member.status() in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}:
                    return None
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                return None
            used_s += times.user + times.system
        return used_s

    def kill(self) -> None:
        """End every member at once, also one that is stopped."""
        for member in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

    def clean_up(self) -> None:
        """End what is left and free the shared memory. Blocking, a few seconds at most."""
        self.kill()
        deadline_s = time.monotonic() + _EXIT_TIMEOUT_S
        while (left := [member for member in self.processes if _lives(member)]) and time.monotonic() < deadline_s:
            time.sleep(_EXIT_LOOK_S)
        for member in left:
            log.warning("a process of the old engine could not be ended", pid=member.pid)
        for name in self.shared_memory:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)


def _lives(process: psutil.Process) -> bool:
    """Whether it still holds anything. One that waits for its parent to take its exit code does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, however that comes about.

    An engine that outlives its server keeps its GPUs, and the next server finds no memory.
    """
    if sys.platform != "linux":
        return
    parent_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before we had asked
        os._exit(1)


def meeting_place() -> str:
    """The file by which an engine's workers find each other, for vLLM's `get_file_store_init_method`.

    vLLM puts it into the machine's temporary folder, and an engine that is ended at once does not take it away. Beside
    the engine's sockets it goes when the server does.
    """
    folder = os.environ.get(SOCKETS_FOLDER) or tempfile.gettempdir()
    return f"file://{folder}/vllm_dist_{uuid4().hex}"


def pids_of(engine_core: Any) -> list[int]:
    """The ids of the processes that vLLM's engine-core client has started. None of them with Ray, which owns them."""
    resources = engine_core.resources
    started = [*getattr(resources.engine_manager, "processes", ())]
    if resources.coordinator is not None:
        started.append(resources.coordinator.proc)
    return [process.pid for process in started if process.pid is not None]


def _shared_memory_of(pid: int) -> set[str]:
    """The names under `/dev/shm` that a process has mapped.

    By inode: a semaphore is made under another name than it has later, and the map shows the first.
    """
    prefix = f"{_SHARED_MEMORY}/"
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        present = {entry.stat().st_ino: entry.name for entry in _SHARED_MEMORY.iterdir()}
    except OSError:  # it has just ended, or this is no Linux
        return set()
    inodes = {int(line.split()[_INODE]) for line in maps.splitlines() if prefix in line}
    return {present[inode] for inode in inodes if inode in present}
