import contextlib
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from server.telemetry import logs
from server.telemetry.logs import LogFormat
from tests.telemetry.captured_logs import captured_logs

PROJECT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("chosen", "stderr", "expected"),
    [
        ("json", Terminal(), True),
        ("pretty", io.StringIO(), False),
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
    ],
)
def test_json_is_chosen_unless_a_person_looks_or_the_operator_says(
    chosen: LogFormat, stderr: io.StringIO, expected: bool
) -> None:
    with contextlib.redirect_stderr(stderr):
        assert logs.wants_json(chosen) == expected


def test_a_line_of_ours_is_one_json_object_with_all_that_is_bound() -> None:
    with captured_logs() as captured, structlog.contextvars.bound_contextvars(request_id="id-1"):
        structlog.get_logger("server.test").warning("line one\nline two: Größe", count=3)
    (event,) = captured.events
    timestamp = event.pop("timestamp")
    assert timestamp.endswith("Z")
    assert event == {
        "event": "line one\nline two: Größe",
        "count": 3,
        "request_id": "id-1",
        "level": "warning",
        "logger": "server.test",
    }
    assert "Größe" in captured.text


def test_a_librarys_line_has_the_same_form() -> None:
    with captured_logs() as captured, structlog.contextvars.bound_contextvars(request_id="id-1"):
        logging.getLogger("a.library").warning("%d of %s", 1, "two")
    (event,) = captured.events
    expected = {"event": "1 of two", "request_id": "id-1", "level": "warning", "logger": "a.library"}
    assert expected.items() <= event.items()


def test_what_is_bound_to_one_request_is_not_in_the_lines_after_it() -> None:
    with captured_logs() as captured:
        with structlog.contextvars.bound_contextvars(request_id="id-1"):
            structlog.get_logger("server.test").info("inside")
        structlog.get_logger("server.test").info("outside")
    assert [event.get("request_id") for event in captured.events] == ["id-1", None]


def test_a_traceback_is_a_field_of_its_line() -> None:
    with captured_logs() as captured:
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            structlog.get_logger("server.test").exception("ours")
            logging.getLogger("a.library").exception("theirs")
    assert [event["event"] for event in captured.events] == ["ours", "theirs"]
    for event in captured.events:
        assert event["exception"].startswith("Traceback")
        assert event["exception"].endswith("ZeroDivisionError: division by zero")


def test_pretty_lines_are_for_people() -> None:
    with captured_logs(json_lines=False) as captured:
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            structlog.get_logger("server.test").exception("it broke", count=3)
    assert "it broke" in captured.text
    assert "count=3" in captured.text
    assert "ZeroDivisionError: division by zero" in captured.text
    assert not captured.text.startswith("{")


@pytest.mark.parametrize(
    ("level", "seen"),
    [("debug", ["debug", "info", "error"]), ("info", ["info", "error"]), ("error", ["error"])],
)
def test_lines_below_the_level_are_left_out(level: str, seen: list[str]) -> None:
    with captured_logs(level=level) as captured:
        ours, theirs = structlog.get_logger("server.test"), logging.getLogger("a.library")
        for name in ("debug", "info", "error"):
            getattr(ours, name)(name)
            getattr(theirs, name)(name)
    assert [event["event"] for event in captured.events] == [name for name in seen for _ in range(2)]


def test_chatty_clients_are_heard_only_when_something_is_wrong() -> None:
    with captured_logs(level="debug") as captured:
        logging.getLogger("httpx").info("HTTP Request: GET /")
        logging.getLogger("httpx").warning("it broke")
    assert [event["event"] for event in captured.events] == ["it broke"]


@pytest.mark.parametrize("name", ["server", "server.access", "a.library"])
def test_a_line_is_written_once(name: str) -> None:
    with captured_logs() as captured:
        logging.getLogger(name).info("once")
    assert len(captured.events) == 1


def test_a_library_that_changes_the_root_logger_does_not_silence_ours() -> None:
    with captured_logs() as captured:
        root = logging.getLogger()
        before = root.handlers
        root.handlers = []
        root.setLevel(logging.CRITICAL)
        structlog.get_logger("server.test").info("ours")
        logging.getLogger("uvicorn.error").warning("uvicorn's")
        root.handlers = before
    assert [event["event"] for event in captured.events] == ["ours", "uvicorn's"]


ENGINE_PROCESS = """
import json, logging.config, sys
from pathlib import Path

import structlog

from server.telemetry import logs

logs.configure(json_lines=True, level="info")
structlog.get_logger("server.test").info("before")
logging.config.dictConfig(json.loads(Path(sys.argv[1]).read_text()))
engine = logging.getLogger("vllm.v1.engine.core")
engine.debug("too fine")
engine.info("loading %s", "weights")
try:
    raise ValueError("No available memory for the cache blocks.")
except ValueError:
    engine.exception("EngineCore failed to start.")
structlog.get_logger("server.test").info("after")
"""


def run_engine_process(folder: Path, *, json_lines: bool = True) -> tuple[str, Path]:
    """What a process with the children's configuration writes to stderr, and its error log."""
    config, error_log = folder / "logging.json", folder / "errors.log"
    logs.write_child_config(config, error_log, json_lines=json_lines, level="info")
    command = [sys.executable, "-c", ENGINE_PROCESS, str(config)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stderr, error_log


def test_vllms_processes_write_the_same_lines_and_ours_go_on(tmp_path: Path) -> None:
    stderr, _ = run_engine_process(tmp_path)
    events = [json.loads(line) for line in stderr.splitlines()]
    assert [(event["logger"], event["event"]) for event in events] == [
        ("server.test", "before"),
        ("vllm.v1.engine.core", "loading weights"),
        ("vllm.v1.engine.core", "EngineCore failed to start."),
        ("server.test", "after"),
    ]
    assert events[2]["exception"].endswith("ValueError: No available memory for the cache blocks.")


def test_vllms_errors_alone_are_kept_in_the_error_log_with_their_traceback(tmp_path: Path) -> None:
    _, error_log = run_engine_process(tmp_path, json_lines=False)
    lines = error_log.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "EngineCore failed to start."
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "ValueError: No available memory for the cache blocks."


def test_the_error_log_is_not_made_before_there_is_an_error(tmp_path: Path) -> None:
    config, error_log = tmp_path / "logging.json", tmp_path / "errors.log"
    logs.write_child_config(config, error_log, json_lines=True, level="info")
    script = "import json, logging.config, sys; logging.config.dictConfig(json.load(open(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", script, str(config)], cwd=PROJECT, check=True)
    assert not error_log.exists()
