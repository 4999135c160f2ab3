"""The console's page and its figures over HTTP, without an engine."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from server.api import console
from server.engine.calls import Call, Reply
from server.policy.edits import Edits
from server.policy.refusals import InvalidRequest
from server.serving.requests import current_request
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.batch_files import jsonl, line
from tests.serving.chat_operation import ChatOperation
from tests.serving.fake_stack import FakeStack, Operation, RecordingOperation

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
OPERATOR = {"authorization": f"Bearer {OPERATOR_KEY}"}
FILES = Path(console.__file__).with_name("console_files")


async def quoting(call: Call) -> Reply:
    """Refuses in the words of a validator, who shows what it was given."""
    raise InvalidRequest(f"Input should be a valid list: {call.body}", param="prompt")


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", CHAT): RecordingOperation(),
    ("POST", COMPLETIONS): quoting,
}


@pytest.fixture
def server(store_url: str) -> Iterator[httpx.Client]:
    with running(FakeStack(dict(OPERATIONS)), redis_url=store_url) as client:
        yield client


def overview(server: httpx.Client) -> dict[str, object]:
    found = server.get("/admin/overview", headers=OPERATOR)
    assert found.status_code == 200, found.text
    body: dict[str, object] = found.json()
    return body


def test_anyone_may_read_the_page_and_nobody_may_put_anything_into_it(server: httpx.Client) -> None:
    redirect = server.get("/console")
    assert (redirect.status_code, redirect.headers["location"]) == (307, "console/")
    for name in ("", *(file.name for file in FILES.iterdir())):
        page = server.get(f"/console/{name}")
        assert page.status_code == 200, name
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
    assert server.get("/console/").headers["content-type"].startswith("text/html")
    assert "javascript" in server.get("/console/console.js").headers["content-type"]


def test_a_page_that_has_not_changed_is_not_sent_again(server: httpx.Client) -> None:
    first = server.get("/console/console.js")
    again = server.get("/console/console.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize(
    "path", ["nothing.js", "../console.py", "..%2fconsole.py", "/etc/passwd", "%2fetc%2fpasswd", "%00"]
)
def test_no_other_file_can_be_reached(server: httpx.Client, path: str) -> None:
    request = httpx.Request("GET", f"{server.base_url}/console/{path}")
    answer = server.send(request)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_page_has_no_inline_script_or_style_and_no_address_of_another_site() -> None:
    page = (FILES / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|\bon[a-z]+=|\bstyle=|<style", page) == []
    for file in FILES.iterdir():
        text = file.read_text()
        addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []


def test_a_server_without_a_console_serves_its_figures_all_the_same() -> None:
    with running(console=False) as server:
        assert server.get("/console").status_code == 404
        assert server.get("/console/").status_code == 404
        assert overview(server)["object"] == "overview"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}])
def test_without_the_operator_key_there_are_no_figures(server: httpx.Client, headers: dict[str, str]) -> None:
    refused = server.get("/admin/overview", headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_who_tries_keys_is_slowed_down_and_the_operator_beside_it_is_not() -> None:
    with running(failed_logins_per_minute=3) as server:
        assert overview(server)["object"] == "overview"
        wrong = [server.get("/admin/overview", headers={"authorization": f"Bearer {n}"}) for n in range(5)]
        assert [answer.status_code for answer in wrong] == [401, 401, 401, 429, 429]
        assert int(wrong[-1].headers["retry-after"]) >= 1
        assert overview(server)["object"] == "overview"


def test_the_figures_name_what_a_running_server_is_doing(server: httpx.Client) -> None:
    assert server.post(CHAT, json={"messages": []}).status_code == 200
    found = server.get("/admin/overview", headers=OPERATOR)
    assert found.headers["cache-control"] == "no-store"
    shown = found.json()
    assert shown["engine"]["ready"]
    assert shown["engine"]["models"] == ["a-model"]
    assert shown["versions"] == {"tidegate": "1.2.3", "vllm": "0.32.0"}
    assert shown["limits"]["mode"] == "redis"
    assert shown["level"]["level"] == 0
    assert [one["level"] for one in shown["level"]["levels"]] == [0, 1, 2, 3, 4, 5]
    assert shown["counters"]["requests_by_status"] == {"2xx": 1, "4xx": 0, "5xx": 0}
    assert shown["requests"]["running"] == {"critical": 0, "default": 0, "batch": 0}


def test_tenants_are_shown_with_their_limits_and_use(server: httpx.Client) -> None:
    form = {"name": "search", "class": "critical", "limits": {"requests_per_minute": 60}}
    assert server.post("/admin/tenants", json=form, headers=OPERATOR).status_code == 201
    (row,) = server.get("/admin/overview", headers=OPERATOR).json()["tenants"]["shown"]
    assert (row["name"], row["class"], row["limits"]["requests_per_minute"]) == ("search", "critical", 60)
    assert row["today"] == {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}


def test_while_redis_is_away_the_rest_is_shown_and_the_reason_is_told() -> None:
    with running(FakeStack({}), redis_url="redis://127.0.0.1:1") as server:
        shown = server.get("/admin/overview", headers=OPERATOR).json()
        assert shown["engine"]["ready"]
        assert shown["tenants"]["shown"] == []
        assert "Redis" in shown["tenants"]["problem"]


def test_a_refusal_is_shown_with_its_reason_and_never_with_what_the_client_sent(server: httpx.Client) -> None:
    secret = "the patient's name is Ada"
    for _ in range(2):
        quoted = server.post(COMPLETIONS, json={"prompt": secret})
        assert quoted.status_code == 400
        assert secret in quoted.text
    assert server.post(CHAT, json={"messages": [], "kv_transfer_params": {"a": secret}}).status_code == 400
    assert server.get("/admin/overview").status_code == 401
    answer = server.get("/admin/overview", headers=OPERATOR)
    assert secret not in answer.text
    entries = {(entry["code"], entry["route"]): entry for entry in answer.json()["recent"]["refusals"]}
    assert entries["invalid_request_error", COMPLETIONS]["count"] == 2
    assert entries["invalid_request_error", COMPLETIONS]["detail"] == "param: prompt"
    assert entries["unsupported_parameter", CHAT]["status"] == 400
    assert "operator" in entries["invalid_api_key", "/admin/overview"]["detail"]


def test_a_prompt_that_was_cut_is_shown_with_what_it_lost(store_url: str) -> None:
    async def cutting(call: Call) -> Reply:
        del call
        request = current_request()
        assert request is not None
        request.edited(Edits(dropped_messages=3, dropped_tokens=70))
        return Reply(b"{}", "application/json")

    with running(FakeStack({("POST", CHAT): cutting}), redis_url=store_url) as server:
        assert server.post(CHAT, json={"messages": []}).headers["x-context-truncated"]
        (entry,) = server.get("/admin/overview", headers=OPERATOR).json()["recent"]["truncations"]
    assert (entry["code"], entry["route"], entry["tenant"]) == ("drop_turns", CHAT, "anyone")
    assert entry["detail"] == "messages=3, tokens=70"


def test_a_batch_is_shown_with_its_progress_until_it_ends(store_url: str, tmp_path: Path) -> None:
    slow = ChatOperation(delay_s=3.0)
    with running(FakeStack({("POST", CHAT): slow}), redis_url=store_url, data_folder=tmp_path) as server:
        sdk = OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0)
        file = sdk.files.create(file=("in.jsonl", jsonl(line(f"id-{n}", "text") for n in range(5))), purpose="batch")
        batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        rows = until(server, lambda rows: bool(rows) and rows[0]["total"] == 5)
        assert (rows[0]["id"], rows[0]["tenant"], rows[0]["status"]) == (batch.id, "anyone", "in_progress")
        assert until(server, lambda rows: not rows) == []


def until(server: httpx.Client, holds: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The batches shown, once they are so; they are read again every two seconds."""
    deadline_s = time.monotonic() + 20
    while True:
        rows: list[dict[str, Any]] = server.get("/admin/overview", headers=OPERATOR).json()["batches"]["shown"]
        if holds(rows):
            return rows
        assert time.monotonic() < deadline_s, rows
        time.sleep(0.1)
