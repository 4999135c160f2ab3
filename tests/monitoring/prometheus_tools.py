"""Prometheus' own programs, where they are installed (Debian: `apt-get install prometheus`)."""

import shutil
from pathlib import Path

import pytest

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"


def program(name: str) -> str:
    """The path of `promtool` or `prometheus`; without it the test is skipped, and says how to get it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"NOT TESTED: {name} is not installed; Debian has it in the package `prometheus`")
    return found
