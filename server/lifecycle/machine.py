"""What a process needs of its machine before it lives: logs, open files, a socket to listen on."""

import os
import resource
import socket
import sys
from typing import Final

import structlog

from server.settings import Settings
from server.store.operator_key import OperatorKeyUnavailable, ensure_operator_key
from server.telemetry import logs

log = structlog.get_logger("server.lifecycle")

# An engine that is ended leaves shared memory to Python's resource tracker, which would say so after our last word.
_QUIET_RESOURCE_TRACKER: Final = "ignore::UserWarning:multiprocessing.resource_tracker"
_BACKLOG: Final = 2048
_OPEN_FILES: Final = 65535
_TOKENIZER_THREADS: Final = "RAYON_NUM_THREADS"


def configure_logs(settings: Settings) -> None:
    """Let this process, and those it will start, log as the settings say."""
    os.environ.setdefault("PYTHONWARNINGS", _QUIET_RESOURCE_TRACKER)
    logs.configure(json_lines=logs.wants_json(settings.log_format), level=settings.log_level)


def bind(settings: Settings) -> socket.socket:
    """The socket to listen on. Raises `OSError`."""
    if settings.uds:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(settings.uds)
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def raise_open_files_limit() -> None:
    """One connection is one file; the usual soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_a_core_to_the_event_loop() -> None:
    """Tokenizers take every core for the texts of a long history, and everybody's tokens wait for one meanwhile.

    They read it when they first have several texts. What the operator has set stays.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault(_TOKENIZER_THREADS, str(max(1, cores - 1)))


def operator_key(settings: Settings) -> str | None:
    """The operator's key, made at the first start; without one the operator's routes are closed to everybody."""
    if settings.operator_key is not None:
        return settings.operator_key
    try:
        return ensure_operator_key(settings.data_path)
    except OperatorKeyUnavailable as error:
        log.warning(f"{error} The operator's routes stay closed; give a key with --operator-key.")
        return None
