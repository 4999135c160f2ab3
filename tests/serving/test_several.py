import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.engine.calls import Call, Reply
from server.policy.refusals import ContextLengthExceeded, InvalidRequest, Overloaded, Refusal
from server.serving.requests import OpenRequest, OpenRequests
from tests.serving.fake_stack import FakeStack, new_service, slot_with

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions/batch"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}


@dataclass(slots=True)
class Completions:
    """Like vLLM's: a call is refused as a whole when one of its prompts is bad."""

    refusals: dict[str, Refusal] = field(default_factory=dict)
    calls: list[list[Any]] = field(default_factory=list)

    async def __call__(self, call: Call) -> Reply:
        assert call.body is not None
        chat = call.route == CHATS
        prompts = call.body["messages" if chat else "prompt"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        self.calls.append(prompts)
        await asyncio.sleep(0)
        for prompt in prompts:
            if (refusal := self.refusals.get(json.dumps(prompt))) is not None:
                raise refusal
        n = call.body.get("n") or 1
        said = [f"{json.dumps(prompt)}{i}" for prompt in prompts for i in range(n)]
        choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(said)]
        return Reply(json.dumps({"id": "cmpl-1", "choices": choices, "usage": USAGE}).encode(), "application/json")


def bad(prompt: Any, refusal: Refusal | None = None) -> dict[str, Refusal]:
    return {json.dumps(prompt): refusal or ContextLengthExceeded("Too long.")}


async def answered(operation: Completions, body: dict[str, Any], route: str = COMPLETIONS) -> dict[str, Any]:
    service = new_service(slot_with(FakeStack({("POST", route): operation})), OpenRequests())
    reply = await service.answer(Call("POST", route, body=body), OpenRequest("id-1", route))
    assert isinstance(reply, Reply)
    whole: dict[str, Any] = json.loads(reply.body)
    return whole


async def test_good_prompts_are_one_call() -> None:
    operation = Completions()
    answer = await answered(operation, {"prompt": ["a", "b"]})
    assert operation.calls == [["a", "b"]]
    assert len(answer["choices"]) == 2


async def test_one_bad_prompt_has_its_error_where_its_answer_would_be() -> None:
    answer = await answered(Completions(bad("b")), {"prompt": ["a", "b", "c"]})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "error", "stop"]
    assert [choice["text"] for choice in answer["choices"]] == ['"a"0', "", '"c"0']
    assert answer["choices"][1]["error"]["message"] == "Too long."
    assert answer["id"] == "cmpl-1"


async def test_usage_is_that_of_all_who_were_answered() -> None:
    answer = await answered(Completions(bad("b")), {"prompt": ["a", "b", "c"]})
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_several_choices_for_each_prompt_keep_their_places() -> None:
    answer = await answered(Completions(bad("b")), {"prompt": ["a", "b", "c"], "n": 2})
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["finish_reason"] == "error" for choice in answer["choices"]] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


async def test_prompts_of_tokens_are_parted_and_one_prompt_of_tokens_is_not() -> None:
    operation = Completions(bad([3, 4]))
    answer = await answered(operation, {"prompt": [[1, 2], [3, 4]]})
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "error"]
    operation = Completions(bad(7))
    with pytest.raises(ContextLengthExceeded):
        await answered(operation, {"prompt": [7, 8]})
    assert len(operation.calls) == 1


async def test_a_bad_conversation_of_a_batch_call_spoils_no_other() -> None:
    chats = [[{"role": "user", "content": text}] for text in ("a", "b")]
    answer = await answered(Completions(bad(chats[0])), {"messages": chats}, CHATS)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["error", "stop"]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": None}


async def test_a_call_whose_prompts_are_all_bad_is_refused_as_before() -> None:
    with pytest.raises(ContextLengthExceeded):
        await answered(Completions(bad("a") | bad("b")), {"prompt": ["a", "b"]})


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"prompt": ["a"]}, {"prompt": ["a", "b"], "stream": True}])
async def test_what_cannot_be_parted_is_refused_as_before(body: dict[str, Any]) -> None:
    operation = Completions(bad("a"))
    with pytest.raises(ContextLengthExceeded):
        await answered(operation, body)
    assert len(operation.calls) == 1


async def test_a_server_that_is_too_busy_for_one_part_refuses_the_call_to_be_tried_again() -> None:
    operation = Completions(bad("a", InvalidRequest("Bad.")) | bad("b", Overloaded("Busy.")))
    request = OpenRequest("id-1", COMPLETIONS)
    service = new_service(slot_with(FakeStack({("POST", COMPLETIONS): operation})), OpenRequests())
    with pytest.raises(Overloaded):
        await service.answer(Call("POST", COMPLETIONS, body={"prompt": ["a", "b", "c"]}), request)
    assert isinstance(request.refusal, Overloaded)
