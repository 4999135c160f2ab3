"""What every HTTP exchange gets, seen by a client of the real application."""

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from server.api.routes import DEVELOPER_ROUTES, OPERATION_ROUTES, Route
from server.engine.calls import Call, Reply
from tests.api.running_application import running
from tests.serving.fake_stack import DONE_FRAME, FakeStack, RecordingOperation, StreamingOperation
from tests.telemetry.captured_logs import CapturedLogs, captured_logs

CHAT = "/v1/chat/completions"
KEYS = ("first-key", "second-key")
OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping", "/version", "/load", "/metrics")
TIMEOUT_S = 10.0


async def models(_: Call) -> Reply:
    return Reply(b'{"data": [{"id": "a-model"}, {"id": "team/adapter"}]}', "application/json")


def stack(chat: RecordingOperation | StreamingOperation) -> FakeStack:
    return FakeStack({("POST", CHAT): chat, ("GET", "/v1/models"): models})


def eventually(holds: Callable[[], bool]) -> bool:
    """What the server does after its answer is sent takes a moment."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return holds()


def call(client: httpx.Client, route: Route, **headers: str) -> httpx.Response:
    path = route.path.replace("{response_id}", "resp_1")
    return client.request(route.method, path, headers=headers)


@pytest.fixture(autouse=True)
def log() -> Iterator[CapturedLogs]:
    with captured_logs() as captured:
        yield captured


@pytest.fixture
def chat() -> RecordingOperation:
    return RecordingOperation()


@pytest.fixture
def loading() -> Iterator[httpx.Client]:
    with running() as client:
        yield client


@pytest.fixture
def ready(chat: RecordingOperation) -> Iterator[httpx.Client]:
    with running(stack(chat)) as client:
        yield client


@pytest.fixture
def locked(chat: RecordingOperation) -> Iterator[httpx.Client]:
    with running(stack(chat), api_key=KEYS, developer_routes=True, failed_logins_per_minute=1000) as client:
        yield client


def test_a_loading_server_is_live_and_says_what_it_does(loading: httpx.Client) -> None:
    assert loading.get("/health/live").json() == {"status": "live"}
    for path in ("/health", "/health/ready", "/ping"):
        answer = loading.get(path)
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "stage": "loading the model"})
    assert loading.post("/ping").status_code == 503


def test_a_loading_server_refuses_calls_with_a_time_to_come_back(loading: httpx.Client) -> None:
    answer = loading.post(CHAT, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    assert loading.get("/v1/models/a-model").headers["retry-after"] == answer.headers["retry-after"]


def test_a_server_with_an_engine_is_ready(ready: httpx.Client) -> None:
    for path in ("/health", "/health/ready", "/ping"):
        assert (ready.get(path).status_code, ready.get(path).json()) == (200, {"status": "ready", "limits": "redis"})


def test_the_version_has_vllms_and_ours(loading: httpx.Client) -> None:
    assert loading.get("/version").json() == {"version": "0.32.0", "tidegate": "1.2.3"}


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/nowhere"), ("POST", "/"), ("POST", "/collective_rpc")])
def test_an_unknown_route_is_not_found_in_openais_shape(loading: httpx.Client, method: str, path: str) -> None:
    answer = loading.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "not_found")
    assert f"{method} {path}" in error["message"]


def test_a_wrong_method_is_told_in_openais_shape(loading: httpx.Client) -> None:
    answer = loading.get(CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("POST", "/v1/messages/x", 404, "not_found_error"), ("GET", "/v1/messages", 405, "invalid_request_error")],
)
def test_under_messages_the_shape_is_anthropics(
    loading: httpx.Client, method: str, path: str, status: int, kind: str
) -> None:
    answer = loading.request(method, path)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)


def test_a_model_is_found_by_its_name_with_or_without_slashes(ready: httpx.Client) -> None:
    assert ready.get("/v1/models/a-model").json() == {"id": "a-model"}
    assert ready.get("/v1/models/team/adapter").json() == {"id": "team/adapter"}


def test_a_model_that_is_not_served_is_answered_with_those_that_are(ready: httpx.Client) -> None:
    answer = ready.get("/v1/models/gpt-4")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "a-model, team/adapter" in error["message"]


def test_an_operation_that_the_model_lacks_is_unsupported(ready: httpx.Client) -> None:
    answer = ready.post("/v1/embeddings", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported_endpoint")


def test_an_error_in_a_route_of_our_own_gives_nothing_away(log: CapturedLogs) -> None:
    async def broken(_: Call) -> Reply:
        raise ZeroDivisionError("the secret")

    with running(FakeStack({("GET", "/v1/models"): broken})) as client:
        answer = client.get("/v1/models/a-model")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "the secret" in log.text


@pytest.mark.parametrize("key", [None, "wrong", "", KEYS[0][:-1]])
def test_every_route_that_reaches_the_engine_wants_a_key(locked: httpx.Client, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}".strip()}
    for route in (*OPERATION_ROUTES, *DEVELOPER_ROUTES, Route("GET", "/v1/models/a-model")):
        answer = call(locked, route, **headers)
        body = answer.json()
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), route
        if route.dialect == "anthropic":
            assert (body["type"], body["error"]["type"]) == ("error", "authentication_error"), route
        else:
            assert body["error"]["code"] == "invalid_api_key", route


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEYS[0]}"},
        {"authorization": f"bearer  {KEYS[1]}"},
        {"x-api-key": KEYS[1]},
        {"authorization": "Basic dTpw", "x-api-key": KEYS[0]},
    ],
)
def test_any_of_the_keys_opens_in_either_header(locked: httpx.Client, headers: dict[str, str]) -> None:
    assert locked.post(CHAT, json={}, headers=headers).status_code == 200


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_health_metrics_and_version_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_without_configured_keys_the_server_is_open(ready: httpx.Client) -> None:
    assert ready.post(CHAT, json={}, headers={"authorization": "Bearer anything"}).status_code == 200


def test_a_request_without_a_key_is_refused_before_its_body_is_looked_at(locked: httpx.Client) -> None:
    assert locked.post(CHAT, content=b"not json").status_code == 401


@pytest.mark.parametrize("given", ["my-id_1.2:3", "x" * 128])
def test_a_clients_own_request_id_is_taken_and_returned(
    ready: httpx.Client, chat: RecordingOperation, given: str
) -> None:
    answer = ready.post(CHAT, json={}, headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]
    assert (b"x-request-id", given.encode()) in chat.calls[0].headers


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a/b", "é"])
def test_a_request_id_that_is_not_safe_to_log_is_replaced(ready: httpx.Client, given: str) -> None:
    answer = ready.post(CHAT, json={}, headers={b"x-request-id": given.encode()})
    returned = answer.headers["x-request-id"]
    assert returned != given
    assert len(returned) == 32


@pytest.mark.parametrize("path", ["/health/live", "/nowhere", "/v1/responses/x", CHAT])
def test_every_answer_has_a_request_id_of_its_own(locked: httpx.Client, path: str) -> None:
    first, second = locked.get(path), locked.get(path)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    return client.options(CHAT, headers={"origin": origin, "access-control-request-method": "POST"})


def test_a_browser_may_call_from_an_allowed_origin_and_from_no_other() -> None:
    with running(allowed_origins=("https://ui.example",), api_key=KEYS) as client:
        allowed = preflight(client, "https://ui.example")
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://ui.example")
        assert "access-control-allow-origin" not in preflight(client, "https://other.example").headers
        refused = client.post(CHAT, headers={"origin": "https://ui.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://ui.example")


def test_without_allowed_origins_a_preflight_is_a_wrong_method(loading: httpx.Client) -> None:
    answer = preflight(loading, "https://ui.example")
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_cap_is_refused(chat: RecordingOperation, chunked: bool) -> None:
    too_long = b'{"a": "' + b"x" * 1024 + b'"}'
    with running(stack(chat), max_body_mib=1 / 1024) as client:
        content = iter([too_long[:100], too_long[100:]]) if chunked else too_long
        answer = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert ("content-length" in answer.request.headers) == (not chunked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert chat.calls == []


@pytest.mark.parametrize("opened", [False, True])
def test_closed_headers_reach_the_engine_only_if_the_operator_opened_them(
    chat: RecordingOperation, opened: bool
) -> None:
    with running(stack(chat), allow_client_field=("headers",) if opened else ()) as client:
        client.post(CHAT, json={}, headers={"X-Vllm-Priority": "-1", "X-Session-ID": "s", "X-Mine": "1"})
    seen = {name for name, _ in chat.calls[0].headers}
    assert b"x-mine" in seen
    assert ({b"x-vllm-priority", b"x-session-id"} <= seen) == opened
    assert ({b"x-vllm-priority", b"x-session-id"} & seen == set()) == (not opened)


@pytest.mark.parametrize(("docs", "status"), [(True, 200), (False, 404)])
def test_the_docs_can_be_switched_off(docs: bool, status: int) -> None:
    with running(docs=docs) as client:
        assert [client.get(path).status_code for path in ("/docs", "/openapi.json")] == [status, status]


def test_every_route_is_in_the_docs_under_its_own_path(loading: httpx.Client) -> None:
    paths = loading.get("/openapi.json").json()["paths"]
    assert {(route.method.lower(), route.path) for route in OPERATION_ROUTES} <= {
        (method, path) for path, methods in paths.items() for method in methods
    }


def test_the_metrics_count_requests_by_route_and_never_by_path(ready: httpx.Client) -> None:
    for path in ("/v1/responses/one", "/v1/responses/two", "/one", "/two"):
        ready.get(path)
    page = ready.get("/metrics")
    counted = 'tidegate_http_requests_total{method="GET",route="%s",status="404"} 2.0'
    assert counted % "/v1/responses/{response_id}" in page.text
    assert counted % "unknown" in page.text
    assert 'tidegate_http_request_duration_seconds_count{method="GET",route="unknown"} 2.0' in page.text
    assert "/one" not in page.text
    assert page.headers["content-type"].startswith("text/plain; version=")


def access_lines(log: CapturedLogs) -> list[dict[str, object]]:
    return [event for event in log.events if event["logger"] == "server.access"]


def test_the_access_log_has_a_line_for_each_request_with_its_id(ready: httpx.Client, log: CapturedLogs) -> None:
    ready.post(CHAT, json={}, headers={"x-request-id": "my-id"})
    assert eventually(lambda: len(access_lines(log)) == 1)
    line = access_lines(log)[0]
    assert {"request_id": "my-id", "method": "POST", "path": CHAT, "status": 200}.items() <= line.items()
    assert isinstance(line["duration_ms"], float)


def test_every_log_line_of_a_request_carries_its_id(ready: httpx.Client, log: CapturedLogs) -> None:
    ready.post(CHAT, json={"cache_salt": "x"}, headers={"x-request-id": "my-id"})
    assert eventually(lambda: len(access_lines(log)) == 1)
    refused = next(event for event in log.events if event["event"] == "refused")
    assert (refused["request_id"], refused["reason"]) == ("my-id", "ClosedField")


def test_probes_and_a_switched_off_access_log_leave_no_lines(log: CapturedLogs, chat: RecordingOperation) -> None:
    with running(stack(chat)) as client:
        for path in OPEN_PATHS[:4]:
            client.get(path)
    with running(stack(chat), access_log=False) as client:
        client.post(CHAT, json={})
    assert access_lines(log) == []


def test_a_stream_comes_over_the_wire_as_server_sent_events() -> None:
    operation = StreamingOperation()
    operation.say("one")
    operation.end()
    with running(stack(operation)) as client:
        answer = client.post(CHAT, json={})
    assert answer.text == f"data: one\n\n{DONE_FRAME}"
    assert answer.headers["content-type"] == "text/event-stream"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")


def test_a_client_that_leaves_its_stream_frees_it_and_is_logged_as_gone(log: CapturedLogs) -> None:
    operation = StreamingOperation()
    operation.say("one")
    with running(stack(operation)) as client:
        with client.stream("POST", CHAT, json={}) as answer:
            frames = answer.iter_text()
            assert next(frames) == "data: one\n\n"
            assert client.get("/load").json() == {"server_load": 1}
        assert eventually(lambda: client.get("/load").json() == {"server_load": 0})
        assert eventually(lambda: len(access_lines(log)) == 1)
        page = client.get("/metrics").text
    assert operation.freed == 1
    line = access_lines(log)[0]
    assert (line["status"], line["prompt_tokens"]) == (499, 7)
    assert f'tidegate_http_requests_total{{method="POST",route="{CHAT}",status="499"}} 1.0' in page
