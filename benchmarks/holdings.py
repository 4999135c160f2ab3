"""What a server's processes hold: memory, files, threads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.contenders import Contender

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps it


@dataclass(frozen=True, slots=True)
class Holdings:
    """At one moment. `family_pss_mib` is that of all its processes, a page that several share counted once; `children`
    and `shared_memory_files` are numbers of processes and files, the rest is of the process that speaks HTTP."""

    rss_mib: int
    family_pss_mib: int
    fds: int
    threads: int
    children: int
    shared_memory_files: int


def holdings(contender: Contender) -> Holdings:
    """Takes some milliseconds for each gigabyte, in which the kernel walks the pages."""
    server = psutil.Process(contender.process.pid)
    children = server.children(recursive=True)
    own = server.memory_full_info()
    return Holdings(
        rss_mib=own.rss >> 20,
        family_pss_mib=(own.pss + sum(map(_pss_bytes, children))) >> 20,
        fds=server.num_fds(),
        threads=server.num_threads(),
        children=len(children),
        shared_memory_files=len(list(_SHARED_MEMORY.iterdir())),
    )


def _pss_bytes(process: psutil.Process) -> int:
    try:
        size: int = process.memory_full_info().pss
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return 0
    return size
