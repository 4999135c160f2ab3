"""Fixtures that many tests share: one running engine for the whole session, and the models they serve."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog.testing
from hypothesis import HealthCheck, settings
from openai import OpenAI

from server.engine.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model
from tests.live.running_server import RunningServer, start_server
from tests.models.tiny_llama import make_tiny_llama

settings.register_profile("at leisure", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("at leisure")  # no test is a matter of time: the machine may be busy with something else


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of the real engine gets one second try; the run's summary names it."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test got its second try: it may have found something."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.write_line(str(report.longrepr))


@pytest.fixture(scope="session", autouse=True)
def _servers_in_this_process_are_quiet() -> None:
    """The lines of a server in the same process are no part of what a command prints."""
    structlog.configure(logger_factory=structlog.testing.ReturnLoggerFactory())


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return ensure_embedded_model()


@pytest.fixture(scope="session")
def tiny_tools_model(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Path:
    """A random-weight model whose chat template renders tools."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-tools", embedded_model, tools=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[RunningServer]:
    """The embedded model on a real engine, shared by every test that does not stop it."""
    del embedded_model  # there before the server looks for it
    running = start_server(tmp_path_factory.mktemp("server"), "--block-size", "32")
    running.wait_until_ready()
    yield running
    running.kill()


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="session")
def model_name() -> str:
    return EMBEDDED_MODEL_NAME
