"""Logs of every process in one form: JSON lines for machines, colours for a person at a terminal.

vLLM's processes are given the same form through a dictConfig file (`write_child_config`).
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["auto", "json", "pretty"]

_TIME = structlog.processors.TimeStamper(fmt="iso", utc=True)
_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.StackInfoRenderer(),
    _TIME,
]


def wants_json(chosen: LogFormat) -> bool:
    """JSON unless a person is looking."""
    return chosen == "json" or (chosen == "auto" and not sys.stderr.isatty())


class _Lines:
    """Where one of our own loggers writes: a line in one write. The way through stdlib's logging costs far more."""

    def __init__(self, stream: TextIO, name: str = "server") -> None:
        self._stream = stream
        self.name = name

    def msg(self, line: str) -> None:
        self._stream.write(f"{line}\n")

    debug = info = warning = error = critical = msg


def _rendering(*, json_lines: bool) -> list[Any]:
    if json_lines:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]


def formatter(*, json_lines: bool) -> logging.Formatter:
    """The formatter for the records of libraries. Named in the children's dictConfig."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_SHARED, structlog.stdlib.PositionalArgumentsFormatter()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(json_lines=json_lines)],
    )


def configure(*, json_lines: bool, level: str) -> None:
    """Send this process's logs to stderr.

    Our loggers have a handler of their own: a library that vLLM imports changes the root logger's level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(json_lines=json_lines))
    for name in ("", "server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    for chatty in ("asyncio", "httpcore", "httpx", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("slowapi").setLevel(logging.ERROR)  # the access log has a line for what it refuses
    structlog.configure(
        processors=[*_SHARED, *_rendering(json_lines=json_lines)],
        logger_factory=partial(_Lines, sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )


def write_child_config(target: Path, error_log: Path, *, json_lines: bool, level: str) -> None:
    """Write the dictConfig for vLLM's processes; their error records are kept in `error_log` as well."""
    ours = {"()": "server.telemetry.logs.formatter", "json_lines": json_lines}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": ours, "plain": {"format": "%(message)s"}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "ours", "stream": "ext://sys.stderr"},
            "errors": {
                "class": "logging.FileHandler",
                "formatter": "plain",
                "filename": str(error_log),
                "level": "ERROR",
                "delay": True,
            },
        },
        "loggers": {"vllm": {"handlers": ["stderr", "errors"], "level": level.upper(), "propagate": False}},
    }
    target.write_text(json.dumps(config), encoding="utf-8")
