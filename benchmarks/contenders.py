"""The servers that are compared, as child processes on free loopback ports.

Both are up at the same time while the load alternates between them, A B B A A B ...: the turns of a pair lie seconds
apart, and whatever else the machine does meets both alike. Starting each anew for its turn would put a minute between
them, and a start's heat into the figures. A server without requests uses next to no CPU, once it has noticed: see
`Contender.wait_until_idle`.

By default vLLM binds an engine's threads to cores, the same ones for every engine; `nobind` lets each use all cores
during its turn.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

PROJECT: Final = Path(__file__).resolve().parents[1]
MODEL_NAME: Final = "bench"
KV_CACHE_VARIABLE: Final = "VLLM_CPU_KVCACHE_SPACE"
KV_CACHE_FLAG: Final = "--kv-cache-memory-bytes"
ENVIRONMENT: Final[Mapping[str, str]] = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    KV_CACHE_VARIABLE: "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
KEY: Final = "tg-benchmark-0123456789abcdef"
# Limits that are counted with each request and never met.
_TENANT: Final = f"""
[tenants.bench]
keys = [{{ sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}" }}]
limits = {{ requests_per_minute = 10_000_000, tokens_per_minute = 1_000_000_000, concurrency = 10_000 }}
"""
FLAGS: Final = ("--enforce-eager", "--max-model-len", "2048")

_READY_TIMEOUT_S: Final = 600.0
_STOP_TIMEOUT_S: Final = 60.0
_LOG_TAIL_CHARS: Final = 3000
# Plain vLLM refuses connections until it is ready, while Tidegate answers and pays for each question.
_READY_POLL_S: Final = 0.1
_LIVE_POLL_S: Final = 0.02
_IDLE_POLL_S: Final = 0.1
_IDLE_CPU_RATIO: Final = 0.1
_IDLE_TIMEOUT_S: Final = 10.0
_CPUCLOCK_SCHED: Final = 2


class ContenderFailed(Exception):
    """A server that did not start; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A server that can be compared. `live_path` is what it answers first."""

    name: str
    live_path: str
    command: Callable[[str, int, Sequence[str]], list[str]]


def _tidegate(model: str, port: int, flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "server", "serve", model, "--port", str(port), *flags]


def _plain(model: str, port: int, flags: Sequence[str]) -> list[str]:
    # What `vllm serve` runs; the console script itself does not work with the vllm-cpu distribution.
    entry = "vllm.entrypoints.launchers.api_server.entry"
    return [sys.executable, "-m", entry, "--model", model, "--host", "127.0.0.1", "--port", str(port), *flags]


TIDEGATE: Final = Kind("tidegate", "/health/live", _tidegate)
PLAIN: Final = Kind("plain", "/health", _plain)


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that was started. `started_s` is on the clock of `time.perf_counter`; a server that asks has a `key`."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    started_s: float
    live_path: str
    ready_path: str = "/health"
    key: str | None = None

    def wait_until_live(self) -> float:
        """Seconds from the start to the first 200 of any kind."""
        return self._wait(self.live_path, _LIVE_POLL_S)

    def wait_until_ready(self) -> float:
        """Seconds from the start to 200 where the server says that it is ready."""
        return self._wait(self.ready_path, _READY_POLL_S)

    def wait_until_idle(self) -> None:
        """Until it leaves the cores alone, or for `_IDLE_TIMEOUT_S`.

        vLLM's worker spins on its queue for a second after its last step (`busy_loop_s` in its shm_broadcast.py).
        """
        deadline_s = time.perf_counter() + _IDLE_TIMEOUT_S
        used_s = self.total_cpu_s()
        while time.perf_counter() < deadline_s:
            time.sleep(_IDLE_POLL_S)
            before_s, used_s = used_s, self.total_cpu_s()
            if used_s - before_s < _IDLE_CPU_RATIO * _IDLE_POLL_S:
                return

    def front_cpu_s(self) -> float:
        """CPU seconds so far of the process that speaks HTTP."""
        return cpu_s(self.process.pid)

    def total_cpu_s(self) -> float:
        """CPU seconds so far of all its processes."""
        return sum(cpu_s(member.pid) for member in self._family())

    def stop(self) -> None:
        """End it as an operator would, then whatever is left of its processes."""
        family = self._family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            front = psutil.Process(self.process.pid)
            return [front, *front.children(recursive=True)]
        return []

    def _wait(self, path: str, poll_s: float) -> float:
        with httpx.Client(base_url=self.url, timeout=_READY_TIMEOUT_S, trust_env=False) as client:
            while not _answers(client, path):
                if self.process.poll() is not None or time.perf_counter() - self.started_s > _READY_TIMEOUT_S:
                    log = self.log_file.read_text(encoding="utf-8", errors="replace")
                    raise ContenderFailed(f"{self.name} did not start:\n{log[-_LOG_TAIL_CHARS:]}")
                time.sleep(poll_s)
        return time.perf_counter() - self.started_s


@contextmanager
def started(kind: Kind, model: str, flags: Sequence[str]) -> Iterator[Contender]:
    """A server of this kind, started but perhaps not ready; ended when the block is left."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        log_file, port = Path(folder) / "log", free_port()
        command = kind.command(model, port, [*FLAGS, "--served-model-name", MODEL_NAME, *flags])
        surroundings = {"TIDEGATE_DATA_FOLDER": str(Path(folder) / "data"), **environment(flags)}
        started_s = time.perf_counter()
        process = spawned(command, log_file, surroundings)
        contender = Contender(kind.name, f"http://127.0.0.1:{port}", process, log_file, started_s, kind.live_path)
        try:
            yield contender
        finally:
            contender.stop()


@contextmanager
def limited_tenant() -> Iterator[list[str]]:
    """The flags with which Tidegate knows a tenant by `KEY`, and counts its requests and tokens."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        tenants = Path(folder) / "tenants.toml"
        tenants.write_text(_TENANT, encoding="utf-8")
        yield ["--tenants-file", str(tenants)]


def spawned(command: Sequence[str], log_file: Path, surroundings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own: Ctrl-C must not end the engines before their servers have been ended."""
    with log_file.open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=dict(surroundings), cwd=PROJECT, start_new_session=True
        )


def environment(flags: Sequence[str] = ()) -> dict[str, str]:
    """This process's environment, without keys and settings of Tidegate, and with `ENVIRONMENT` where it is silent.

    The variable that sizes the KV cache would beat the flag, so it goes where the flag is given.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE_", "VLLM_API_KEY"))}
    left_out = {KV_CACHE_VARIABLE} if KV_CACHE_FLAG in flags else set()
    return {name: value for name, value in {**ENVIRONMENT, **own}.items() if name not in left_out}


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside it, servers that are started have these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shown_settings(model: str, flags: Sequence[str]) -> dict[str, object]:
    """What both contenders were given, for the report."""
    given = environment(flags)
    return {
        "model": Path(model).name,
        "flags": [*FLAGS, *flags],
        "environment": {name: given[name] for name in ENVIRONMENT if name in given},
    }


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def cpu_s(pid: int) -> float:
    """CPU seconds so far of a process, 0 once it has ended.

    From the kernel's clock of that process (`clock_getcpuclockid`); /proc counts in steps of 10 ms.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:  # it has ended
        return 0.0


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
