"""Plants breaches of the import contracts in pyproject.toml, and shows that each is reported by its name."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
PYPROJECT = PROJECT / "pyproject.toml"
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

CONTRACTS: dict[str, str] = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
}
ROOMS = ("api", "commands", "engine", "hub", "lifecycle", "policy", "serving", "store", "telemetry")
MODULES = ("__init__", "__main__", "app", "cli", "parts", "settings")


class Breach(NamedTuple):
    contract: str
    place: str
    source: str


BREACHES = [
    Breach("rooms", "policy/planted.py", "import server.serving"),
    Breach("rooms", "serving/planted.py", "from server import api"),
    Breach("rooms", "engine/planted.py", "import server.store"),
    Breach("rooms", "store/planted.py", "import server.telemetry"),
    Breach("rooms", "hub/planted.py", "import server.engine"),
    Breach("rooms", "api/planted.py", "from server.settings import Settings"),
    Breach("rooms", "room_without_a_place.py", ""),
    Breach("vllm", "serving/planted.py", "from vllm.outputs import RequestOutput"),
    Breach("vllm", "app.py", "import vllm"),
    Breach("redis", "serving/planted.py", "from redis.asyncio import Redis"),
    Breach("redis", "api/planted.py", "def lazily() -> None:\n    import redis"),
    Breach("http", "serving/planted.py", "from starlette.requests import Request"),
    Breach("http", "telemetry/planted.py", "from fastapi import FastAPI"),
    Breach("traces", "serving/planted.py", "from opentelemetry import trace"),
    Breach("traces", "api/planted.py", "def lazily() -> None:\n    import opentelemetry.trace"),
    Breach("policy", "policy/planted.py", "import asyncio"),
    Breach("policy", "policy/planted.py", "from time import monotonic"),
    Breach("policy", "policy/planted.py", "from pydantic import BaseModel"),
]

ALLOWED = {
    "__main__.py": "import server.cli",
    "cli.py": "import server.lifecycle.process\nimport server.settings",
    "lifecycle/process.py": "import server.app\nimport server.settings",
    "app.py": "import fastapi\nimport server.parts\nimport server.settings",
    "parts.py": "import server.api.allowed\nimport server.settings",
    "api/allowed.py": "from starlette.types import Send\nimport fastapi\nimport server.serving.allowed",
    "serving/allowed.py": "import server.engine.allowed\nimport server.hub.allowed\nimport server.store.allowed",
    "hub/allowed.py": "import asyncio\nimport server.policy.allowed",
    "engine/allowed.py": "import vllm\nfrom starlette.datastructures import State\nimport server.policy.allowed",
    "telemetry/allowed.py": "from opentelemetry import trace\nimport server.policy.allowed",
    "store/allowed.py": "from redis.asyncio import Redis\nimport server.policy.allowed",
    "policy/allowed.py": "from dataclasses import dataclass\nfrom collections.abc import Mapping",
}


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """Lay out every room of the server, empty, and return the package."""
    package = tmp_path / "server"
    for name in (*MODULES, *(f"{room}/__init__" for room in ROOMS)):
        write(package / f"{name}.py", "")
    return package


def write(module: Path, source: str) -> None:
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(source)


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Hold the project's contracts against the package `server` in `root`."""
    return subprocess.run(
        [LINT_IMPORTS, "--config", PYPROJECT, "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "COLUMNS": "200"},  # a narrower report breaks the names over two lines
        capture_output=True,
        text=True,
        check=False,
    )


def broken(report: str) -> set[str]:
    return {line.removesuffix(" BROKEN") for line in report.splitlines() if line.endswith(" BROKEN")}


def test_the_project_keeps_its_contracts() -> None:
    result = lint(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_imports_that_the_contracts_allow_are_kept(skeleton: Path) -> None:
    for place, source in ALLOWED.items():
        write(skeleton / place, source)
    result = lint(skeleton.parent)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_tree_without_its_later_rooms_keeps_the_contracts(tmp_path: Path) -> None:
    write(tmp_path / "server/__init__.py", "")
    write(tmp_path / "server/policy/__init__.py", "")
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: f"{breach.contract}-{breach.place}")
def test_a_planted_breach_is_reported_by_the_name_of_its_contract(skeleton: Path, breach: Breach) -> None:
    write(skeleton / breach.place, breach.source)
    result = lint(skeleton.parent)
    assert result.returncode == 1
    assert broken(result.stdout) == {CONTRACTS[breach.contract]}, result.stdout + result.stderr


def test_every_contract_has_a_planted_breach() -> None:
    assert {breach.contract for breach in BREACHES} == set(CONTRACTS)
