import pytest
from starlette.requests import Request

from server.api.auth import end_user
from server.policy.tenants import Tenant

TRUSTED = Tenant("ui", trusted=True)


def request(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def test_only_a_trusted_tenant_names_its_end_users() -> None:
    named = request(x_openwebui_user_id="u-1")
    assert end_user(named, TRUSTED) == "u-1"
    assert end_user(named, Tenant("ui")) is None


@pytest.mark.parametrize(
    ("headers", "user"),
    [
        ({}, None),
        ({"x_openwebui_user_id": " "}, None),
        ({"x_openwebui_user_id": "u-1", "x_openwebui_user_email": "a@b.c"}, "u-1"),
        ({"x_openwebui_user_email": "a@b.c", "x_openwebui_user_name": "Ann"}, "a@b.c"),
        ({"x_openwebui_user_name": "Ann", "x_openwebui_user_role": "admin"}, "Ann"),
        ({"x_openwebui_user_role": "admin"}, None),
    ],
)
def test_the_surest_name_that_is_there_counts(headers: dict[str, str], user: str | None) -> None:
    assert end_user(request(**headers), TRUSTED) == user


def test_a_name_that_is_not_plain_is_replaced_by_a_digest_of_its_own() -> None:
    names = [end_user(request(x_openwebui_user_name=name), TRUSTED) for name in ("Ann B", "Ann C", "{x}", "y" * 500)]
    assert len(set(names)) == 4
    assert all(name is not None and len(name) == 32 and name.isalnum() for name in names)
