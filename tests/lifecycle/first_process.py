"""As much of a first process as its front-ends need: the gate, the switchboard, the socket, and no engine."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from server.app import Application, build_application
from server.lifecycle.several import Several, plan_for
from server.lifecycle.switchboard import Switchboard
from server.settings import Settings, load_settings

VERSIONS = {"tidegate": "0", "vllm": "0"}
OPERATOR_KEY = "the-operators-own-key"


class FirstProcess:
    """As much of one as its front-ends need before there is an engine."""

    def __init__(self, folder: Path, settings: Settings, url: str) -> None:
        self.url = url
        self.app: Application = build_application(settings, VERSIONS, CollectorRegistry(), OPERATOR_KEY)
        self.scratch = folder
        self.several = Several(settings, self.app, None, plan_for(settings, VERSIONS, OPERATOR_KEY, folder))

    @property
    def board(self) -> Switchboard:
        assert self.several._switchboard is not None
        return self.several._switchboard

    @property
    def lines(self) -> dict[int, Any]:
        return self.board._lines


@asynccontextmanager
async def first_process(folder: Path, count: int) -> AsyncIterator[FirstProcess]:
    """It runs inside the block, and its front-ends with it."""
    keys = {"data_folder": folder / "data", "redis_url": "unix:///nowhere", "log_level": "error"}
    settings = load_settings({"api_server_count": count, "api_key": ("a-key",), **keys}, None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = FirstProcess(folder, settings, f"http://127.0.0.1:{listener.getsockname()[1]}")
        async with process.several.running(listener):
            yield process
