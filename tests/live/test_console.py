"""The console in a real Chromium, against a real engine."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from server.policy.tenants import Tenant
from server.store.connection import connect
from server.store.redis_server import EmbeddedRedis
from server.store.tenants import TenantRecords
from tests.live.browser import CHROMIUM, DRIVER, Browser, browser
from tests.live.running_server import RunningServer, start_server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="NO CHROMIUM: install Debian's chromium and chromium-driver to test the console",
    ),
]

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


OVERVIEW = 'route="/admin/overview"'


class HostileUpstream(BaseHTTPRequestHandler):
    """A server whose model writes markup."""

    words: ClassVar = ("See: ", HOSTILE, " and", " more.")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for word in self.words:
            chunk = {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class Served:
    """The server under test, with the keys of its operator and of a tenant."""

    running: RunningServer
    operator_key: str
    tenant_key: str

    def operator(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"authorization": f"Bearer {self.operator_key}"}
        return httpx.request(method, f"{self.running.url}{path}", json=body, headers=headers, timeout=30)

    def chat(self, text: str, max_tokens: int = 16) -> int:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "stream": True}
        headers = {"authorization": f"Bearer {self.tenant_key}"}
        answer = httpx.post(f"{self.running.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        return answer.status_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HostileUpstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def served(folder: Path, upstream: str, tiny_tools_model: Path) -> Iterator[Served]:
    """A server with a tenant, and with another whose name no command would take."""
    names = ("--served-model-name", "tiny", HOSTILE)
    running = start_server(
        folder, str(tiny_tools_model), "--max-model-len", "1024", *names, "--fallback-url", upstream,
        "--failed-logins-per-minute", "5",
    )  # fmt: skip
    try:
        running.wait_until_ready()
        operator_key = (folder / "data" / "operator.key").read_text().strip()
        served = Served(running, operator_key, "")
        served.operator("POST", "/admin/tenants", {"name": "search", "class": "critical", "limits": {"concurrency": 9}})
        made = served.operator("POST", "/admin/tenants/search/keys", {})
        asyncio.run(plant(EmbeddedRedis(folder / "data" / "redis").url))
        yield Served(running, operator_key, made.json()["key"])
    finally:
        running.kill()


async def plant(redis_url: str) -> None:
    client = connect(redis_url, 5.0)
    assert await TenantRecords(client).create(Tenant(HOSTILE))
    await client.aclose()


@pytest.fixture(scope="module")
def tab(folder: Path, served: Served) -> Iterator[Browser]:
    del served
    with browser(folder) as opened:
        yield opened


@pytest.fixture
def console(tab: Browser, served: Served) -> Iterator[Browser]:
    """The console, signed in, and in the end without a word of complaint from the browser."""
    open_console(tab, served)
    tab.complaints()
    yield tab
    assert [line for line in tab.complaints() if not _asked_without_a_key(line)] == []
    assert not tab.find_all("main img, main script")
    assert "hacked" not in tab.driver.title


def _asked_without_a_key(line: str) -> bool:
    """The chat asks for the models as soon as it is shown; the browser logs the refusal as a failed load."""
    return "/v1/models" in line and "401" in line


def open_console(tab: Browser, served: Served) -> None:
    tab.driver.get(f"{served.running.url}/console")
    tab.wait(lambda: tab.find("#sign-in").is_displayed() or tab.find("#console").is_displayed(), "the page")
    if tab.find("#sign-in").is_displayed():
        tab.type("#key", served.operator_key)
        tab.click("#key-form button")
    tab.wait(lambda: "ready" in tab.text("#pill-engine"), "the first figures")


def test_a_wrong_key_is_told_and_the_right_one_opens_the_console(tab: Browser, served: Served) -> None:
    tab.driver.get(f"{served.running.url}/console")
    tab.wait(lambda: tab.find("#sign-in").is_displayed(), "the question for the key")
    tab.picture("sign-in")
    tab.type("#key", "not-the-key")
    tab.click("#key-form button")
    tab.wait(lambda: "does not take this key" in tab.text("#key-error"), "the refusal")
    assert not tab.find("#console").is_displayed()
    assert tab.run("return sessionStorage.length") == 0
    tab.run("document.getElementById('key').value = ''")
    open_console(tab, served)
    assert tab.run("return sessionStorage.getItem('tidegate.operator-key')") == served.operator_key
    assert tab.run("return localStorage.length") == 0
    policies = [line for line in tab.complaints() if "401" not in line]
    assert policies == []


def test_charts_have_data_after_some_requests(console: Browser, served: Served) -> None:
    threads = [threading.Thread(target=served.chat, args=(f"Hello {n}.", 24)) for n in range(8)]
    for thread in threads:
        thread.start()
    console.wait(lambda: len(console.find_all(".chart:nth-of-type(1) path.line")) >= 2, "lines for tokens in and out")
    ttft = ".chart:nth-of-type(2) .legend .value"
    console.wait(lambda: console.text(ttft).endswith("s"), "a time to first token")
    for thread in threads:
        thread.join()
    label = str(console.find(".chart:nth-of-type(1) svg").get_attribute("aria-label"))
    assert "Generated" in label
    console.click(".chart:nth-of-type(1) summary")
    console.wait(lambda: len(console.find_all(".chart:nth-of-type(1) tbody tr")) >= 2, "the same as a table")
    console.click(".chart:nth-of-type(1) summary")
    for scheme in ("light", "dark"):
        console.colours(scheme)
        console.picture(f"now-{scheme}")


def test_earlier_values_are_read_with_the_arrow_keys_and_views_are_changed_with_them(console: Browser) -> None:
    console.wait(lambda: console.find_all(".chart:nth-of-type(4) path.line"), "a line")
    console.run("document.querySelector('.chart:nth-of-type(4) svg').focus()")
    press(console, "ArrowLeft")
    label = str(console.find(".chart:nth-of-type(4) svg").get_attribute("aria-label"))
    assert "Now" not in label
    assert console.text(".chart:nth-of-type(4) .when").count(":") == 2
    console.run("document.getElementById('tab-now').focus()")
    press(console, "ArrowRight")
    assert console.find("#view-work").is_displayed()
    assert not console.find("#view-now").is_displayed()
    assert console.run("return document.activeElement.id") == "tab-work"


def press(tab: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        tab.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key})


def test_the_chat_streams_an_answer_and_tells_what_was_left_out(console: Browser, served: Served) -> None:
    console.click("#tab-chat")
    console.type("#chat-key", f"{served.tenant_key}\t")
    console.wait(lambda: console.find_all("#chat-model option[value=tiny]"), "the models of this key")
    console.run(
        "window.seen = new Set();"
        "new MutationObserver(() => { for (const one of document.querySelectorAll('.bubble.assistant'))"
        " window.seen.add(one.textContent.length); })"
        ".observe(document.getElementById('chat-log'), {childList: true, subtree: true, characterData: true})"
    )
    say(console, "Tell me about the sea.")
    assert len(console.run("return [...window.seen]")) > 3, "it came in one piece"
    assert "tokens" in console.text(".about")
    long = "tide " * 500
    say(console, long)
    say(console, f"{long} again")
    assert "history shortened" in console.find_all(".about")[-1].text
    console.picture("chat")
    console.click("#tab-events")
    console.wait(lambda: "drop_turns" in console.text("#truncations"), "the cut on the list")
    assert "tide" not in console.text("#truncations")


def say(console: Browser, text: str) -> None:
    """Send a message, and wait for the whole answer."""
    console.run("document.getElementById('chat-max').value = 24")
    before = len(console.find_all(".about"))
    console.run("document.getElementById('chat-text').value = arguments[0]", text)
    console.click("#chat-send")
    console.wait(lambda: len(console.find_all(".about")) == before + 1, "the answer's beginning")
    console.wait(lambda: console.find("#chat-send").is_displayed(), "the answer's end", 60)


def test_a_chat_without_the_tenants_key_shows_why_it_was_refused(console: Browser) -> None:
    console.click("#tab-chat")
    console.wait(lambda: "key" in console.text("#chat-log .error"), "the refusal")
    complaints = console.complaints()
    assert complaints
    assert all("401" in line for line in complaints)


def test_the_level_is_held_and_given_back_and_another_servers_markup_stays_text(
    console: Browser, served: Served
) -> None:
    choose(console, "4", HOSTILE, f"anna {HOSTILE}"[:80])
    assert HOSTILE in console.text("#confirm-text")
    console.picture("confirm")
    console.click("#confirm-no")
    assert served.operator("GET", "/admin/level").json()["level"] == 0
    console.click("#level-form .primary")
    console.click("#confirm-yes")
    console.wait(lambda: console.text("#ladder .now").startswith("4"), "level 4")
    assert HOSTILE in console.text("#pin")
    assert "anna" in console.text("#pin")
    console.picture("level-held")
    console.click("#tab-chat")
    console.type("#chat-key", f"{served.tenant_key}\t")
    console.wait(lambda: len(console.find_all("#chat-model option")) == 2, "both models")
    say(console, "Hello.")
    assert console.text(".bubble.assistant") == f"See: {HOSTILE} and more."
    assert "fallback" in console.text(".about")
    console.click("#tab-now")
    console.wait(lambda: "1 answered" in console.text("#fallbacks"), "the fallback's figures")
    console.click("#level-clear")
    console.click("#confirm-yes")
    console.wait(lambda: console.text("#ladder .now").startswith("0"), "level 0")
    assert not console.find("#pin").is_displayed()
    audit = [event for event in served.running.log_events() if event.get("event") in ("level pinned", "level unpinned")]
    assert [event["event"] for event in audit][-2:] == ["level pinned", "level unpinned"]


def choose(console: Browser, level: str, reason: str, by: str) -> None:
    script = "for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value"
    console.wait(lambda: console.find_all("#level-choice option"), "the levels")
    console.run(script, {"level-choice": level, "level-reason": reason, "level-by": by})
    console.click("#level-form .primary")
    console.wait(lambda: console.find("#confirm").is_displayed(), "the question")


def test_hostile_names_stay_text_on_every_view(console: Browser, served: Served) -> None:
    headers = {"authorization": f"Bearer {served.tenant_key}"}
    body = {"model": f"absent {HOSTILE}", "messages": [{"role": "user", "content": "Hello."}]}
    refused = httpx.post(f"{served.running.url}/v1/chat/completions", json=body, headers=headers)
    assert refused.status_code == 404
    console.wait(lambda: HOSTILE in console.text("#health"), "the model's name")
    console.click("#tab-work")
    console.wait(lambda: HOSTILE in console.text("#tenants"), "the tenant's name")
    assert "critical" in console.text("#tenants")
    console.picture("tenants")
    console.click("#tab-events")
    console.wait(lambda: "model_not_found" in console.text("#refusals"), "the refusal")
    assert HOSTILE in console.text("#refusals")
    console.picture("refusals")


def test_the_colours_follow_the_system_until_one_is_chosen(console: Browser) -> None:
    def ground() -> str:
        return str(console.run("return getComputedStyle(document.body).backgroundColor"))

    console.colours("light")
    light = ground()
    console.colours("dark")
    dark = ground()
    assert light != dark
    console.run("const s = document.getElementById('theme'); s.value = 'light'; s.dispatchEvent(new Event('change'))")
    assert ground() == light
    console.driver.refresh()
    console.wait(lambda: ground() == light, "the choice after a reload")
    console.run("localStorage.clear()")


def test_nobody_asks_for_figures_while_the_page_is_hidden(console: Browser, served: Served) -> None:
    def asked() -> float:
        page = httpx.get(f"{served.running.url}/metrics").text.splitlines()
        lines = [line for line in page if line.startswith("tidegate_http_requests_total{") and OVERVIEW in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    seen = asked()
    console.wait(lambda: asked() >= seen + 2, "figures while it is seen")
    page = console.driver.current_window_handle
    console.driver.switch_to.new_window("tab")  # which hides the page
    time.sleep(1)
    before = asked()
    time.sleep(4)
    while_hidden = asked() - before
    console.driver.close()
    console.driver.switch_to.window(page)
    assert while_hidden == 0
    console.wait(lambda: asked() > before, "the next figures once it is seen again")


def test_the_terminal_shows_the_same(served: Served, folder: Path) -> None:
    def top(*args: str) -> str:
        where = ("--url", served.running.url, "--data-folder", str(folder / "data"))
        command = [sys.executable, "-m", "server", "top", *args, *where]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    busy = threading.Thread(target=served.chat, args=("Hello.", 48))
    busy.start()
    shown = top("--once")
    busy.join()
    assert "level 0 normal" in shown
    assert "search" in shown
    assert "tokens/s" in shown
    snapshot = json.loads(top("--json"))
    assert snapshot["counters"]["completion_tokens"] > 0
    assert snapshot["histograms"]["ttft_s"]["counts"][-1] > 0
    (search,) = [row for row in snapshot["tenants"]["shown"] if row["name"] == "search"]
    assert search["today"]["requests"] > 0


def test_who_tries_keys_is_slowed_down_and_the_console_goes_on(console: Browser, served: Served) -> None:
    url = f"{served.running.url}/admin/overview"
    tries = [httpx.get(url, headers={"authorization": f"Bearer wrong-{n}"}).status_code for n in range(8)]
    assert tries[-1] == 429
    assert served.operator("GET", "/admin/overview").status_code == 200
    console.driver.refresh()
    console.wait(lambda: "ready" in console.text("#pill-engine"), "figures")


def test_a_server_that_is_gone_is_told_and_the_last_figures_stay(tab: Browser, served: Served) -> None:
    open_console(tab, served)
    served.running.kill()
    tab.wait(lambda: "does not answer" in tab.text("#banner"), "the banner")
    assert tab.find("#view-now").is_displayed()
