"""A real server as a child process, on a free loopback port."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 300.0
# Small enough to share a machine, large enough for every test; eager, because compiling takes a minute.
TEST_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default would put two engines on the same core
}


@dataclass(slots=True)
class RunningServer:
    """One `tidegate serve` process and where it answers. `temporary` is its folder for what ends with it."""

    process: subprocess.Popen[bytes]
    url: str
    log_file: Path
    temporary: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_events(self) -> list[dict[str, Any]]:
        """The JSON lines of the log."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    @property
    def kv_tokens(self) -> int:
        """What the gate was told of the engine's KV cache."""
        return next(int(event["kv_tokens"]) for event in self.log_events() if event.get("event") == "gate open")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over its labels."""
        page = httpx.get(f"{self.url}/metrics").text
        samples = [line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}")
            if self._status("/health/ready") == 200:
                return
            time.sleep(0.1)
        raise AssertionError(f"the server was not ready after {timeout_s} s:\n{self.log[-4000:]}")

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Until the engine runs nothing and holds no KV blocks for anyone."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.metric("vllm:num_requests_running") == 0 == self.metric("vllm:num_requests_waiting"):
                return
            time.sleep(0.05)
        raise AssertionError(f"the engine was still busy after {timeout_s} s")

    def wait_until_busy(self, timeout_s: float = 10.0) -> None:
        """Until the engine's figures show a running request: they follow its first token, a step later at most."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.metric("vllm:num_requests_running") >= 1:
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine ran nothing for {timeout_s} s")

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it and whatever it started, at once."""
        if self.process.poll() is None:
            family = [*self.children(), psutil.Process(self.process.pid)]
            for member in family:
                member.kill()
            self.process.wait(10)

    def _status(self, path: str) -> int | None:
        try:
            return httpx.get(f"{self.url}{path}", timeout=5).status_code
        except httpx.TransportError:
            return None


def start_server(folder: Path, *args: str, environment: Mapping[str, str] | None = None) -> RunningServer:
    """Start `tidegate serve ARGS` on a port of its choice; returns as soon as it listens."""
    log_file = folder / "server.log"
    temporary = Path(tempfile.mkdtemp(prefix="tidegate-test-"))  # short: sockets lie in it
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)  # a server that is killed clears nothing away
    command = serve_command("--port", "0", "--log-format", "json", "--data-folder", str(folder / "data"), *args)
    own = _environment(environment) | {"TMPDIR": str(temporary)}
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=own)
    server = RunningServer(process, "", log_file, temporary)
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and process.poll() is None:
        listening = [event for event in server.log_events() if event.get("event") == "listening"]
        if listening:
            server.url = str(listening[0]["url"]).removesuffix("/v1")
            return server
        time.sleep(0.02)
    server.kill()
    raise AssertionError(f"the server does not listen:\n{server.log[-4000:]}")


def serve_command(*args: str) -> Sequence[str]:
    return [sys.executable, "-m", "server", "serve", *args]


def run_serve(*args: str, environment: Mapping[str, str] | None = None, timeout_s: float = START_TIMEOUT_S) -> Any:
    """Run a start that is expected to end by itself."""
    with tempfile.TemporaryDirectory() as data_folder:
        return subprocess.run(
            serve_command("--log-format", "json", "--data-folder", data_folder, *args),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=_environment(environment),
            check=False,
        )


def run_doctor(*args: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The report of `tidegate doctor ARGS --json`, under the environment of the tests' servers."""
    with tempfile.TemporaryDirectory() as data_folder:
        command = [
            sys.executable,
            "-m",
            "server",
            "doctor",
            *args,
            "--json",
            "--port",
            "0",
            "--data-folder",
            data_folder,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(environment), check=True)
    return dict(json.loads(done.stdout))


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's, without our own settings; an empty value takes a variable away."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return {name: value for name, value in {**own, **TEST_ENVIRONMENT, **(extra or {})}.items() if value}
