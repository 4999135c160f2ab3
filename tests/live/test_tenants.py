"""Tenants from end to end: the command line, the official client and the real engine."""

import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.live.running_server import RunningServer, start_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def shared(folder: Path, tiny_tools_model: Path) -> Iterator[RunningServer]:
    """A server with its own embedded Redis, two names for its model, and a store of responses."""
    names = ("--served-model-name", "tiny", "hidden")
    stores = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    running = start_server(folder, str(tiny_tools_model), "--max-model-len", "2048", *names, environment=stores)
    running.wait_until_ready()
    yield running
    running.kill()


def keys(server: RunningServer, folder: Path, *args: str) -> str:
    """What `tidegate keys ARGS` prints."""
    command = [
        sys.executable,
        "-m",
        "server",
        "keys",
        *args,
        "--url",
        server.url,
        "--data-folder",
        str(folder / "data"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def client(server: RunningServer, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def say_hello(caller: OpenAI, model: str = "tiny") -> int:
    """How many tokens come back."""
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello."}]
    answer = caller.chat.completions.create(model=model, messages=messages, max_tokens=4)
    assert answer.usage is not None
    return answer.usage.completion_tokens


def test_a_key_from_the_command_line_serves_until_it_is_revoked(shared: RunningServer, folder: Path) -> None:
    key = keys(shared, folder, "create", "search")
    caller = client(shared, key)
    assert say_hello(caller) >= 1
    stream = caller.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello."}], max_tokens=4, stream=True
    )
    assert list(stream)
    with pytest.raises(openai.AuthenticationError):
        say_hello(client(shared, "EMPTY"))
    keys(shared, folder, "revoke", "search")
    with pytest.raises(openai.AuthenticationError) as refused:
        say_hello(caller)
    assert refused.value.code == "invalid_api_key"


def test_a_model_that_is_not_the_tenants_is_answered_like_one_that_is_not_there(
    shared: RunningServer, folder: Path
) -> None:
    everything = keys(shared, folder, "create", "all")
    limited = keys(shared, folder, "create", "few", "--models", "tiny,not-loaded")
    foreign, absent, not_loaded = (
        httpx.post(
            f"{shared.url}/v1/chat/completions",
            json={"model": model, "messages": [{"role": "user", "content": "Hello."}]},
            headers={"authorization": f"Bearer {limited}"},
        )
        for model in ("hidden", "absent", "not-loaded")
    )
    assert foreign.status_code == 404
    assert foreign.text == absent.text.replace("absent", "hidden")
    assert foreign.text.replace("hidden", "not-loaded", 1) == not_loaded.text
    assert "Valid aliases: not-loaded, tiny." in foreign.text
    assert [card.id for card in client(shared, limited).models.list()] == ["tiny"]
    assert say_hello(client(shared, everything), "hidden") >= 1


def test_a_stored_response_is_for_another_tenant_one_that_is_not_there(shared: RunningServer, folder: Path) -> None:
    owner, other = (
        httpx.Client(
            base_url=f"{shared.url}/v1",
            headers={"authorization": f"Bearer {keys(shared, folder, 'create', name)}"},
            timeout=60,
        )
        for name in ("owner", "other")
    )
    with owner, other:
        asked = {"model": "tiny", "input": "Hello.", "max_output_tokens": 4}
        told = owner.post("/responses", json=asked).json()["id"]
        long = {**asked, "max_output_tokens": 1900, "ignore_eos": True, "background": True}
        begun = owner.post("/responses", json=long).json()["id"]
        for response_id in (told, begun):
            foreign, absent = (
                [
                    other.get(f"/responses/{named}"),
                    other.get(f"/responses/{named}", params={"stream": True}),
                    other.post(f"/responses/{named}/cancel"),
                    other.post("/responses", json={**asked, "previous_response_id": named}),
                ]
                for named in (response_id, "resp_absent")
            )
            assert [answer.status_code for answer in foreign] == [404] * 4
            assert [answer.text.replace(response_id, "resp_absent") for answer in foreign] == [
                answer.text for answer in absent
            ]
        kept = owner.get(f"/responses/{told}").text
        assert other.post("/responses", json={**asked, "request_id": told}).json()["id"] == told
        assert owner.get(f"/responses/{told}").text == kept != other.get(f"/responses/{told}").text
        assert owner.post("/responses", json={**asked, "previous_response_id": told}).status_code == 200
        assert owner.get(f"/responses/{begun}").json()["status"] in {"queued", "in_progress"}
        assert owner.post(f"/responses/{begun}/cancel").json()["status"] == "cancelled"


def test_a_limit_holds_and_what_was_used_is_told(shared: RunningServer, folder: Path) -> None:
    caller = client(shared, keys(shared, folder, "create", "light", "--rpm", "2", "--models", "tiny"))
    used = [say_hello(caller) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refused:
        say_hello(caller)
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
    deadline_s = time.monotonic() + 10  # a settlement follows its answer
    while not (models := usage(shared, caller)["today"]["models"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert [(figures["model"], figures["requests"], figures["completion_tokens"]) for figures in models] == [
        ("tiny", 2, sum(used))
    ]
    shown = keys(shared, folder, "usage", "light")
    assert "tiny" in shown
    assert f"{models[0]['total_tokens']:,}" in shown


def usage(server: RunningServer, caller: OpenAI) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(
        f"{server.url}/v1/usage", headers={"authorization": f"Bearer {caller.api_key}"}
    ).json()
    return found


def test_the_operator_key_is_its_owners_alone_and_in_no_log(shared: RunningServer, folder: Path) -> None:
    file = folder / "data" / "operator.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = keys(shared, folder, "create", "logged")
    assert say_hello(client(shared, key)) >= 1
    wait_for(shared, '"tenant": "logged"')  # the access log follows the answer
    assert file.read_text().strip() not in shared.log
    assert key not in shared.log
    lines = [event for event in shared.log_events() if event.get("tenant") == "logged"]
    assert [(event["event"], event["status"]) for event in lines] == [("request", 200)]


def test_tenants_and_keys_outlive_a_restart_and_a_file_is_read_on_a_signal(
    tmp_path: Path, tiny_tools_model: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("")
    args = (str(tiny_tools_model), "--tenants-file", str(file))
    first = start_server(tmp_path, *args)
    try:
        wait_for(first, "callers need no key")
        key = keys(first, tmp_path, "create", "search")
        wait_for(first, "callers need a key")
    finally:
        assert first.stop() == 0
    second = start_server(tmp_path, *args)
    try:
        wait_for(second, "callers need a key")
        refused = httpx.get(f"{second.url}/v1/models", headers={"authorization": "Bearer EMPTY"})
        known = httpx.get(f"{second.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert (refused.status_code, known.status_code) == (401, 503)  # the engine is still loading
        file.write_text("[tenants.a]\nclass = 'best'")
        wait_for(second, "line 2")
        file.write_text("[tenants.a]\nclass = 'batch'")
        wait_for(second, "tenants file read")
    finally:
        assert second.stop() == 0


def wait_for(server: RunningServer, words: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while words not in server.log:
        assert time.monotonic() < deadline_s, server.log[-2000:]
        time.sleep(0.05)
