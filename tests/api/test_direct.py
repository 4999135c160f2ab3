"""The short way to the engine's routes answers what FastAPI's way does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from server.api.direct import DirectRoute, DirectRoutes
from server.app import on_refusal
from server.policy.refusals import InvalidApiKey
from tests.api.running_application import running
from tests.serving.fake_stack import FakeStack, RecordingOperation

CHAT = "/v1/chat/completions"


async def _greet(request: Request) -> Response:
    if "key" not in request.headers:
        raise InvalidApiKey("A key is needed.")
    if "fail" in request.headers:
        raise RuntimeError("broken")
    return Response(f"{request.scope['route'].path} {request.app.title}")


async def _failed(_: Request, error: Exception) -> Response:
    return Response(f"sorry: {error}", status_code=500)


def _application(*, root_path: str = "") -> FastAPI:
    api = FastAPI(title="tide", root_path=root_path)
    api.router.add_api_route("/greet", _greet, methods=["POST"], route_class_override=DirectRoute)
    api.router.add_api_route("/greet/{who}", _greet, methods=["POST"], route_class_override=DirectRoute)
    api.add_exception_handler(InvalidApiKey, on_refusal)
    api.add_exception_handler(Exception, _failed)
    return api


def _asked(app: Any, method: str, path: str, **headers: str) -> tuple[int, str, httpx.Headers]:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tide") as client:
            return await client.request(method, path, headers=headers)

    answer = asyncio.run(ask())
    return answer.status_code, answer.text, answer.headers


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/greet", {"key": "k"}),
        ("POST", "/greet", {}),
        ("POST", "/greet", {"key": "k", "fail": "yes"}),
        ("POST", "/greet/me", {"key": "k"}),
        ("POST", "/greet/", {"key": "k"}),
        ("GET", "/greet", {"key": "k"}),
        ("OPTIONS", "/greet", {}),
        ("POST", "/nowhere", {}),
        ("GET", "/openapi.json", {}),
    ],
)
@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
def test_both_ways_answer_alike(method: str, path: str, headers: dict[str, str], root_path: str) -> None:
    api = _application(root_path=root_path)
    direct = DirectRoutes(api, on_refusal, _failed)
    assert _asked(direct, method, path, **headers) == _asked(api, method, path, **headers)


def test_a_direct_route_does_not_pass_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("this way is long")

    api = _application()
    direct = DirectRoutes(api, on_refusal, _failed)
    monkeypatch.setattr(api.router, "middleware_stack", never)
    assert _asked(direct, "POST", "/greet", key="k")[:2] == (200, "/greet tide")
    assert _asked(direct, "POST", "/greet/me", key="k")[0] == 500


def test_an_error_is_told_to_the_client_and_to_the_server() -> None:
    direct: Callable[..., Awaitable[None]] = DirectRoutes(_application(), on_refusal, _failed)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(direct), base_url="http://tide") as client:
            await client.post("/greet", headers={"key": "k", "fail": "yes"})

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(ask())


def test_the_application_is_the_same_behind_a_path_of_a_proxy() -> None:
    stack = FakeStack({("POST", CHAT): RecordingOperation()})
    for root_path in ("", "/behind/a/proxy"):
        with running(stack, root_path=root_path) as client:
            assert client.post(CHAT, json={"messages": []}).status_code == 200
            assert client.post(root_path + CHAT, json={"messages": []}).status_code == 200
