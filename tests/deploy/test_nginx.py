"""nginx's configuration, checked by nginx itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.compose_file import ROOT

CONFIGURATION = ROOT / "deploy" / "nginx" / "tidegate.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    assert NGINX is not None
    whole = tmp_path / "nginx.conf"
    whole.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; include {CONFIGURATION}; }}")
    command = [NGINX, "-t", "-c", str(whole), "-e", str(tmp_path / "errors.log")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_nothing_but_the_api_is_open_to_the_outside() -> None:
    locations = re.findall(r"location (\S+) ", CONFIGURATION.read_text(encoding="utf-8"))
    assert locations == ["/v1/"]
