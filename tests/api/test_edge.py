"""The guard of the edge, by client address."""

import pytest
from starlette.requests import Request

from server.api.edge import Edge, EdgeLimits, client_address
from server.policy.refusals import RateLimited
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack, RecordingOperation

pytestmark = pytest.mark.anyio

LIMITS = EdgeLimits(failed_logins=3, model_lists=2, operator_requests=4)


def request(address: str | None = "10.0.0.1", path: str = "/v1/models") -> Request:
    client = None if address is None else (address, 1)
    return Request({"type": "http", "method": "GET", "path": path, "headers": [], "client": client, "state": {}})


@pytest.fixture
def edge() -> Edge:
    return Edge(LIMITS)


def blocked(edge: Edge, key: str, address: str = "10.0.0.1") -> bool:
    try:
        edge.before_login(request(address), key)
    except RateLimited:
        return True
    return False


def test_an_address_that_fails_too_often_has_to_wait(edge: Edge) -> None:
    for _ in range(LIMITS.failed_logins):
        assert not blocked(edge, "wrong")
        edge.login_failed(request())
    with pytest.raises(RateLimited) as refused:
        edge.before_login(request(), "wrong")
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 60
    assert not blocked(edge, "wrong", "10.0.0.2")


def test_a_key_that_has_worked_from_there_goes_on_working(edge: Edge) -> None:
    edge.login_worked(request(), "right")
    for _ in range(LIMITS.failed_logins):
        edge.login_failed(request())
    assert not blocked(edge, "right")
    assert blocked(edge, "another right one")
    for _ in range(LIMITS.failed_logins):
        edge.login_failed(request("10.0.0.2"))
    assert blocked(edge, "right", "10.0.0.2")


async def test_each_guard_counts_for_itself(edge: Edge) -> None:
    for _ in range(LIMITS.model_lists):
        await edge.model_list(request())
    with pytest.raises(RateLimited, match="model lists"):
        await edge.model_list(request(path="/v1/models/a"))
    await edge.model_list(request("10.0.0.2"))
    for _ in range(LIMITS.operator_requests):
        await edge.operator_request(request())
    with pytest.raises(RateLimited, match="operator requests"):
        await edge.operator_request(request())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("", None, True),
        ("a-name", "b-name", False),
    ],
)
def test_one_client_is_one_address_or_one_ipv6_network(first: str, second: str | None, same: bool) -> None:
    assert (client_address(request(first)) == client_address(request(second))) == same


def test_failed_logins_end_in_a_429_in_our_shape_with_a_time_to_come_back() -> None:
    with running(FakeStack({}), api_key=("right-key",), failed_logins_per_minute=3) as client:
        statuses = [client.get("/v1/responses/x", headers={"x-api-key": "wrong"}) for _ in range(4)]
        without_key = client.get("/v1/responses/x")
    assert [answer.status_code for answer in statuses] == [401, 401, 401, 429]
    error = statuses[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(statuses[-1].headers["retry-after"]) <= 60
    assert without_key.status_code == 429


def test_asking_without_a_key_is_no_failed_login() -> None:
    with running(FakeStack({}), api_key=("right-key",), failed_logins_per_minute=1) as client:
        assert {client.get("/v1/responses/x").status_code for _ in range(5)} == {401}


def test_the_model_list_is_guarded_before_the_key_is_looked_at() -> None:
    stack = FakeStack({("GET", "/v1/models"): RecordingOperation()})
    with running(stack, api_key=("right-key",), model_lists_per_minute=2) as client:
        statuses = [client.get("/v1/models").status_code for _ in range(3)]
        one = client.get("/v1/models/a-model").status_code
    assert (statuses, one) == ([401, 401, 429], 429)


def test_the_operators_routes_are_guarded() -> None:
    with running(FakeStack({}), operator_requests_per_minute=2) as client:
        headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
        statuses = [client.get("/admin/tenants/x", headers=headers).status_code for _ in range(3)]
    assert statuses[-1] == 429
    assert 429 not in statuses[:2]


def test_behind_a_proxy_each_client_counts_for_itself() -> None:
    with running(FakeStack({}), api_key=("right-key",), failed_logins_per_minute=1) as client:

        def ask(address: str) -> int:
            headers = {"x-api-key": "wrong", "x-forwarded-for": address}
            return client.get("/v1/responses/x", headers=headers).status_code

        assert [ask("10.0.0.1"), ask("10.0.0.1"), ask("10.0.0.2")] == [401, 429, 401]
