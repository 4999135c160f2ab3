"""Ends what a process has started, so that nothing of it is left."""

import contextlib
import os
import shutil
import sys
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Final, Never

import psutil

_CHILD_EXIT_TIMEOUT_S: Final = 5.0


def leave_behind_the_loading(scratch: Path, code: int) -> Never:
    """End now: the thread that loads cannot be interrupted, and Python would wait for it.

    Until the last moment it may write files and start processes, so both are cleared away here once more.
    """
    for folder in (scratch, Path(get_temp_dir())):
        shutil.rmtree(folder, ignore_errors=True)
    end_children(spared=None)
    sys.stderr.flush()
    os._exit(code)


def end_children(spared: int | None) -> None:
    """End every process that this one started, and theirs, except the one that its owner ends after the last settle.

    Python's resource tracker is left: it cleans up shared memory, and ends by itself with this process.
    """
    family = psutil.Process().children(recursive=True)
    children = [child for child in family if child.pid != spared and not _is_resource_tracker(child)]
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=_CHILD_EXIT_TIMEOUT_S)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _is_resource_tracker(child: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in child.cmdline())
    except psutil.NoSuchProcess:
        return False
