"""The real application on a real uvicorn on a loopback port, without an engine."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from server.app import Application, build_application
from server.settings import Settings
from server.store.ending import ended
from tests.serving.fake_stack import FakeStack

if TYPE_CHECKING:  # the engine room imports vLLM
    from server.engine.stack import Stack

VERSIONS = {"tidegate": "1.2.3", "vllm": "0.32.0"}
OPERATOR_KEY = "the-operators-own-key"
# Tests share a busy machine; what happens when Redis is slow is tested where the clock is ours.
_REDIS_TIMEOUT_S = 5.0
_NO_FOLDER = Path("/nowhere")


@contextmanager
def running(stack: FakeStack | None = None, *, redis_url: str | None = None, **settings: Any) -> Iterator[httpx.Client]:
    """A client of an application that serves `stack`, or that still loads."""
    settings.setdefault("data_folder", _NO_FOLDER)
    chosen = Settings(redis_url=redis_url, redis_timeout_s=_REDIS_TIMEOUT_S, **settings)
    application = build_application(chosen, VERSIONS, CollectorRegistry(), OPERATOR_KEY)
    application.slot.enter("loading the model")
    if stack is not None:
        application.slot.fill(cast("Stack", stack))
    with _served(application) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client


@contextmanager
def _served(application: Application) -> Iterator[str]:
    config = uvicorn.Config(
        application.asgi, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)

    async def serve(listener: socket.socket) -> None:
        watching = asyncio.create_task(application.access.watch(lambda _: None))
        async with application.batches.running():
            await server.serve([listener])
        await ended({watching})
        await application.store.client.aclose()
        await application.store.patient_client.aclose()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=uvloop.run, args=(serve(listener),))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
