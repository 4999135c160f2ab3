"""The operator API, over HTTP, with a real Redis."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.store.keys import digest
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack

TENANTS = "/admin/tenants"
NO_LIMITS = {"requests_per_minute": None, "tokens_per_minute": None, "tokens_per_day": None, "concurrency": None}


@pytest.fixture
def admin(store_url: str) -> Iterator[httpx.Client]:
    with running(FakeStack({}), redis_url=store_url) as client:
        client.headers["authorization"] = f"Bearer {OPERATOR_KEY}"
        yield client


@pytest.fixture
def declared(tmp_path: Path) -> Iterator[httpx.Client]:
    file = tmp_path / "tenants.toml"
    file.write_text(f'[tenants.fixed]\nclass = "batch"\nkeys = [{{ sha256 = "{digest("x")}" }}]')
    with running(FakeStack({}), tenants_file=file) as client:
        client.headers["authorization"] = f"Bearer {OPERATOR_KEY}"
        yield client


def refusal(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert error["message"].endswith(".")
    return answer.status_code, error["code"], error["param"]


def test_a_tenant_is_made_shown_changed_and_forgotten(admin: httpx.Client) -> None:
    body = {"name": "search", "class": "critical", "limits": {"requests_per_minute": 60}, "models": ["b", "a"]}
    made = admin.post(TENANTS, json=body)
    shown = {
        "object": "tenant",
        "name": "search",
        "class": "critical",
        "limits": {**NO_LIMITS, "requests_per_minute": 60},
        "models": ["a", "b"],
        "trusted": False,
        "end_user_limits": None,
        "source": "redis",
        "keys": [],
    }
    assert (made.status_code, made.json()) == (201, shown)
    assert admin.get(f"{TENANTS}/search").json() == shown
    assert admin.get(TENANTS).json() == {"object": "list", "data": [shown]}
    changed = admin.patch(f"{TENANTS}/search", json={"limits": {"tokens_per_day": 5}, "models": None})
    limits = {**NO_LIMITS, "requests_per_minute": 60, "tokens_per_day": 5}
    assert changed.json() == {**shown, "limits": limits, "models": None}
    assert admin.delete(f"{TENANTS}/search").json() == {"object": "tenant.deleted", "name": "search", "deleted": True}
    assert refusal(admin.get(f"{TENANTS}/search")) == (404, "not_found", None)


@pytest.mark.parametrize(
    ("changes", "limits", "end_user_limits"),
    [
        ({"limits": {"requests_per_minute": None}}, {"concurrency": 2}, {"concurrency": 1}),
        ({"limits": {"concurrency": 3}}, {"requests_per_minute": 60, "concurrency": 3}, {"concurrency": 1}),
        ({"limits": None}, {}, {"concurrency": 1}),
        ({"end_user_limits": {"tokens_per_day": 9}}, None, {"concurrency": 1, "tokens_per_day": 9}),
        ({"end_user_limits": None}, None, None),
        ({"trusted": False}, None, None),
        ({}, None, {"concurrency": 1}),
    ],
)
def test_a_change_touches_what_it_names(
    admin: httpx.Client,
    changes: dict[str, Any],
    limits: dict[str, int] | None,
    end_user_limits: dict[str, int] | None,
) -> None:
    given = {"requests_per_minute": 60, "concurrency": 2}
    admin.post(TENANTS, json={"name": "ui", "limits": given, "trusted": True, "end_user_limits": {"concurrency": 1}})
    after = admin.patch(f"{TENANTS}/ui", json=changes).json()
    assert after["limits"] == NO_LIMITS | (given if limits is None else limits)
    assert after["end_user_limits"] == (None if end_user_limits is None else NO_LIMITS | end_user_limits)


def test_a_key_is_shown_once(admin: httpx.Client) -> None:
    admin.post(TENANTS, json={"name": "search"})
    made = admin.post(f"{TENANTS}/search/keys", json={"expires_in_s": 60})
    body = made.json()
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    assert body["key"].startswith("tg-")
    assert body["id"] == digest(body["key"])[:16]
    assert body["expires_at"] - body["created_at"] == 60
    assert abs(body["created_at"] - time.time()) < 60
    listed = admin.get(TENANTS)
    assert [key["id"] for key in listed.json()["data"][0]["keys"]] == [body["id"]]
    assert body["key"] not in listed.text
    assert digest(body["key"]) not in listed.text


def test_one_key_or_all_of_a_tenant_are_revoked(admin: httpx.Client) -> None:
    admin.post(TENANTS, json={"name": "search"})
    ids = [admin.post(f"{TENANTS}/search/keys").json()["id"] for _ in range(3)]
    assert admin.delete(f"{TENANTS}/search/keys/{ids[0]}").json()["ids"] == ids[:1]
    assert refusal(admin.delete(f"{TENANTS}/search/keys/{ids[0]}")) == (404, "not_found", None)
    assert sorted(admin.delete(f"{TENANTS}/search/keys").json()["ids"]) == sorted(ids[1:])
    assert admin.delete(f"{TENANTS}/search/keys").json()["ids"] == []


def test_a_rotation_ends_the_old_keys_at_once_or_after_a_while(admin: httpx.Client) -> None:
    admin.post(TENANTS, json={"name": "search"})
    first = admin.post(f"{TENANTS}/search/keys").json()["id"]
    second = admin.post(f"{TENANTS}/search/rotate", json={}).json()["id"]
    assert [key["id"] for key in admin.get(f"{TENANTS}/search").json()["keys"]] == [second]
    third = admin.post(f"{TENANTS}/search/rotate", json={"grace_s": 100}).json()["id"]
    keys = {key["id"]: key for key in admin.get(f"{TENANTS}/search").json()["keys"]}
    assert set(keys) == {second, third}
    assert first not in keys
    assert keys[third]["expires_at"] is None
    assert abs(keys[second]["expires_at"] - time.time() - 100) < 30


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a b"}, "name"),
        ({"name": "operator"}, "name"),
        ({}, "name"),
        ({"name": "a", "class": "best"}, "class"),
        ({"name": "a", "rpm": 5}, "rpm"),
        ({"name": "a", "limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"name": "a", "limits": {"tokens_per_minute": -5}}, "limits.tokens_per_minute"),
        ({"name": "a", "limits": {"tokens_per_day": 1.5}}, "limits.tokens_per_day"),
        ({"name": "a", "limits": {"concurrency": "5"}}, "limits.concurrency"),
        ({"name": "a", "limits": {"concurrency": 10**13}}, "limits.concurrency"),
        ({"name": "a", "limits": {"rpm": 5}}, "limits.rpm"),
        ({"name": "a", "models": []}, "models"),
        ({"name": "a", "models": [""]}, "models.0"),
        ({"name": "a", "end_user_limits": {"concurrency": 1}}, None),
        ({"name": "a", "trusted": "yes"}, "trusted"),
    ],
)
def test_what_cannot_be_a_tenant_is_refused_with_a_sentence(
    admin: httpx.Client, body: dict[str, Any], param: str | None
) -> None:
    assert refusal(admin.post(TENANTS, json=body)) == (400, None, param)
    assert admin.get(TENANTS).json()["data"] == []


@pytest.mark.parametrize("changes", [{"limits": {"concurrency": 0}}, {"limits": 5}, {"clas": "batch"}, {"name": "b"}])
def test_a_change_that_cannot_be_is_refused_and_nothing_changes(admin: httpx.Client, changes: dict[str, Any]) -> None:
    before = admin.post(TENANTS, json={"name": "a", "limits": {"concurrency": 1}}).json()
    assert admin.patch(f"{TENANTS}/a", json=changes).status_code == 400
    assert admin.get(f"{TENANTS}/a").json() == before


@pytest.mark.parametrize("body", [{"expires_in_s": 0}, {"expires_in_s": -1}, {"expires_in_s": "soon"}, {"ttl": 5}])
def test_a_key_that_cannot_be_is_refused(admin: httpx.Client, body: dict[str, Any]) -> None:
    admin.post(TENANTS, json={"name": "a"})
    assert admin.post(f"{TENANTS}/a/keys", json=body).status_code == 400
    assert admin.get(f"{TENANTS}/a").json()["keys"] == []


def test_a_name_that_is_taken_is_a_conflict(admin: httpx.Client) -> None:
    admin.post(TENANTS, json={"name": "a"})
    assert refusal(admin.post(TENANTS, json={"name": "a"})) == (409, "conflict", "name")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/keys"), ("DELETE", "/keys"), ("DELETE", "/keys/x"),
        ("POST", "/rotate"),
    ],
)  # fmt: skip
def test_a_tenant_that_is_not_there_is_not_found(admin: httpx.Client, method: str, path: str) -> None:
    assert refusal(admin.request(method, f"{TENANTS}/nobody{path}")) == (404, "not_found", None)


@pytest.mark.parametrize("key", ["wrong-operator-key", "", OPERATOR_KEY[:-1]])
def test_without_the_operator_key_nothing_is_shown_or_done(admin: httpx.Client, key: str) -> None:
    admin.post(TENANTS, json={"name": "a"})
    team = admin.post(f"{TENANTS}/a/keys").json()["key"]
    for tried in (key, team):
        headers = {"authorization": f"Bearer {tried}".strip()}
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/a"), ("POST", "/a/rotate"), ("POST", "/a/keys")):
            assert admin.request(method, f"{TENANTS}{path}", headers=headers).status_code == 401
    assert len(admin.get(TENANTS).json()["data"]) == 1


def test_tenants_of_the_file_are_shown_and_change_there_only(declared: httpx.Client) -> None:
    entry = declared.get(f"{TENANTS}/fixed").json()
    assert (entry["source"], entry["class"]) == ("file", "batch")
    for method, path in (
        ("PATCH", ""), ("DELETE", ""), ("POST", "/keys"), ("DELETE", "/keys"), ("POST", "/rotate"),
    ):  # fmt: skip
        answer = declared.request(method, f"{TENANTS}/fixed{path}")
        assert refusal(answer) == (409, "conflict", "name")
        assert "tenants file" in answer.text
    assert refusal(declared.post(TENANTS, json={"name": "fixed"})) == (409, "conflict", "name")


def test_a_redis_that_does_not_answer_is_said_with_a_time_to_come_back() -> None:
    with running(FakeStack({}), redis_url="redis://127.0.0.1:1") as client:
        answer = client.get(TENANTS, headers={"authorization": f"Bearer {OPERATOR_KEY}"})
    assert refusal(answer) == (503, "store_unavailable", None)
    assert answer.headers["retry-after"] == "2"


def test_a_body_that_is_no_json_or_too_large_is_refused(admin: httpx.Client) -> None:
    assert admin.post(TENANTS, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert admin.post(TENANTS, content=b"[]", headers={"content-type": "application/json"}).status_code == 400
    huge = admin.post(TENANTS, content=b" " * (1 << 20), headers={"content-type": "application/json"})
    assert huge.status_code == 413


def test_the_operators_routes_are_in_the_docs_with_their_bodies() -> None:
    with running() as client:
        paths = client.get("/openapi.json").json()["paths"]
    schema = paths[TENANTS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"name", "class", "limits", "models"} <= set(schema["properties"])
    assert "$ref" not in str(schema)
