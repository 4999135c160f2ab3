"""`python -m tests.deploy.rolling_restart`: two replicas behind nginx restart in turn, under load. Who loses what?

Runs on a tiny random model, with `deploy/nginx/tidegate.conf` and one Redis for both. Needs `nginx` and `redis-server`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
import httpx

from tests.deploy.compose_file import ROOT
from tests.live.running_server import RunningServer, start_server

PROGRAMS: Final = ("nginx", "redis-server")
CONFIGURATION: Final = ROOT / "deploy" / "nginx" / "tidegate.conf"
DOOR: Final = 18000
PORTS: Final = (18001, 18002)
REDIS_PORT: Final = 18003
CLIENTS: Final = 4
TOKENS: Final = 24


@dataclass(slots=True)
class Tally:
    """What the clients saw. `longest_s`: the longest that one of them waited for its first frame."""

    whole: int = 0
    lost: list[str] = field(default_factory=list)
    longest_s: float = 0.0


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--must-run", is_flag=True, help="Fail where it would skip.")
def main(model: Path, must_run: bool) -> None:
    """Restart two replicas of MODEL in turn while clients stream."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        print(
            f"\n{'!' * 80}\nSKIPPED: no restart was tried. {', '.join(absent)} not found\n{'!' * 80}", file=sys.stderr
        )
        sys.exit(1 if must_run else 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redis(folder), replicas(folder, model) as fleet, nginx(folder):
            tally = asyncio.run(restarted_under_load(fleet, folder, model))
    print(
        f"{tally.whole} answers whole, {len(tally.lost)} lost; longest wait for a first frame {tally.longest_s:.1f} s"
    )
    for words in tally.lost[:10]:
        print(f"lost: {words}")
    sys.exit(1 if tally.lost or not tally.whole else 0)


@contextmanager
def running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def redis(folder: Path) -> Iterator[None]:
    options = ("--port", str(REDIS_PORT), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "")
    with running("redis-server", *options):
        yield


@contextmanager
def nginx(folder: Path) -> Iterator[None]:
    """With the project's configuration, on other ports."""
    text = CONFIGURATION.read_text(encoding="utf-8")
    for given, used in zip((8000, 8001, 8002), (DOOR, *PORTS), strict=True):
        text = text.replace(f"127.0.0.1:{given}", f"127.0.0.1:{used}")
    (folder / "tidegate.conf").write_text(text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; events {{}} "
        f"http {{ access_log off; {temporary} include {folder}/tidegate.conf; }}\n"
    )
    with running("nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")):
        yield


@contextmanager
def replicas(folder: Path, model: Path) -> Iterator[list[RunningServer]]:
    fleet: list[RunningServer] = []
    try:
        for port in PORTS:
            fleet.append(start(folder, model, port))
            fleet[-1].wait_until_ready()
        yield fleet
    finally:
        for server in fleet:
            server.kill()


def start(folder: Path, model: Path, port: int) -> RunningServer:
    own = Path(tempfile.mkdtemp(dir=folder, prefix=f"{port}-"))
    url = f"redis://127.0.0.1:{REDIS_PORT}/0"
    return start_server(own, str(model), "--max-model-len", "2048", "--port", str(port), "--redis-url", url)


async def restarted_under_load(fleet: list[RunningServer], folder: Path, model: Path) -> Tally:
    """Each replica is stopped, waited for, started again, and ready, before it is the other's turn."""
    tally, over = Tally(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number, tally, over))
        await asyncio.sleep(3)
        for place, port in enumerate(PORTS):
            before, code = tally.whole, await asyncio.to_thread(fleet[place].stop)
            fleet[place] = await asyncio.to_thread(start, folder, model, port)
            await asyncio.to_thread(fleet[place].wait_until_ready)
            print(f"replica {place + 1} exited {code} and is back; {tally.whole - before} answers meanwhile")
        await asyncio.sleep(3)
        over.set()
    return tally


async def client(number: int, tally: Tally, over: asyncio.Event) -> None:
    """One chat after the other, every one a conversation of its own, without any retry."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{DOOR}", timeout=120) as door:
        chat = 0
        while not over.is_set():
            chat += 1
            await one_chat(door, f"{number}-{chat}", tally)


async def one_chat(door: httpx.AsyncClient, name: str, tally: Tally) -> None:
    message = {"role": "user", "content": f"This is {name}."}
    body = {"messages": [message], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    started_s = time.monotonic()
    frames: list[str] = []
    with contextlib.suppress(httpx.TransportError):
        async with door.stream(
            "POST", "/v1/chat/completions", json=body, headers={"x-openwebui-chat-id": name}
        ) as answer:
            async for line in answer.aiter_lines():
                if not frames:
                    tally.longest_s = max(tally.longest_s, time.monotonic() - started_s)
                frames.append(line)
    said = [line for line in frames if line.startswith("data: ")]
    if len(said) > 2 and said[-1] == "data: [DONE]" and finished(said[-2]):
        tally.whole += 1
    else:
        tally.lost.append(f"{name}: {' '.join(frames)[-300:] or 'no answer'}")


def finished(frame: str) -> bool:
    choices = json.loads(frame.removeprefix("data: ")).get("choices")
    return bool(choices) and choices[0]["finish_reason"] == "length"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
