"""LoRA adapters on the real engine: named at the start, loaded and unloaded while it runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.running_server import RunningServer, run_doctor, run_serve, start_server
from tests.models.tiny_adapter import make_tiny_adapter

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_STORY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_adapter(folder / "poet", rank=24)
    make_tiny_adapter(folder / "late", rank=8)
    make_tiny_adapter(folder / "foreign", hidden=64)
    return folder


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, tiny_tools_model: Path, adapters: Path
) -> Iterator[RunningServer]:
    server = start_server(
        tmp_path_factory.mktemp("adapted"), str(tiny_tools_model), "--served-model-name", "tiny",
        "--lora-modules", f"poet={adapters / 'poet'}",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )  # fmt: skip
    server.wait_until_ready()
    yield server
    server.kill()


def _answer(server: RunningServer, model: str) -> str:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**_STORY, "model": model}, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def _load(server: RunningServer, name: str, folder: Path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder)}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)


def test_an_adapter_answers_under_its_own_name_and_in_its_own_way(adapted: RunningServer) -> None:
    cards = httpx.get(f"{adapted.url}/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("poet", "tiny")]
    assert _answer(adapted, "poet") != _answer(adapted, "tiny")
    assert _answer(adapted, "poet") == _answer(adapted, "poet")


def test_adapters_come_and_go_while_the_server_runs(adapted: RunningServer, adapters: Path) -> None:
    assert _load(adapted, "late", adapters / "late").status_code == 200
    assert _answer(adapted, "late") not in (_answer(adapted, "poet"), _answer(adapted, "tiny"))
    gone = httpx.post(f"{adapted.url}/v1/unload_lora_adapter", json={"lora_name": "late"}, timeout=60)
    assert gone.status_code == 200
    absent = httpx.post(f"{adapted.url}/v1/chat/completions", json={**_STORY, "model": "late"}, timeout=60)
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_of_another_model_is_refused_and_the_server_goes_on(adapted: RunningServer, adapters: Path) -> None:
    refused = _load(adapted, "foreign", adapters / "foreign")
    assert refused.status_code == 400
    assert "belongs to another model" in refused.json()["error"]["message"]
    assert _answer(adapted, "poet")


def test_a_start_with_an_adapter_of_another_model_says_what_to_do(tiny_tools_model: Path, adapters: Path) -> None:
    ended = run_serve(str(tiny_tools_model), "--port", "0", "--lora-modules", f"foreign={adapters / 'foreign'}")
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "belongs to another model" in last
    assert "/training/machine/tiny-llama" in last


def test_the_doctor_knew_how_much_would_fit(adapted: RunningServer, tiny_tools_model: Path) -> None:
    said = run_doctor(str(tiny_tools_model))["model"]["plans"][0]["kv_tokens"]
    assert said == pytest.approx(adapted.kv_tokens, rel=0.05)
