"""Stored responses belong to whom they were made for."""

import asyncio
import inspect
import re
from contextvars import ContextVar
from typing import Any

import pytest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from server.engine.kept_responses import STORES, OwnStore, keep_apart

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

caller: ContextVar[str] = ContextVar("caller", default="anyone")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def served() -> OpenAIServingResponses:
    """vLLM's serving object with nothing in it but what its stores' users need."""
    responses = OpenAIServingResponses.__new__(OpenAIServingResponses)
    responses.response_store_lock = asyncio.Lock()
    keep_apart(responses, caller.get)
    return responses


async def found(responses: OpenAIServingResponses, response_id: str) -> Any:
    return await responses.retrieve_responses(response_id, starting_after=None, stream=False)


async def test_what_one_owner_keeps_is_for_another_what_nobody_has() -> None:
    responses, kept = served(), object()
    caller.set("search")
    responses.response_store["resp_1"] = kept
    assert await found(responses, "resp_1") is kept
    caller.set("chat")
    foreign, absent = await found(responses, "resp_1"), await found(responses, "resp_2")
    assert foreign.model_dump_json().replace("resp_1", "resp_2") == absent.model_dump_json()
    assert (foreign.error.code, foreign.error.message) == (404, "Response with id 'resp_1' not found.")
    assert await responses.cancel_responses("resp_1") == foreign


def test_an_id_that_another_owner_has_is_free_and_writes_over_nothing() -> None:
    store: OwnStore[str] = OwnStore(caller.get)
    caller.set("search")
    store["resp_1"] = "search's"
    caller.set("chat")
    assert ("resp_1" in store, list(store), len(store)) == (False, [], 0)
    assert store.pop("resp_1", None) is None
    store["resp_1"] = "chat's"
    assert store.pop("resp_1") == "chat's"
    caller.set("search")
    assert (store["resp_1"], list(store), len(store)) == ("search's", ["resp_1"], 1)


async def test_a_background_task_goes_on_in_the_name_of_whom_it_was_begun_for() -> None:
    store: OwnStore[str] = OwnStore(caller.get)

    async def generate() -> None:
        await asyncio.sleep(0)
        store["resp_1"] = "done"

    caller.set("search")
    task = asyncio.create_task(generate())
    task.add_done_callback(lambda _: store.pop("resp_2", None))  # as vLLM forgets its task
    store["resp_2"] = "running"
    caller.set("chat")
    await task
    await asyncio.sleep(0)
    caller.set("search")
    assert dict(store) == {"resp_1": "done"}


def test_these_are_all_the_stores_that_vllm_has_by_response_id() -> None:
    made = inspect.getsource(OpenAIServingResponses.__init__)
    assert set(re.findall(r"self\.(\w+): dict\[", made)) == set(STORES)
