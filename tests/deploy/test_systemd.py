"""The unit file, checked by systemd itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.compose_file import ROOT, leaving_s

UNIT = (ROOT / "deploy" / "systemd" / "tidegate.service").read_text(encoding="utf-8")


ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    """Unknown keys are only warnings to it, and its exit code stays 0: any output is a failure."""
    unit = tmp_path / "tidegate.service"
    unit.write_text(UNIT.replace("/opt/tidegate/.venv/bin/tidegate", "/bin/true"))
    assert ANALYZE is not None
    verified = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.stdout, verified.stderr, verified.returncode) == ("", "", 0)


def test_the_server_may_drain_before_systemd_kills_it() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, flags=re.MULTILINE)
    assert found is not None
    assert int(found[1]) > leaving_s()


def test_an_engine_is_ended_by_its_server_and_not_by_systemd() -> None:
    """With the default, SIGTERM goes to the engine as well, and running answers are lost."""
    assert "KillMode=mixed" in UNIT.splitlines()
