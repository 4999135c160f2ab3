"""Logs of every process in one form: JSON lines for machines, colours for a person at a terminal.

vLLM's processes are given the same form through a dictConfig file (`write_child_config`).
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import structlog

LogFormat = Literal["auto", "json", "pretty"]

_TIME = structlog.processors.TimeStamper(fmt="iso", utc=True)
_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.StackInfoRenderer(),
    _TIME,
]


def wants_json(chosen: LogFormat) -> bool:
    """JSON unless a person is looking."""
    return chosen == "json" or (chosen == "auto" and not sys.stderr.isatty())


def formatter(*, json_lines: bool) -> logging.Formatter:
    """The formatter for our own records and for those of libraries alike. Named in the children's dictConfig."""
    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if json_lines
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    trace: list[Any] = [structlog.processors.format_exc_info] if json_lines else []
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *trace, renderer],
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
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
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
