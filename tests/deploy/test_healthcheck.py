"""The container's health check against real sockets."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.compose_file import DOCKER


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on loopback that answers `/health/ready` with a status, and anything else with 404. Gives its port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"the stage of loading")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def check(**environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-I", "-S", str(DOCKER / "healthcheck.py")]
    given = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1)])
def test_only_a_ready_server_is_healthy_and_docker_is_told_the_stage(status: int, code: int) -> None:
    with answering(status) as port:
        checked = check(TIDEGATE_PORT=str(port))
    assert checked.returncode == code
    assert "the stage of loading" in checked.stdout


def test_a_server_that_does_not_listen_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    checked = check(TIDEGATE_PORT=str(port))
    assert checked.returncode == 1
    assert "No answer" in checked.stdout
    assert checked.stderr == ""


def test_a_server_on_a_socket_that_is_not_there_is_not_healthy(tmp_path: Path) -> None:
    assert check(TIDEGATE_UDS=str(tmp_path / "none.sock")).returncode == 1
