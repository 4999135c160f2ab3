"""`python -m tests.deploy.open_webui --open-webui PATH`: Open WebUI against a real server, as a person sees it.

Starts a server with the embedded model and Open WebUI with the settings of `docker/compose.yaml`, chats in headless
Chromium, and then looks at the pages of the errors. The pictures are for looking at. Open WebUI is large (`pip install
open-webui playwright`, some GB), so it lives in an environment of its own, whose `open-webui` is named.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import httpx

from tests.deploy.compose_file import services
from tests.live.running_server import RunningServer, start_server

OPERATOR: Final = "the-operators-key"
TENANT: Final = "webui"
PORT: Final = 18124
ANSWER_TOKENS: Final = 48
LONGEST_WAIT_S: Final = 10.0
_START_TIMEOUT_S: Final = 180.0


@dataclass(slots=True)
class Person:
    """Somebody at the chat page. `pages` is the browser's process."""

    pages: "subprocess.Popen[str]"
    pictures: Path

    def says(self, text: str, picture: str, expect: str = "") -> str:
        """Start a new chat. Returns what the page shows once the expected words, or an answer, are there."""
        assert self.pages.stdin is not None
        assert self.pages.stdout is not None
        order = {"text": text, "expect": expect, "picture": str(self.pictures / picture)}
        print(json.dumps(order), file=self.pages.stdin, flush=True)
        seen: dict[str, Any] = json.loads(self.pages.stdout.readline())
        print(f"{picture}: {'seen' if seen['shown'] else 'NOT SEEN'}")
        if not seen["shown"]:
            raise AssertionError(f"the page does not show {expect or 'an answer'}: {seen['text'][-800:]}")
        return str(seen["text"])


@click.command()
@click.option("--open-webui", "program", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--chromium", default=lambda: shutil.which("chromium") or "chromium", show_default="chromium on PATH")
@click.option("--model", help="Another model than the embedded one, for a slow machine.")
@click.option("--pictures", type=click.Path(path_type=Path), default=Path("open-webui-pictures"), show_default=True)
def main(program: Path, chromium: str, model: str | None, pictures: Path) -> None:
    """Chat, then meet every error."""
    folder = pictures.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    named = ["--model", model] if model else []
    server = start_server(folder, *named, "--operator-key", OPERATOR, "--default-max-tokens", str(ANSWER_TOKENS))
    try:
        server.wait_until_ready()
        key = make_tenant(server)
        with chat_page(program, folder, server, key) as url, browser(program, chromium, url) as pages:
            person = Person(pages, folder)
            a_person_chats(person, server)
            errors_are_told_in_words(person, server)
    finally:
        server.kill()
    print(f"Open WebUI: all that was tried has passed; look at {folder}")


def operator(server: RunningServer, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    answer = httpx.request(method, f"{server.url}/admin/{path}", json=body, headers=headers, timeout=30)
    answer.raise_for_status()
    made: dict[str, Any] = answer.json()
    return made


def make_tenant(server: RunningServer) -> str:
    """The chat page's tenant, as docs/open-webui.md advises. Returns its key."""
    operator(server, "POST", "tenants", {"name": TENANT, "class": "critical", "trusted": True})
    return str(operator(server, "POST", f"tenants/{TENANT}/keys", {})["key"])


@contextmanager
def chat_page(program: Path, folder: Path, server: RunningServer, key: str) -> Iterator[str]:
    """Open WebUI with Compose's settings, but nobody has to sign in. Gives its URL."""
    environment = {
        **os.environ,
        **{name: str(value) for name, value in services()["webui"]["environment"].items()},
        "DATA_DIR": str(folder / "data-of-open-webui"),
        "DEFAULT_MODEL_METADATA": json.dumps({"capabilities": {"builtin_tools": False}}),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": key,
        "WEBUI_AUTH": "false",
        "WEBUI_SECRET_KEY": "for-this-run",
    }
    url = f"http://127.0.0.1:{PORT}"
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(PORT)]
    with (folder / "open-webui.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"Open WebUI does not start; see {folder / 'open-webui.log'}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def browser(program: Path, chromium: str, url: str) -> Iterator["subprocess.Popen[str]"]:
    """Chromium, driven from Open WebUI's environment."""
    script = Path(__file__).with_name("open_webui_pages.py")
    command = [str(program.with_name("python")), str(script), url, chromium]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pages:
        yield pages
        assert pages.stdin is not None
        pages.stdin.close()


def a_person_chats(person: Person, server: RunningServer) -> None:
    """Two chats, one right after the other: titles and tags of the first must not hold up the second."""
    person.says("What is the capital of France?", "1-answer.png")
    person.says("Say hello in one word.", "2-second-answer.png")
    waited_s = sample(server, 'tidegate_queue_wait_seconds_sum{class="critical"}')
    batch = sample(server, 'tidegate_queue_wait_seconds_count{class="batch"}')
    print(f"both chats waited {waited_s:.2f} s together; {batch:.0f} calls of Open WebUI's own were of the class batch")
    if batch < 1:
        raise AssertionError("Open WebUI's own calls are not of the class batch")
    if waited_s > LONGEST_WAIT_S:
        raise AssertionError("Open WebUI's own calls held up a chat")


def sample(server: RunningServer, name: str) -> float:
    """One sample of the metrics page; 0 if it is not there."""
    lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def errors_are_told_in_words(person: Person, server: RunningServer) -> None:
    """Each error is on the page in the server's own words."""
    person.says("word " * 9000, "3-too-long.png", expect="maximum context length")
    operator(server, "PATCH", f"tenants/{TENANT}", {"limits": {"requests_per_minute": 1}})
    person.says("Hello.", "4-limit-429.png", expect="Please try again in")
    operator(server, "PATCH", f"tenants/{TENANT}", {"limits": {"requests_per_minute": None}})
    operator(server, "PUT", "level", {"level": 5, "reason": "a test", "ttl_s": 600})
    time.sleep(1.5)  # every replica follows within a second
    person.says("Hello.", "5-closed-503.png", expect="closed")
    operator(server, "PUT", "level", {"level": 0, "reason": "a test", "ttl_s": 600})
    time.sleep(1.5)
    operator(server, "DELETE", f"tenants/{TENANT}/keys", {})
    time.sleep(2.5)  # and forgets a key within two
    # Open WebUI then has no list of models, and says this in its own words.
    person.says("Hello.", "6-wrong-key-401.png", expect="was not found")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    main()
