"""`python -m tests.deploy.containers`: builds the CPU image, brings the stack up with Compose, and breaks things.

Needs root, Debian's Docker engine and Compose. What it lacks it says loudly, and exits 0 unless `--must-run` is given.
The engine, its images and its layers stay in the work folder, so a second run is faster.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import httpx
from platformdirs import user_cache_path

from tests.deploy.compose_file import COMPOSE_FILE
from tests.deploy.docker_engine import (
    BASE,
    REDIS,
    Engine,
    Missing,
    look_for_programs,
    make_base_image,
    make_redis_image,
    running_engine,
    wheels_for_builds,
)

IMAGE: Final = "tidegate-test:cpu"
KEY: Final = "key-of-the-container-test"
MAX_BUILD_S: Final = 600
MAX_IMAGE_BYTES: Final = 3_500_000_000
MAX_FIRST_CHAT_S: Final = 120
_REDIS_NOTICED_S: Final = 15.0


@dataclass(slots=True)
class Stack:
    """The Compose project under test. `compose` is the program, `port` the server's on loopback."""

    engine: Engine
    compose: list[str]
    port: int
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def do(self, *args: str) -> str:
        return self.engine.run(*self.compose, "--file", str(COMPOSE_FILE), *args)

    def container(self, service: str) -> str:
        return self.do("ps", "--all", "--quiet", service).strip()

    def state(self, service: str) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.engine.run("docker", "inspect", self.container(service)))[0]
        return described

    def limits_mode(self) -> str:
        return str(httpx.get(f"{self.url}/health/ready", timeout=5).json().get("limits"))

    def chat(self, **body: Any) -> httpx.Response:
        message = {"role": "user", "content": "What is the capital of France?"}
        asked = {"messages": [message], "temperature": 0, "max_tokens": 12, **body}
        return httpx.post(f"{self.url}/v1/chat/completions", json=asked, headers=auth(), timeout=120)


def auth() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=user_cache_path("tidegate-containers"))
@click.option("--compose", default="docker compose", show_default=True, help="The Compose program.")
@click.option("--wheels", type=click.Path(path_type=Path), multiple=True, help="Folder of wheels for the build.")
@click.option("--port", default=18000, show_default=True)
@click.option("--build-only", is_flag=True, help="Make the images and stop.")
@click.option("--must-run", is_flag=True, help="Fail where it would skip.")
def main(work: Path, compose: str, wheels: tuple[Path, ...], port: int, build_only: bool, must_run: bool) -> None:
    """Build, start, chat, lose Redis, stop."""
    try:
        look_for_programs()
        with running_engine(work / "engine") as engine:
            figures = build(engine, work, wheels)
            if not build_only:
                figures |= run(Stack(engine, compose.split(), port), work)
    except Missing as missing:
        print(f"\n{'!' * 100}\nSKIPPED: the containers were NOT tested. {missing}\n{'!' * 100}\n", file=sys.stderr)
        sys.exit(1 if must_run else 0)
    for name, value in figures.items():
        print(f"{name:<44}{value:>10.1f}")
    print("containers: all that was tried has passed")


def build(engine: Engine, work: Path, wheels: tuple[Path, ...]) -> dict[str, float]:
    """Make the images. The figures by name; a layer that is there already makes the build faster."""
    make_base_image(engine, work)
    make_redis_image(engine, work)
    with wheels_for_builds(wheels) as arguments:
        started_s = time.monotonic()
        build_arguments = [f"--build-arg={argument}" for argument in (f"BASE_IMAGE={BASE}", *arguments)]
        engine.run("docker", "build", "--target", "cpu", "--tag", IMAGE, *build_arguments, ".")
        took_s = time.monotonic() - started_s
    size_bytes = engine.image_bytes(IMAGE)
    check(took_s <= MAX_BUILD_S, f"the build took {took_s:.0f} s")
    check(size_bytes <= MAX_IMAGE_BYTES, f"the image has {size_bytes} bytes")
    return {"image build, s": took_s, "image size, MB": size_bytes / 1e6}


def run(stack: Stack, work: Path) -> dict[str, float]:
    """Start the stack and break it; the figures by name."""
    with stack_up(stack, work):
        a_chat_is_answered_and_needs_the_key(stack)
        it_runs_as_a_user_that_is_not_root(stack)
        it_goes_on_without_redis(stack)
        a_stop_lets_the_running_answer_finish(stack)
    first_chat_s = stack.figures["compose up to first chat, s"]
    check(first_chat_s <= MAX_FIRST_CHAT_S, f"the first chat took {first_chat_s:.0f} s")
    return stack.figures


@contextmanager
def stack_up(stack: Stack, work: Path) -> Iterator[None]:
    """`compose up --wait`, and in the end everything away, volumes as well."""
    secrets = work / "secrets"
    secrets.mkdir(exist_ok=True)
    (secrets / "tidegate_api_key").write_text(KEY)
    environment = {
        "COMPOSE_PROJECT_NAME": "tidegate-test",
        "COMPOSE_PROFILES": "cpu",
        "TIDEGATE_CPU_IMAGE": IMAGE,
        "REDIS_IMAGE": REDIS,
        "TIDEGATE_PORT": str(stack.port),
        "TIDEGATE_SECRETS_FOLDER": str(secrets),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    stack.engine = Engine({**stack.engine.environment, **environment})
    try:
        started_s = time.monotonic()
        stack.do("up", "--no-build", "--wait", "--wait-timeout", "300")
        check(stack.chat().status_code == 200, "`up --wait` returned before a chat worked")
        stack.figures["compose up to first chat, s"] = time.monotonic() - started_s
        yield
    finally:
        print(stack.do("logs", "--no-color", "--tail", "15", "server-cpu"), file=sys.stderr)
        stack.do("down", "--volumes", "--timeout", "30")


def a_chat_is_answered_and_needs_the_key(stack: Stack) -> None:
    """The key comes from a file in the secrets folder."""
    answer = stack.chat().json()["choices"][0]["message"]["content"]
    check(bool(answer.strip()), "the answer is empty")
    keyless = httpx.get(f"{stack.url}/v1/models", timeout=10)
    check(keyless.status_code == 401, f"without a key: {keyless.status_code}")
    check(stack.limits_mode() == "redis", "the limits are not in Redis")


def it_runs_as_a_user_that_is_not_root(stack: Stack) -> None:
    """And its files are its own, so that `tidegate keys` in the container finds the operator's key."""
    check(stack.do("exec", "-T", "server-cpu", "id", "-u").strip() == "10001", "it runs as another user")
    listed = stack.do("exec", "-T", "server-cpu", "tidegate", "level", "get")
    check("0" in listed, f"`tidegate level get` in the container says {listed!r}")


def it_goes_on_without_redis(stack: Stack) -> None:
    """Redis stops answering (paused), then its network is gone; both times it comes back."""
    redis = stack.container("redis")
    network = "tidegate-test_default"
    for name, away, back in (
        ("paused", ("docker", "pause", redis), ("docker", "unpause", redis)),
        (
            "disconnected",
            ("docker", "network", "disconnect", network, redis),
            ("docker", "network", "connect", "--alias", "redis", network, redis),
        ),
    ):
        stack.engine.run(*away, quiet=True)
        answer = stack.chat()
        check(answer.status_code == 200, f"with Redis {name}: {answer.status_code} {answer.text}")
        stack.figures[f"Redis {name}: noticed after, s"] = seconds_until(stack, "local")
        stack.engine.run(*back, quiet=True)
        stack.figures[f"Redis {name}: used again after, s"] = seconds_until(stack, "redis")


def seconds_until(stack: Stack, mode: str) -> float:
    """How long it takes until the limits are kept there, with chats going on."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < _REDIS_NOTICED_S:
        stack.chat(max_tokens=1)
        if stack.limits_mode() == mode:
            return time.monotonic() - started_s
        time.sleep(0.1)
    raise AssertionError(f"the limits are not {mode} after {_REDIS_NOTICED_S} s")


def a_stop_lets_the_running_answer_finish(stack: Stack) -> None:
    """`compose stop` sends SIGTERM: the stream ends whole, and the server exits 0."""
    with ThreadPoolExecutor(1) as clients:
        streaming = clients.submit(stream_to_the_end, stack)
        time.sleep(1.5)
        started_s = time.monotonic()
        stack.do("stop", "server-cpu")
        stack.figures["graceful stop with a running stream, s"] = time.monotonic() - started_s
        frames = streaming.result(60)
    check(frames[-1] == "data: [DONE]", f"the stream ended with {frames[-1]!r}")
    check(json.loads(frames[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length", "it was cut short")
    state = stack.state("server-cpu")["State"]
    check((state["ExitCode"], state["OOMKilled"]) == (0, False), f"it exited with {state}")


def stream_to_the_end(stack: Stack) -> list[str]:
    """The frames of a stream of some seconds."""
    asked = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 100, "ignore_eos": True}
    body = {**asked, "stream": True}
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, headers=auth(), timeout=120) as answer:
        return [line for line in answer.iter_lines() if line.startswith("data: ")]


def check(holds: bool, otherwise: str) -> None:
    """An assertion that Python's -O does not take away."""
    if not holds:
        raise AssertionError(otherwise)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    os.umask(0o022)  # the user in the container reads the secrets
    main()
