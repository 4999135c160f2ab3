"""The process that engines are copied from: what a copy has of its own, and where none is made."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest
from vllm.utils import system_utils
from vllm.v1.engine import utils as engine_utils

from server.engine.fork_server import ForkServer, engines_forked
from tests.engine.forked import tell

pytestmark = pytest.mark.engine

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
BINDING = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """One that imports next to nothing."""
    monkeypatch.delenv(METHOD, raising=False)
    forking = ForkServer("json")
    forking.start()
    yield forking
    forking.stop()


def copied(server: ForkServer, *names: str) -> tuple[psutil.Process, dict[str, str | None], int]:
    """A copy, what it has of these variables, and its parent."""
    context = server.context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(there, *names))
    process.start()
    assert here.poll(30)
    values, parent_pid = here.recv()
    assert process.pid is not None
    return psutil.Process(process.pid), values, parent_pid


def gone(process: psutil.Process) -> bool:
    deadline_s = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def test_a_copy_has_the_environment_of_now_and_is_told_how_to_start_its_own(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET_SINCE", "yes")
    copy, values, _ = copied(server, "SET_SINCE", METHOD)
    assert values == {"SET_SINCE": "yes", METHOD: "fork"}
    copy.kill()


def test_a_copy_ends_with_the_server_it_came_from(server: ForkServer) -> None:
    copy, _, parent_pid = copied(server)
    psutil.Process(parent_pid).kill()
    assert gone(copy)
    again, _, other_pid = copied(server)  # and the next one finds another
    assert other_pid != parent_pid
    again.kill()


def test_what_libraries_read_when_they_are_loaded_takes_another_server(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, parent_pid = copied(server)
    monkeypatch.setenv("KMP_BLOCKTIME", "5")
    second, values, other_pid = copied(server, "KMP_BLOCKTIME")
    assert other_pid != parent_pid
    assert values == {"KMP_BLOCKTIME": "5"}
    assert gone(first)
    second.kill()


@pytest.mark.parametrize(("binding", "workers"), [("nobind", "fork"), ("auto", "spawn"), ("0-1", "spawn")])
def test_workers_whose_threads_are_bound_begin_anew(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch, binding: str, workers: str
) -> None:
    monkeypatch.setenv(BINDING, binding)
    asked = list[str]()
    monkeypatch.setattr(server, "context", asked.append)
    with engines_forked(server, on_cpu=True, numa_bind=False):
        engine_utils.get_mp_context()
    assert asked == [workers]


def test_an_engine_is_a_copy_inside_and_what_vllm_makes_it_outside(server: ForkServer) -> None:
    with engines_forked(server, on_cpu=False, numa_bind=False):
        assert engine_utils.get_mp_context().get_start_method() == "forkserver"
        assert os.environ[METHOD] == "spawn"  # of what is started here, nothing is copied from this process
    assert engine_utils.get_mp_context is system_utils.get_mp_context
    assert METHOD not in os.environ


@pytest.mark.parametrize("reason", ["no server", "numa", "the operator", "vLLM"])
def test_where_no_copy_can_be_made_the_engine_begins_anew(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "the operator":
        monkeypatch.setenv(METHOD, "fork")
    if reason == "vLLM":
        monkeypatch.setenv(METHOD, "")  # put back afterwards
        monkeypatch.delenv(METHOD)
        monkeypatch.setattr(system_utils, "in_wsl", lambda: True)
    with engines_forked(None if reason == "no server" else server, on_cpu=False, numa_bind=reason == "numa"):
        assert engine_utils.get_mp_context is system_utils.get_mp_context
        assert os.environ[METHOD] == ("fork" if reason == "the operator" else "spawn")
