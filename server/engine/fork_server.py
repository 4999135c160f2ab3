"""Starts engines from a process that has imported vLLM already, and has done nothing else.

An engine is two processes at least, and one that starts from nothing imports vLLM first, for ten seconds and more; the
second begins when the first has done so. A copy of a process that has, needs none of it: an engine that died is
replaced in a fraction of the time. The engine copies itself in turn for its workers.

Python's own fork server does the work (`multiprocessing.forkserver`). It has no thread that a copy would lack and no
GPU that a copy could not use. The server itself, with its threads, must not be copied.
"""

import importlib.util
import itertools
import multiprocessing
import os
import platform
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Final

from server.engine.processes import end_with_parent

_METHOD: Final = "VLLM_WORKER_MULTIPROC_METHOD"
_PRELOAD: Final = "LD_PRELOAD"
_THREADS: Final = "OMP_NUM_THREADS"
# What libraries read when they are loaded, so that a copy cannot be given another value.
_READ_WHEN_LOADED: Final = (_PRELOAD, "OMP_", "GOMP_", "KMP_", "MKL_")
_BINDING: Final = "VLLM_CPU_OMP_THREADS_BIND"
_UNBOUND: Final = "nobind"


class _EngineProcess(ForkServerProcess):
    """A process with the environment of the one that starts it, not with that of the fork server."""

    worker_method: str

    def start(self) -> None:
        self._environment = {**os.environ, _METHOD: self.worker_method}
        super().start()

    def run(self) -> None:
        end_with_parent()
        threads = os.environ.get(_THREADS)
        os.environ.clear()
        os.environ.update(self._environment)
        if self._environment.get(_THREADS) not in {None, threads}:
            import torch  # it is there already, and read the number when it was loaded

            torch.set_num_threads(int(self._environment[_THREADS]))
        super().run()


class _EngineContext(ForkServerContext):
    """Python's context for a fork server. Its processes start theirs by `worker_method`."""

    def __init__(self, worker_method: str) -> None:
        super().__init__()
        self._worker_method = worker_method

    def Process(self, *args: Any, **kwargs: Any) -> _EngineProcess:  # type: ignore[override]  # noqa: N802
        process = _EngineProcess(*args, **kwargs)
        process.worker_method = self._worker_method
        return process


class ForkServer:
    """The one fork server of this process. It ends with this process and with the engines that came from it."""

    def __init__(self, imports: str = "server.engine.preloaded") -> None:
        self._imports = imports
        self._loaded_with: Mapping[str, str] | None = None

    def start(self) -> None:
        """Begin to import, in the background, what engines need: the sooner the better."""
        with _environment(_PRELOAD, _cpu_libraries()):
            self._start()

    def context(self, worker_method: str) -> ForkServerContext:
        """What engines are started with; the libraries they need are those of the environment of now."""
        if self._loaded_with != _read_when_loaded():
            self.stop()
            self._start()
        return _EngineContext(worker_method)

    def _start(self) -> None:
        multiprocessing.set_forkserver_preload([self._imports])
        forkserver.ensure_running()
        self._loaded_with = _read_when_loaded()

    def stop(self) -> None:
        """End it. Processes that came from it end with it."""
        if self._loaded_with is not None:
            self._loaded_with = None
            running: Any = forkserver._forkserver
            os.kill(running._forkserver_pid, signal.SIGTERM)  # it would wait for its last engine
            running._stop()


@contextmanager
def engines_forked(server: ForkServer | None, *, on_cpu: bool, numa_bind: bool) -> Iterator[None]:
    """Inside it, vLLM starts an engine's processes as copies of the fork server's, or as new ones where that cannot be.

    It cannot where vLLM says so (in a Ray actor, under WSL, with a GPU opened in this process) or the operator does, by
    setting vLLM's own variable for it.
    """
    from vllm.utils import system_utils
    from vllm.v1.engine import utils as engine_utils

    chosen = None if on_cpu else os.environ.get(_METHOD)  # on a CPU vLLM itself has set it
    system_utils._maybe_force_spawn()
    forced = not on_cpu and os.environ.get(_METHOD) != chosen
    if server is None or chosen or forced or numa_bind:
        with _environment(_METHOD, chosen or "spawn"):
            yield
        return
    # The threads of a CPU worker are bound by the environment that it begins with, so it is no copy.
    bound = on_cpu and os.environ.get(_BINDING, "auto") != _UNBOUND
    context = server.context("spawn" if bound else "fork")
    usual = engine_utils.get_mp_context
    engine_utils.get_mp_context = lambda: context
    try:
        with _environment(_METHOD, "spawn"):  # what else is started here
            yield
    finally:
        engine_utils.get_mp_context = usual


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Inside it, a variable has this value; None leaves it alone."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _read_when_loaded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_READ_WHEN_LOADED)}


def _cpu_libraries() -> str | None:
    """`LD_PRELOAD` as vLLM sets it for its CPU engine, once it has been imported and has read its configuration.

    None where there is nothing to set. If vLLM sets it to something else after all, the fork server starts again.
    """
    preloaded = os.environ.get(_PRELOAD, "")
    if not _is_cpu_build() or platform.system() != "Linux":
        return None
    libraries = [preloaded] if preloaded else []
    if not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        libraries += _found("torch", ("../torch.libs", "lib"), ("libgomp*.so*",))
    if "libtcmalloc" not in preloaded:
        libraries = _found("vllm", ("libs",), ("libtcmalloc_minimal*.so*", "libtcmalloc.so*")) + libraries
    return ":".join(libraries) or None


def _is_cpu_build() -> bool:
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec("vllm") is not None  # the CPU build goes by another name


def _found(package: str, folders: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The first file of a package's folders that one of the patterns fits, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    places = [Path(spec.origin).parent / folder for folder in folders]
    files = (file for pattern in patterns for place in places for file in place.glob(pattern))
    return [os.path.normpath(file) for file in itertools.islice(files, 1)]
