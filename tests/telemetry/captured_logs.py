"""Our logging as a server sets it up, read back from memory instead of stderr."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import structlog

from server.telemetry import logs

_TOUCHED = ("", "server", "uvicorn", "httpx", "httpcore", "asyncio")


class CapturedLogs:
    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines."""
        return [json.loads(line) for line in self.text.splitlines()]


@contextmanager
def captured_logs(*, json_lines: bool = True, level: str = "info") -> Iterator[CapturedLogs]:
    """Inside, logging is configured by `logs.configure`; afterwards it is as it was."""
    loggers = [logging.getLogger(name) for name in _TOUCHED]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    configured = structlog.get_config()
    captured = CapturedLogs()
    with redirect_stderr(captured.stream):
        logs.configure(json_lines=json_lines, level=level)
    ours = logging.getLogger("server").handlers[0]
    for logger, (handlers, _, _) in zip(loggers, before, strict=True):
        if ours in logger.handlers:
            logger.handlers = handlers  # pytest's come and go with each phase of a test, and find their list here
            logger.addHandler(ours)
    try:
        yield captured
    finally:
        structlog.configure(**configured)
        for logger, (_, propagate, level_before) in zip(loggers, before, strict=True):
            logger.removeHandler(ours)
            logger.propagate = propagate
            logger.setLevel(level_before)
