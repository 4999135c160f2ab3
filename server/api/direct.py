"""A short way to the routes that answer by themselves.

FastAPI walks three layers of error handling, a stack for dependencies and its list of routes with every request, and
wraps what is sent in each of them. A direct route has no dependencies, answers in a response that handles its own
errors, and is known by its method and path. Whatever is no direct route goes to FastAPI, which documents them all.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import Receive, Scope, Send

from server.policy.refusals import Refusal

OnError = Callable[[Request, Exception], Awaitable[Response]]


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and gives the response, so that FastAPI has nothing to solve for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


class DirectRoutes:
    """Plain ASGI around a FastAPI application that takes the direct routes out of its hands."""

    def __init__(self, api: FastAPI, on_refusal: OnError, on_error: OnError) -> None:
        self._api = api
        self._routes: Mapping[tuple[str, str], DirectRoute] = {} if api.root_path else _by_method_and_path(api)
        self._on_refusal = on_refusal
        self._answered = ServerErrorMiddleware(self._answer, handler=on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            route = self._routes.get((scope["method"], scope["path"]))
            if route is not None:
                scope["app"], scope["route"] = self._api, route
                await self._answered(scope, receive, send)
                return
        await self._api(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response: Response = await scope["route"].endpoint(request)
        except Refusal as refusal:
            response = await self._on_refusal(request, refusal)
        await response(scope, receive, send)


def _by_method_and_path(api: FastAPI) -> dict[tuple[str, str], DirectRoute]:
    return {
        (method, route.path): route
        for route in api.routes
        if isinstance(route, DirectRoute) and not route.param_convertors
        for method in route.methods
    }
