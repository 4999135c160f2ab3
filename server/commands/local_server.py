"""A server of its own for one command, on a private socket."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import httpx
from platformdirs import user_data_path

_LOOK_INTERVAL_S: Final = 0.25
_STOP_TIMEOUT_S: Final = 60.0
_FOLDER: Final = "local"
_SOCKET: Final = "server.sock"
_LOG: Final = "server.log"
_WORDS_SHOWN: Final = 2000


@contextmanager
def local_server(vllm_args: Sequence[str], purpose: Path) -> Iterator[Path]:
    """The socket of a server that is ready. What it keeps stays for the next one with the same purpose.

    Raises `click.ClickException` where it does not start.
    """
    name = hashlib.sha256(str(purpose.absolute()).encode()).hexdigest()[:12]
    folder = user_data_path("tidegate") / _FOLDER / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = folder / _SOCKET
    socket.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "server", "serve", *vllm_args, "--uds", str(socket), "--data-folder", str(folder),
        "--drain-timeout", "5", "--log-format", "json",
    ]  # fmt: skip
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603  # our own program
    try:
        _wait_until_ready(process, socket, folder / _LOG)
        yield socket
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://local") as client:
        while process.poll() is None:
            try:
                if client.get("/health/ready").is_success:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(_LOOK_INTERVAL_S)
    said = log.read_text(encoding="utf-8", errors="replace")[-_WORDS_SHOWN:]
    raise click.ClickException(f"The local server did not start. It said:\n{said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
