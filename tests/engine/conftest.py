"""Fixtures for tests that hold our streams to vLLM's."""

import time

import pytest


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing differs by the moment at which it was made."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
