"""Who may call what, seen by clients of the real application with a real Redis."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
import pytest
from redis import Redis

from server.api.routes import DEVELOPER_ROUTES, OPERATION_ROUTES
from server.engine.calls import Call, Reply
from server.policy.refusals import ModelNotFound
from server.serving.requests import current_request
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack, RecordingOperation
from tests.telemetry.captured_logs import CapturedLogs, captured_logs

CHAT = "/v1/chat/completions"
LORA = "/v1/load_lora_adapter"


async def models(_: Call) -> Reply:
    cards = '{"id": "a-model", "parent": null}, {"id": "team/adapter", "parent": "a-model"}'
    return Reply(f'{{"object": "list", "data": [{cards}]}}'.encode(), "application/json")


class House:
    """A running server and the operator's way in."""

    def __init__(self, client: httpx.Client, chat: RecordingOperation) -> None:
        self.client = client
        self.chat = chat

    def tenant(self, name: str, **fields: Any) -> str:
        """A new tenant's key."""
        self.operate("POST", "/admin/tenants", {"name": name, **fields})
        return str(self.operate("POST", f"/admin/tenants/{name}/keys", {})["key"])

    def operate(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.client.request(method, path, json=body, headers=bearer(OPERATOR_KEY))
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ask(self, key: str, path: str = CHAT, body: dict[str, Any] | None = None) -> httpx.Response:
        return self.client.post(path, json=body or {}, headers=bearer(key))

    def ask_for(self, end_user: str, key: str) -> httpx.Response:
        return self.client.post(CHAT, json={}, headers={**bearer(key), "X-OpenWebUI-User-Id": end_user})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}".strip()}


@contextmanager
def house(redis_url: str | None, **settings: Any) -> Iterator[House]:
    chat = RecordingOperation()
    served = {("POST", route.path): chat for route in (*OPERATION_ROUTES, *DEVELOPER_ROUTES) if route.method == "POST"}
    with running(FakeStack({**served, ("GET", "/v1/models"): models}), redis_url=redis_url, **settings) as client:
        yield House(client, chat)


@pytest.fixture
def home(store_url: str) -> Iterator[House]:
    with house(store_url, failed_logins_per_minute=1000) as open_house:
        yield open_house


def error_code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_a_new_tenant_closes_the_server_and_its_key_opens_it(home: House) -> None:
    assert home.ask("EMPTY").status_code == 200
    key = home.tenant("search")
    assert home.ask(key).status_code == 200
    for wrong in ("EMPTY", "", key[:-1], f"{key}x"):
        answer = home.ask(wrong)
        assert (answer.status_code, error_code(answer)) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_anthropics_header_carries_a_key_as_well(home: House) -> None:
    key = home.tenant("search")
    answer = home.client.post("/v1/messages", json={}, headers={"x-api-key": key})
    assert answer.status_code == 200
    refused = home.client.post("/v1/messages", json={}, headers={"x-api-key": "tg-wrong"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


def test_a_key_of_ours_that_nobody_knows_is_refused_while_the_server_is_open(home: House) -> None:
    assert home.ask("tg-unknown").status_code == 401
    assert home.ask("sk-unknown").status_code == 200


def test_a_revoked_key_is_refused_at_once(home: House) -> None:
    key = home.tenant("search")
    assert home.ask(key).status_code == 200
    home.operate("DELETE", "/admin/tenants/search/keys")
    assert home.ask(key).status_code == 401


def test_a_key_expires(home: House) -> None:
    home.tenant("search")
    key = home.operate("POST", "/admin/tenants/search/keys", {"expires_in_s": 0.3})["key"]
    assert home.ask(key).status_code == 200
    time.sleep(0.4)
    assert home.ask(key).status_code == 401


def test_unknown_expired_and_revoked_keys_are_looked_up_alike_and_answered_alike(home: House, stored: Redis) -> None:
    home.tenant("search")
    expired = home.operate("POST", "/admin/tenants/search/keys", {"expires_in_s": 0.01})["key"]
    revoked = home.operate("POST", "/admin/tenants/search/keys", {})
    home.operate("DELETE", f"/admin/tenants/search/keys/{revoked['id']}")
    time.sleep(0.05)  # the calls above may end before the key does
    answers = set()
    with cast(Any, stored).monitor() as commands:  # its types are missing
        for key in ("tg-" + "x" * 40, expired, revoked["key"]):
            for _ in range(2):
                answer = home.client.get("/v1/responses/x", headers=bearer(key))
                answers.add((answer.status_code, answer.text))
                stored.echo("answered")
                assert looked_up(commands) == 1
    assert len(answers) == 1


def looked_up(commands: Any) -> int:
    """How many keys were looked up in Redis until the last answer."""
    seen = (command["command"] for command in commands.listen())
    return sum(":key:" in command for command in itertools.takewhile(lambda command: "answered" not in command, seen))


def test_keys_of_the_command_line_work_beside_tenants(store_url: str) -> None:
    with house(store_url, api_key=("the-old-key",)) as closed:
        key = closed.tenant("search")
        assert [closed.ask(each).status_code for each in (key, "the-old-key", "EMPTY")] == [200, 200, 401]


def test_a_model_that_is_not_the_tenants_is_as_good_as_absent(home: House) -> None:
    key = home.tenant("search", models=["team/adapter"])
    foreign, absent = home.ask(key, body={"model": "a-model"}), home.ask(key, body={"model": "b-model"})
    assert foreign.text.replace("a-model", "b-model") == absent.text
    assert foreign.status_code == absent.status_code == 404
    assert foreign.json()["error"] == {
        "message": "The model `a-model` does not exist. Valid aliases: team/adapter.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert home.chat.calls == []
    assert home.ask(key, body={"model": "team/adapter"}).status_code == 200


def test_a_body_that_names_no_model_means_the_default_one(home: House) -> None:
    key = home.tenant("search", models=["team/adapter"])
    for body in ({}, {"model": None}, {"model": ""}):
        answer = home.ask(key, body=body)
        assert (answer.status_code, error_code(answer)) == (404, "model_not_found")
        assert "team/adapter" in answer.text
        assert "a-model" not in answer.text
    assert home.ask(home.tenant("other", models=["a-model"])).status_code == 200


def test_a_request_runs_for_its_tenant_and_the_end_user_that_a_trusted_one_names(store_url: str) -> None:
    async def for_whom(_: Call) -> Reply:
        request = current_request()
        assert request is not None
        return Reply(json.dumps([request.tenant.name, request.end_user]).encode(), "application/json")

    with running(FakeStack({("POST", CHAT): for_whom}), redis_url=store_url) as client:
        there = House(client, RecordingOperation())
        assert there.ask_for("u-1", "EMPTY").json() == ["anyone", None]
        ui, team = there.tenant("ui", trusted=True), there.tenant("team")
        assert there.ask_for("u-1", ui).json() == ["ui", "u-1"]
        assert there.ask(ui).json() == ["ui", None]
        assert there.ask_for("u-1", team).json() == ["team", None]
        assert there.ask(OPERATOR_KEY).json() == ["operator", None]


def test_what_the_engine_says_of_an_absent_model_names_no_others(store_url: str) -> None:
    async def absent(_: Call) -> Reply:
        raise ModelNotFound("The model `gone` does not exist. Valid aliases: a-model.", param="model")

    with running(FakeStack({("POST", CHAT): absent}), redis_url=store_url) as client:
        there = House(client, RecordingOperation())
        few, all_of_them = there.tenant("few", models=["gone"]), there.tenant("all")
        assert there.ask(all_of_them, body={"model": "gone"}).json()["error"]["message"].endswith("a-model.")
        refused = there.ask(few, body={"model": "gone"})
        unsupported = there.ask(few, "/v1/embeddings", {"model": "gone"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        404,
        "The model `gone` does not exist. Valid aliases: gone.",
    )
    assert unsupported.json()["error"]["message"] == "This server does not support POST /v1/embeddings."


def test_a_response_is_cancelled_by_its_id_whatever_the_default_model(home: House) -> None:
    key = home.tenant("search", models=["team/adapter"])
    assert home.ask(key, "/v1/responses/resp_1/cancel").status_code == 200


def test_every_route_with_a_model_keeps_to_the_tenants_models(home: House) -> None:
    key = home.tenant("search", models=["team/adapter"])
    for route in OPERATION_ROUTES:
        if route.method == "POST" and not route.operators and "{" not in route.path:
            assert home.ask(key, route.path, {"model": "a-model"}).status_code == 404, route
    assert home.chat.calls == []


def test_the_list_of_models_has_only_the_tenants(home: House) -> None:
    key = home.tenant("search", models=["team/adapter", "not-loaded"])
    listed = home.client.get("/v1/models", headers=bearer(key)).json()
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [("team/adapter", None)]
    assert home.client.get("/v1/models/team/adapter", headers=bearer(key)).status_code == 200
    refused = home.client.get("/v1/models/a-model", headers=bearer(key))
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("Served here: team/adapter.")
    everyone = home.client.get("/v1/models", headers=bearer(home.tenant("other"))).json()
    assert [card["id"] for card in everyone["data"]] == ["a-model", "team/adapter"]


def test_what_changes_the_server_for_all_is_the_operators(store_url: str) -> None:
    with house(store_url, developer_routes=True, api_key=("the-old-key",)) as closed:
        key = closed.tenant("search")
        for path in (LORA, "/v1/unload_lora_adapter", "/reset_prefix_cache", "/collective_rpc"):
            refused = closed.ask(key, path)
            assert (refused.status_code, error_code(refused)) == (403, "operators_only")
            assert [closed.ask(each, path).status_code for each in (OPERATOR_KEY, "the-old-key")] == [200, 200]


def test_the_log_names_the_tenant_and_never_the_key(home: House) -> None:
    with captured_logs() as log:
        key = home.tenant("search")
        home.ask(key, body={"cache_salt": "x"})
        home.ask("tg-wrong")
        deadline_s = time.monotonic() + 5
        while len(lines := access_lines(log)) < 4:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert [line.get("tenant") for line in lines] == ["operator", "operator", "search", None]
    assert [event["tenant"] for event in log.events if event["event"] == "refused"] == ["search"]
    assert all(secret not in log.text for secret in (key, key[3:], "tg-wrong", OPERATOR_KEY))


def access_lines(log: CapturedLogs) -> list[dict[str, Any]]:
    return [event for event in log.events if event["logger"] == "server.access"]
