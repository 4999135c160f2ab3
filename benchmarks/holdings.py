"""What a server's processes hold: memory, files, threads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.contenders import Contender

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps it


@dataclass(frozen=True, slots=True)
class Holdings:
    """At one moment. `family_anon_mib` is the anonymous memory of all its processes, a page that several share counted
    once; `children` and `shared_memory_files` are numbers of processes and files, the rest is of the process that
    speaks HTTP."""

    rss_mib: int
    family_anon_mib: int
    fds: int
    threads: int
    children: int
    shared_memory_files: int


def holdings(contender: Contender) -> Holdings:
    """Takes some milliseconds for each gigabyte, in which the kernel walks the pages."""
    server = psutil.Process(contender.process.pid)
    children = server.children(recursive=True)
    return Holdings(
        rss_mib=server.memory_info().rss >> 20,
        family_anon_mib=sum(_anon_kib(one.pid) for one in (server, *children)) >> 10,
        fds=server.num_fds(),
        threads=server.num_threads(),
        children=len(children),
        shared_memory_files=len(list(_SHARED_MEMORY.iterdir())),
    )


def _anon_kib(pid: int) -> int:
    """A process's part of the anonymous memory. Pages of files are left out: others on the machine map them too."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")), 0)
