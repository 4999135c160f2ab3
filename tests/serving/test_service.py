import json
from typing import Any

import pytest

from server.engine.calls import Call, Reply
from server.policy.bodies import MaxTokensDefaults
from server.policy.forecast import Rates
from server.policy.refusals import ClosedField, NotReady, Overloaded, Unsupported
from server.policy.reservations import Ask, Capacity
from server.policy.tenants import ANYONE, Tenant
from server.policy.terms import Terms
from server.serving.engine_slot import EngineSlot
from server.serving.queue import Gate
from server.serving.requests import OpenRequest, OpenRequests
from server.serving.service import BodyRules, Service
from tests.serving.fake_stack import FakeStack, Operation, RecordingOperation, new_gate, new_service, slot_with

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "look"}}
MESSAGES = [{"role": "user", "content": "Hello"}]
TITLE_TASK = [{"role": "user", "content": "### Task:\nGive this chat a title."}]


def service(
    operation: Operation,
    route: str = CHAT,
    *,
    opened: frozenset[str] = frozenset(),
    chat_cap: int | None = None,
    task_cap: int | None = 2048,
    uses_tools: bool = True,
    gate: Gate | None = None,
) -> Service:
    stack = FakeStack({("POST", route): operation}, uses_tools=uses_tools)
    rules = BodyRules(opened, MaxTokensDefaults(chat_cap, task_cap))
    return new_service(slot_with(stack), OpenRequests(), rules, gate)


def request(route: str = CHAT) -> OpenRequest:
    return OpenRequest(request_id="id-1", path=route)


async def ruled(body: dict[str, Any], route: str = CHAT, **settings: Any) -> dict[str, Any]:
    """The body that reaches the operation."""
    operation = RecordingOperation()
    await service(operation, route, **settings).answer(Call("POST", route, body=body), request(route))
    seen = operation.calls[0].body
    assert seen is not None
    return seen


async def test_an_ordinary_body_reaches_the_operation_unchanged() -> None:
    body = {"messages": MESSAGES, "tools": [TOOL], "temperature": 0}
    assert await ruled(body) == body


async def test_a_call_without_a_body_has_none_at_the_operation() -> None:
    operation = RecordingOperation()
    stack = FakeStack({("GET", "/v1/models"): operation})
    nobody = new_service(slot_with(stack), OpenRequests())
    await nobody.answer(Call("GET", "/v1/models"), request())
    assert operation.calls[0].body is None


@pytest.mark.parametrize("field", ["kv_transfer_params", "cache_salt", "stream_interval", "vllm_xargs"])
async def test_a_closed_field_is_refused_by_name_before_the_operation_runs(field: str) -> None:
    operation = RecordingOperation()
    with pytest.raises(ClosedField) as refused:
        await service(operation).answer(Call("POST", CHAT, body={field: "x"}), request())
    assert refused.value.param == field
    assert operation.calls == []


async def test_a_field_that_the_operator_opened_is_passed_on() -> None:
    assert await ruled({"cache_salt": "x"}, opened=frozenset({"cache_salt"})) == {"cache_salt": "x"}


async def headers_at_the_operation(
    given: tuple[tuple[bytes, bytes], ...], opened: frozenset[str]
) -> list[tuple[bytes, bytes]]:
    operation = RecordingOperation()
    await service(operation, opened=opened).answer(Call("POST", CHAT, headers=given, body={}), request())
    return list(operation.calls[0].headers)


async def test_closed_headers_are_dropped_and_the_others_kept() -> None:
    kept = (b"user-agent", b"test")
    closed = ((b"x-vllm-priority", b"-1"), (b"x-data-parallel-rank", b"1"), (b"x-session-id", b"s"))
    own = (b"x-request-id", b"id-1")
    assert await headers_at_the_operation((kept, *closed), frozenset()) == [kept, own]
    assert await headers_at_the_operation((kept, *closed), frozenset({"headers"})) == [kept, *closed, own]


async def test_the_request_id_in_the_logs_replaces_the_clients_own() -> None:
    given = ((b"x-request-id", b"not sane"),)
    assert await headers_at_the_operation(given, frozenset()) == [(b"x-request-id", b"id-1")]


@pytest.mark.parametrize(("route", "field"), [(CHAT, "max_completion_tokens"), ("/v1/responses", "max_output_tokens")])
async def test_an_open_cap_gets_the_operators_default(route: str, field: str) -> None:
    assert (await ruled({"messages": MESSAGES}, route, chat_cap=100))[field] == 100


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/messages", "/v1/embeddings"])
async def test_routes_with_a_default_of_their_own_get_no_cap(route: str) -> None:
    assert await ruled({"messages": MESSAGES}, route, chat_cap=100) == {"messages": MESSAGES}


async def test_a_chat_interfaces_own_task_gets_its_own_cap() -> None:
    assert (await ruled({"messages": TITLE_TASK}, chat_cap=100))["max_completion_tokens"] == 2048
    assert (await ruled({"messages": TITLE_TASK}, task_cap=64))["max_completion_tokens"] == 64


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_a_cap_that_the_client_names_stays(field: str) -> None:
    body = {"messages": TITLE_TASK, field: 5}
    assert await ruled(body, chat_cap=100) == body


async def test_a_cap_that_no_window_could_hold_is_lowered_and_remembered() -> None:
    operation, opened = RecordingOperation(), request()
    await service(operation).answer(Call("POST", CHAT, body={"max_tokens": 9000}), opened)
    assert operation.calls[0].body == {"max_tokens": 4096}
    assert opened.asked_max_tokens == 9000


@pytest.mark.parametrize("route", [CHAT, f"{CHAT}/batch", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
async def test_tools_are_left_out_and_counted_when_the_model_cannot_show_them(route: str) -> None:
    operation, opened = RecordingOperation(), request(route)
    body = {"messages": MESSAGES, "tools": [TOOL, TOOL], "tool_choice": "auto", "parallel_tool_calls": True}
    asked = service(operation, route, uses_tools=False)
    await asked.answer(Call("POST", route, body=body), opened)
    assert operation.calls[0].body == {"messages": MESSAGES}
    assert opened.headers == {"x-tools-ignored": "2"}


@pytest.mark.parametrize("uses_tools", [False, True])
async def test_a_forced_call_keeps_its_tools_whatever_the_model_can_show_and_makes_them_strict(
    uses_tools: bool,
) -> None:
    operation, opened = RecordingOperation(), request()
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"}
    await service(operation, uses_tools=uses_tools).answer(Call("POST", CHAT, body=body), opened)
    strict = {"type": "function", "function": {"name": "look", "strict": True}}
    assert operation.calls[0].body == {**body, "tools": [strict]}
    assert opened.headers == {}


async def test_a_model_without_tools_that_is_sent_none_has_nothing_to_say_about_them() -> None:
    operation, opened = RecordingOperation(), request()
    await service(operation, uses_tools=False).answer(Call("POST", CHAT, body={"messages": MESSAGES}), opened)
    assert opened.headers == {}


async def test_tools_stay_on_routes_where_they_mean_something_else() -> None:
    body = {"tools": [TOOL]}
    assert await ruled(body, "/tokenize", uses_tools=False) == body


async def test_the_clients_body_is_not_changed_in_place() -> None:
    body = {"messages": TITLE_TASK, "tools": [TOOL], "tool_choice": "required"}
    before = json.dumps(body)
    await ruled(body)
    assert json.dumps(body) == before


async def test_an_operation_that_the_model_lacks_is_refused_with_model_and_route() -> None:
    with pytest.raises(Unsupported, match=r"`a-model` does not support POST /v1/embeddings"):
        await service(RecordingOperation()).answer(Call("POST", "/v1/embeddings", body={}), request())


async def test_an_empty_slot_refuses_with_its_stage_and_a_time_to_come_back() -> None:
    slot = EngineSlot()
    slot.enter("loading the model")
    loading = new_service(slot, OpenRequests())
    with pytest.raises(NotReady, match="loading the model") as refused:
        await loading.answer(Call("POST", CHAT, body={}), request())
    assert refused.value.retry_after_s is not None
    assert (loading.ready, loading.stage) == (False, "loading the model")


async def test_a_service_is_ready_while_its_engine_lives_and_no_drain_has_begun() -> None:
    asked = service(RecordingOperation())
    assert (asked.ready, asked.stage) == (True, "ready")
    await asked.requests.drain(0)
    assert (asked.ready, asked.stage) == (False, "draining")


async def test_a_dead_engine_is_not_ready() -> None:
    stack = FakeStack({}, alive=False)
    assert not new_service(slot_with(stack), OpenRequests()).ready


async def test_an_emptied_slot_gives_its_stack_back_and_refuses_from_then_on() -> None:
    slot = slot_with(FakeStack({}))
    stack = slot.stack
    assert slot.empty("engine ended") is stack
    assert not slot.ready
    with pytest.raises(NotReady, match="engine ended"):
        _ = slot.stack


async def test_the_model_cards_are_those_of_the_models_operation() -> None:
    async def models(call: Call) -> Reply:
        assert (call.method, call.route) == ("GET", "/v1/models")
        return Reply(b'{"data": [{"id": "a-model"}]}', "application/json")

    stack = FakeStack({("GET", "/v1/models"): models})
    listed = new_service(slot_with(stack), OpenRequests())
    assert await listed.model_cards(ANYONE) == [{"id": "a-model"}]


async def test_a_request_is_put_on_the_terms_that_it_and_its_tenant_have() -> None:
    operation, opened = RecordingOperation(), request()
    opened.tenant = Tenant("search", "critical")
    headers = ((b"x-request-timeout", b"2.5"),)
    body = {"messages": MESSAGES, "service_tier": "default", "priority": 3}
    await service(operation).answer(Call("POST", CHAT, headers=headers, body=body), opened)
    assert opened.terms == Terms("default", 2.5, 3)
    assert opened.arrived_s is not None


async def test_what_would_wait_too_long_is_refused_before_the_operation_is_asked() -> None:
    operation, opened = RecordingOperation(), request()
    gate = new_gate()
    gate.open(Capacity(1000, 16, 1), None)
    gate.admission.rush("anyone", Terms(), Ask(10, 10), gate.clock())
    gate.admission.rates = Rates(residence_s=1000.0, ended=100)
    busy = service(operation, gate=gate)
    with pytest.raises(Overloaded) as refused:
        await busy.answer(Call("POST", CHAT, body={"messages": MESSAGES}), opened)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1000
    assert operation.calls == []


async def test_counting_tokens_is_no_work_for_the_engine_and_passes_a_full_server() -> None:
    operation = RecordingOperation()
    gate = new_gate()
    gate.open(Capacity(1000, 16, 1), None)
    gate.admission.rush("anyone", Terms(), Ask(10, 10), gate.clock())
    gate.admission.rates = Rates(residence_s=1000.0, ended=100)
    busy = service(operation, "/tokenize", gate=gate)
    await busy.answer(Call("POST", "/tokenize", body={"prompt": "x"}), request("/tokenize"))
    assert len(operation.calls) == 1
