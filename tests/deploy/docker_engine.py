"""A Docker engine of one's own, and images to stand in for those that cannot be pulled.

The engine keeps everything in one folder and ends with the block: it never meets an engine that the machine has.
"""

import functools
import http.server
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.deploy.compose_file import ROOT

PROGRAMS: Final = ("docker", "dockerd", "containerd", "runc", "iptables", "debootstrap")
PACKAGES: Final = "docker.io iptables runc containerd debootstrap"
BASE: Final = "tidegate-test-base:bookworm"
REDIS: Final = "tidegate-test-redis:bookworm"
_BASE_PACKAGES: Final = "ca-certificates,python3-minimal,python3-pip,python3-venv"
_AUTHORITIES: Final = "etc/ssl/certs/ca-certificates.crt"
_START_TIMEOUT_S: Final = 60.0
_BRIDGE_ADDRESS: Final = "172.17.0.1"
_FIRST_WHEEL_PORT: Final = 18911  # always the same: a build argument that changes makes every layer anew


class Missing(Exception):
    """What this machine lacks; the message says how to get it."""


def look_for_programs() -> None:
    """Raises `Missing`."""
    if os.geteuid() != 0:
        raise Missing("only root can start a Docker engine")
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise Missing(f"{', '.join(absent)} not found; on Debian: apt-get install {PACKAGES}")


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine. `environment` leads `docker` and Compose to it."""

    environment: Mapping[str, str]

    def run(self, *command: str, quiet: bool = False, cwd: Path = ROOT) -> str:
        """Standard output of a command that must succeed. Progress goes to the terminal unless `quiet`."""
        errors = subprocess.DEVNULL if quiet else None
        finished = subprocess.run(
            command, env=dict(self.environment), cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True, check=True
        )
        return finished.stdout

    def has_image(self, name: str) -> bool:
        return bool(self.run("docker", "images", "--quiet", name).strip())

    def image_bytes(self, name: str) -> int:
        return int(self.run("docker", "image", "inspect", "--format", "{{.Size}}", name))


@contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """Start `dockerd` with all it has in a folder, and end it. Raises `Missing` if it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    socket = f"unix://{folder}/docker.sock"
    own = ("--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/docker.pid")
    with (folder / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(["dockerd", *own, "--host", socket], stdout=log, stderr=log)  # noqa: S607
    # The classic builder: whatever it can build, BuildKit can as well.
    engine = Engine({**os.environ, "DOCKER_HOST": socket, "DOCKER_BUILDKIT": "0", "COMPOSE_BAKE": "false"})
    try:
        _wait_until_up(engine, process, folder)
        yield engine
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_up(engine: Engine, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        asked = subprocess.run(["docker", "version"], env=dict(engine.environment), capture_output=True, check=False)  # noqa: S607
        if asked.returncode == 0:
            return
        time.sleep(0.2)
    last_words = (folder / "dockerd.log").read_text(errors="replace")[-1500:]
    raise Missing(f"dockerd does not come up on this machine:\n{last_words}")


def make_base_image(engine: Engine, folder: Path) -> None:
    """A Debian with Python, made from packages: the stand-in for the official Python image."""
    if engine.has_image(BASE):
        return
    root = folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    mirror = "http://deb.debian.org/debian"
    engine.run("debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", "bookworm", str(root), mirror)
    # What this machine trusts, the build trusts: a proxy on the way may have an authority of its own.
    shutil.copyfile(Path("/") / _AUTHORITIES, root / _AUTHORITIES)
    (root / "etc" / "pip.conf").write_text(f"[global]\ncert = /{_AUTHORITIES}\n")
    archive = folder / "base.tar"
    engine.run("tar", "--directory", str(root), "--create", "--file", str(archive), ".")
    engine.run("docker", "import", str(archive), BASE)
    archive.unlink()
    shutil.rmtree(root)


def make_redis_image(engine: Engine, folder: Path) -> None:
    """Debian's Redis: the stand-in for the official Redis image."""
    if engine.has_image(REDIS):
        return
    context = folder / "redis"
    context.mkdir(exist_ok=True)
    install = "apt-get update && apt-get install --yes --no-install-recommends redis-server && mkdir -p /data"
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN {install}\nWORKDIR /data\n")
    engine.run("docker", "build", "--tag", REDIS, str(context))


@contextmanager
def wheels_for_builds(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Serve folders of wheels to builds while the block lasts. Gives the build arguments that point pip there."""
    servers = []
    for port, folder in enumerate(folders, _FIRST_WHEEL_PORT):
        listing = functools.partial(_QuietListing, directory=str(folder))
        server = http.server.ThreadingHTTPServer((_BRIDGE_ADDRESS, port), listing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    links = " ".join(f"http://{_BRIDGE_ADDRESS}:{server.server_address[1]}/" for server in servers)
    arguments = [f"PIP_FIND_LINKS={links}", f"PIP_TRUSTED_HOST={_BRIDGE_ADDRESS}", "PIP_EXTRA_INDEX_URL="]
    try:
        yield arguments if servers else []
    finally:
        for server in servers:
            server.shutdown()


class _QuietListing(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass
