"""The processes of an engine, on small processes of the test's own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from server.engine.processes import EngineFamily

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where Linux keeps it
# A parent with a child, and a block of shared memory that nobody would free.
_PARENT = """
import subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
from multiprocessing import get_context
block = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(block._name, "shared_memory")
lock = get_context("spawn").Lock()
resource_tracker.unregister(lock._semlock.name, "semaphore")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(block.name, "sem." + lock._semlock.name[1:], flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent() -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """A process with a child, and the name of the shared memory it has mapped."""
    process = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    names = process.stdout.readline().split()
    yield process, names
    process.kill()
    process.wait()
    process.stdout.close()
    for name in names:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def test_a_family_is_a_process_with_its_descendants_and_their_shared_memory(
    parent: tuple["subprocess.Popen[str]", list[str]],
) -> None:
    process, names = parent
    family = EngineFamily.of([process.pid])
    assert {member.pid for member in family.processes} == {
        process.pid, *(child.pid for child in psutil.Process(process.pid).children())
    }  # fmt: skip
    assert len(family.processes) >= 2
    assert family.shared_memory == set(names)


def test_what_a_killed_process_leaves_behind_is_cleaned_up(parent: tuple["subprocess.Popen[str]", list[str]]) -> None:
    process, names = parent
    family = EngineFamily.of([process.pid])
    process.kill()
    process.wait()
    children = family.processes[1:]
    assert all(child.is_running() for child in children)
    assert all((SHARED_MEMORY / name).exists() for name in names)
    family.clean_up()
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not any((SHARED_MEMORY / name).exists() for name in names)
    family.clean_up()  # and twice is no error


def test_a_stopped_member_is_ended_too(parent: tuple["subprocess.Popen[str]", list[str]]) -> None:
    process, _ = parent
    family = EngineFamily.of([process.pid])
    assert family.cpu_s() is not None
    psutil.Process(process.pid).suspend()
    deadline_s = time.monotonic() + 5
    while family.cpu_s() is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    family.kill()
    assert process.wait(5) != 0


def test_memory_that_others_share_is_left_alone(parent: tuple["subprocess.Popen[str]", list[str]]) -> None:
    process, _ = parent
    mine = shared_memory.SharedMemory(create=True, size=4096)
    try:
        family = EngineFamily.of([process.pid])
        family.clean_up()
        assert (SHARED_MEMORY / mine.name).exists()
    finally:
        mine.close()
        mine.unlink()


def test_a_process_that_is_gone_has_no_family() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    time.sleep(0.01)
    assert EngineFamily.of([process.pid]) == EngineFamily((), frozenset())
