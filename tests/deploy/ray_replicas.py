"""`python -m tests.deploy.ray_replicas MODEL`: the Ray Serve application, with replicas that come, go and are killed.

`deploy/ray/tidegate.yaml` is run as operators run it (`serve run`), with other ports, shorter times and no GPU. Needs
Ray in the Python that runs it, a Redis server, and a few minutes.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

import click
import httpx
import psutil
import yaml

from server.store.redis_server import CannotStart, find_program
from tests.deploy.compose_file import ROOT
from tests.live.running_server import TEST_ENVIRONMENT

CONFIGURATION: Final = ROOT / "deploy" / "ray" / "tidegate.yaml"
OPERATOR: Final = "operator-of-the-ray-test"
DOOR: Final = 18100
REDIS_PORT: Final = 18101
OWN_PORTS: Final = range(18110, 18116)
RPM: Final = 12  # one more each 5 s
SEQUENCES: Final = 2  # of one engine, so that more requests have to wait
START_S: Final = 240.0
BUSY_CLIENTS: Final = 8
AT_A_TIME: Final = 4


class Failed(Exception):
    """What was promised did not happen."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--must-run", is_flag=True, help="Fail where it would skip.")
def main(model: Path, must_run: bool) -> None:
    """Serve MODEL on one replica, then two, then one."""
    if (lack := lacking()) is not None:
        print(f"\n{'!' * 80}\nSKIPPED: Ray was not run. {lack}\n{'!' * 80}", file=sys.stderr)
        sys.exit(1 if must_run else 0)
    with tempfile.TemporaryDirectory(prefix="ray") as name:  # short: Ray puts sockets into it
        folder = Path(name)
        with redis(folder), application(folder, model) as family:
            try:
                asyncio.run(story(family))
            except (Failed, httpx.HTTPError):
                print((folder / "ray.log").read_text(encoding="utf-8", errors="replace")[-8000:], file=sys.stderr)
                raise
        if left := [process for process in family() if process.is_running()]:
            raise Failed(f"still there after the end: {left}")
    print("stopped, and no process is left")


def lacking() -> str | None:
    if importlib.util.find_spec("ray") is None:
        return "It is not installed: pip install --requirement deploy/ray/requirements.txt"
    try:
        find_program()
    except CannotStart as error:
        return str(error)
    return None


@contextmanager
def redis(folder: Path) -> Iterator[None]:
    options = ("--port", str(REDIS_PORT), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "")
    process = subprocess.Popen([str(find_program()), *options], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def configuration(model: Path, data: Path) -> dict[str, Any]:
    """The project's, with what a small machine and a short test need."""
    whole: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    whole["http_options"] |= {"host": "127.0.0.1", "port": DOOR}
    [app] = whole["applications"]
    app["args"]["flags"] = [
        str(model), "--max-model-len", "2048", "--max-num-seqs", str(SEQUENCES), "--enforce-eager",
        "--redis-url", f"redis://127.0.0.1:{REDIS_PORT}/0", "--require-key", "--operator-key", OPERATOR,
        "--port", str(OWN_PORTS[0]), "--host", "127.0.0.1", "--data-folder", str(data), "--log-format", "json",
    ]  # fmt: skip
    app["runtime_env"]["env_vars"] = TEST_ENVIRONMENT
    [deployment] = app["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 1}
    scaling = deployment["autoscaling_config"]
    scaling |= {"max_replicas": 2, "look_back_period_s": 12, "upscale_delay_s": 2, "downscale_delay_s": 15}
    scaling["policy"]["policy_kwargs"] = {"seconds": 0.2}
    return whole


@contextmanager
def application(folder: Path, model: Path) -> Iterator[Callable[[], list[psutil.Process]]]:
    """Run it; yields what tells all processes that it has started."""
    file, log = folder / "tidegate.yaml", folder / "ray.log"
    file.write_text(yaml.safe_dump(configuration(model, folder / "data")), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")} | {
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # without one Ray writes one into the home folder
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_SESSION_ID_HEADER_KEY": "x-openwebui-chat-id",
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    known: dict[int, psutil.Process] = {}

    def family() -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            known.update({one.pid: one for one in psutil.Process(process.pid).children(recursive=True)})
        return list(known.values())

    try:
        yield family
    finally:
        family()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        finally:
            psutil.wait_procs(family(), timeout=30)
            for one in family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


async def story(family: Callable[[], list[psutil.Process]]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{DOOR}", timeout=120) as door:
        begun_s = time.monotonic()
        await until("the first replica serves", START_S, lambda: serving(1))
        print(f"one replica serves after {time.monotonic() - begun_s:.0f} s")
        free = await tenant(door, "free", rpm=100_000)
        await streams(door, free)
        await client_leaves(door, free)
        await one_more_under_load(door, free)
        await limits_hold(door)
        await conversations_stay(door, free)
        await killed_is_replaced(door, free, family)
        await one_fewer_in_quiet(door, free)


async def streams(door: httpx.AsyncClient, key: str) -> None:
    """Frame by frame: most of the answer's time lies between its first frame and its last."""
    async with chat(door, key, tokens=64) as answer:
        check(len(answer.headers.get_list("x-request-id")) == 1, "an answer has one id")
        came_s = [time.monotonic() async for line in answer.aiter_lines() if line.startswith("data: ")]
    spread_s = came_s[-1] - came_s[0]
    distinct = len({round(moment_s, 3) for moment_s in came_s})
    check(len(came_s) > 32 and distinct > 16, f"{len(came_s)} frames came at {distinct} moments")
    print(f"{len(came_s)} frames of a stream came at {distinct} moments over {spread_s:.2f} s")


async def client_leaves(door: httpx.AsyncClient, key: str) -> None:
    """Its engine has nothing to do any more, and it is counted as one that left."""
    async with chat(door, key, tokens=1900) as answer:
        await anext(answer.aiter_lines())
        check(await total("tidegate_requests_running") == 1, "the request runs")
    left_s = time.monotonic()
    await until("what a client left is ended", 5, is_idle)
    print(f"what a client left was ended after {time.monotonic() - left_s:.2f} s")
    check(await total("tidegate_http_requests_total", 'status="499"') == 1, "it is counted as one that left")


async def one_more_under_load(door: httpx.AsyncClient, key: str) -> None:
    """Requests wait, so a second replica comes, and then both serve."""
    begun_s, over = time.monotonic(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(BUSY_CLIENTS):
            group.create_task(busy(door, key, number, over))
        try:
            await until("a second replica serves under load", START_S, lambda: serving(2))
        finally:
            over.set()
    print(f"a second replica serves {time.monotonic() - begun_s:.0f} s after requests began to wait")


async def busy(door: httpx.AsyncClient, key: str, number: int, over: asyncio.Event) -> None:
    chats = 0
    while not over.is_set():
        chats += 1
        async with chat(door, key, tokens=200, conversation=f"{number}-{chats}") as answer:
            check(answer.status_code in {200, 503}, f"status {answer.status_code} under load")
            await answer.aread()
        if answer.status_code == 503:  # it says when to come again; too soon only takes processor time from the start
            await asyncio.sleep(1)


async def limits_hold(door: httpx.AsyncClient) -> None:
    """A tenant with so many requests a minute, and four times as many in a moment, over two replicas."""
    key = await tenant(door, "limited", rpm=RPM)
    await until("the load before is over", 60, is_idle)
    before = await by_replica("tidegate_http_requests_total", 'route="/v1/chat/completions"', 'status="200"')
    numbers = iter(range(4 * RPM))

    async def one_after_the_other() -> list[int]:
        return [await asked(door, key, str(number)) for number in numbers]

    statuses = Counter(chain.from_iterable(await asyncio.gather(*(one_after_the_other() for _ in range(AT_A_TIME)))))
    after = await by_replica("tidegate_http_requests_total", 'route="/v1/chat/completions"', 'status="200"')
    let_in = [after[port] - before.get(port, 0.0) for port in after]
    check(statuses == {200: RPM, 429: 3 * RPM}, f"{RPM} a minute let in, the others refused: {statuses}")
    check(len(let_in) == 2 and min(let_in) > 0, f"both replicas let some in: {let_in}")
    print(f"of {4 * RPM} requests of a tenant with {RPM} a minute {statuses[200]} were let in, {let_in} by replica")


async def conversations_stay(door: httpx.AsyncClient, key: str) -> None:
    before = await by_replica("tidegate_http_requests_total", 'route="/v1/chat/completions"')
    for _ in range(6):
        await asked(door, key, "the same")
    after = await by_replica("tidegate_http_requests_total", 'route="/v1/chat/completions"')
    grown = sorted(after[port] - before[port] for port in after)
    check(grown == [0, 6], f"six turns of a conversation went to one replica: {grown}")
    print("six turns of one conversation went to one replica")


async def killed_is_replaced(door: httpx.AsyncClient, key: str, family: Callable[[], list[psutil.Process]]) -> None:
    """With it ends its engine, and Ray starts another; those who ask meanwhile are served by the other one."""
    victim = next(process for process in family() if is_replica(process))
    engine = victim.children(recursive=True)
    victim.kill()
    killed_s, statuses = time.monotonic(), Counter[int]()
    while len(statuses) == 0 or not await serving(2):
        statuses[await asked(door, key, f"meanwhile-{statuses.total()}")] += 1
        check(time.monotonic() - killed_s < START_S, "the killed replica is replaced")
        await asyncio.sleep(0.5)
    _, alive = psutil.wait_procs(engine, timeout=1)
    check(not alive, f"the engine ended with its replica: {alive}")
    print(f"a killed replica's engine ended with it; another one serves {time.monotonic() - killed_s:.0f} s later")
    print(f"who asked meanwhile, by status: {dict(statuses)}")
    check(statuses[200] > 0.9 * statuses.total(), "the other replica serves them")


async def one_fewer_in_quiet(door: httpx.AsyncClient, key: str) -> None:
    """It goes when nobody waits, after the answers that it gives."""
    spoken = 0
    begun_s = time.monotonic()
    while await serving(2):
        check(time.monotonic() - begun_s < START_S, "a replica goes in quiet")
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                group.create_task(whole(door, key, f"quiet-{number}-{spoken}"))
        spoken += 2
        await asyncio.sleep(0.5)
    print(f"one replica left after {time.monotonic() - begun_s:.0f} s of quiet; {spoken} answers meanwhile, all whole")


async def whole(door: httpx.AsyncClient, key: str, conversation: str) -> None:
    async with chat(door, key, tokens=32, conversation=conversation) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    check(lines[-1] == "data: [DONE]", f"a whole answer: {lines[-2:]}")


@asynccontextmanager
async def chat(
    door: httpx.AsyncClient, key: str, *, tokens: int, conversation: str = "first"
) -> AsyncIterator[httpx.Response]:
    message = {"role": "user", "content": f"This is {conversation}."}
    body = {"messages": [message], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {key}", "x-openwebui-chat-id": conversation}
    async with door.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        yield answer


async def asked(door: httpx.AsyncClient, key: str, conversation: str) -> int:
    """The status of one short chat."""
    async with chat(door, key, tokens=1, conversation=conversation) as answer:
        await answer.aread()
        return answer.status_code


async def tenant(door: httpx.AsyncClient, name: str, *, rpm: int) -> str:
    """A new tenant's key."""
    operator = {"authorization": f"Bearer {OPERATOR}"}
    form = {"name": name, "limits": {"requests_per_minute": rpm}}
    made = await door.post("/admin/tenants", json=form, headers=operator)
    made.raise_for_status()
    key = await door.post(f"/admin/tenants/{name}/keys", json={}, headers=operator)
    key.raise_for_status()
    return str(json.loads(key.content)["key"])


async def by_replica(metric: str, *labels: str) -> dict[int, float]:
    """The sum of a metric at each replica, asked on its own port."""
    sums: dict[int, float] = {}
    async with httpx.AsyncClient(timeout=5) as own:
        for port in OWN_PORTS:
            with contextlib.suppress(httpx.TransportError):
                page = (await own.get(f"http://127.0.0.1:{port}/metrics")).text
                samples = [line for line in page.splitlines() if line.startswith((f"{metric}{{", f"{metric} "))]
                sums[port] = sum(
                    float(line.rsplit(" ", 1)[1]) for line in samples if all(label in line for label in labels)
                )
    return sums


async def total(metric: str, *labels: str) -> float:
    return sum((await by_replica(metric, *labels)).values())


async def serving(number: int) -> bool:
    """Whether so many replicas have a model."""
    return sum(value > 0 for value in (await by_replica("tidegate_kv_capacity_tokens")).values()) == number


async def is_idle() -> bool:
    return await total("vllm:num_requests_running") == 0 == await total("tidegate_requests_running")


async def until(what: str, timeout_s: float, holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await holds():
        check(time.monotonic() < deadline_s, f"{what}, within {timeout_s:.0f} s")
        await asyncio.sleep(0.2)


def is_replica(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "ServeReplica" in " ".join(process.cmdline())
    return False


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


if __name__ == "__main__":
    main()
