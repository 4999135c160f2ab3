"""vLLM's own endpoints as callable operations.

vLLM registers its routes on a throw-away FastAPI app; we keep the endpoint functions, without the decorators that
watch for disconnects and count load (the response that owns the request does both), and call them on a request
whose `app.state` is the stack's. So an operation always runs on the stack it came from, also while another stack
takes its place.
"""

import inspect
import json
from argparse import Namespace
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any, Final, get_type_hints

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from vllm.config import ModelConfig
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.tasks import SupportedTask

from server.engine import failures
from server.engine.calls import Call, Reply, StreamReply
from server.engine.validation import Validator

OperationKey = tuple[str, str]  # method, path template
_BODY: Final = "request"  # what vLLM's endpoints call their body


class _App:
    """What vLLM's endpoints look for behind `request.app`."""

    def __init__(self, state: State) -> None:
        self.state = state


class Operation:
    """One endpoint function of vLLM, bound to one stack's state."""

    def __init__(self, endpoint: Callable[..., Coroutine[Any, Any, Response]], state: State) -> None:
        self._endpoint = endpoint
        self._app = _App(state)
        hints = get_type_hints(endpoint, include_extras=True)
        hints.pop("return", None)
        self._request_names = [name for name, kind in hints.items() if kind is Request]
        self._kinds = {name: kind for name, kind in hints.items() if kind is not Request}

    @cached_property
    def _validators(self) -> dict[str, Validator]:
        return {name: Validator(kind) for name, kind in self._kinds.items()}

    def body_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the body, or None where there is none or it cannot be written as one."""
        if _BODY not in self._kinds:
            return None
        try:
            return self._validators[_BODY].adapter.json_schema(ref_template="#/components/schemas/{model}")
        except PydanticInvalidForJsonSchema:
            return None

    async def __call__(self, call: Call) -> Reply | StreamReply:
        """Run the endpoint. Raises `Refusal`; cancellation passes through and aborts the engine's work."""
        try:
            arguments = self._validate(call)
            response = await self._endpoint(**arguments)
        except ValidationError as error:
            raise failures.from_validation(error) from error
        except Exception as error:
            raise failures.from_exception(error) from error
        return _reply(response)

    def _validate(self, call: Call) -> dict[str, Any]:
        given: dict[str, Any] = {**call.query, **call.path_params, _BODY: call.body}
        arguments: dict[str, Any] = {
            name: validator(given[name]) for name, validator in self._validators.items() if name in given
        }
        return arguments | dict.fromkeys(self._request_names, self._request(call))

    def _request(self, call: Call) -> Request:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(call.body).encode(), "more_body": False}

        scope = {
            "type": "http",
            "method": call.method,
            "path": call.route,
            "query_string": b"",
            "headers": call.headers,
            "path_params": call.path_params,
            "app": self._app,
        }
        return Request(scope, receive)


def _reply(response: Response) -> Reply | StreamReply:
    media_type = response.headers.get("content-type", response.media_type or "application/json")
    if isinstance(response, StreamingResponse):
        return StreamReply(response.body_iterator, media_type, failures.from_frame)  # type: ignore[arg-type]
    if response.status_code >= 400:
        raise failures.from_error_body(json.loads(bytes(response.body)), response.status_code)
    headers = {k: v for k, v in response.headers.items() if k not in {"content-length", "content-type"}}
    return Reply(bytes(response.body), media_type, headers)


def collect_operations(
    args: Namespace, state: State, tasks: tuple[SupportedTask, ...], model_config: ModelConfig
) -> dict[OperationKey, Operation]:
    """Every endpoint that vLLM has for this model, by method and path template."""
    app = FastAPI()
    app.state.args = args
    register_api_routers(args, app, tasks, model_config)
    return {
        (method, route.path): Operation(inspect.unwrap(route.endpoint), state)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
