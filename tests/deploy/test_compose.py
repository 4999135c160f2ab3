"""What `docker/compose.yaml` says, against what the server and the other files say."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.settings import SECRETS_FOLDER_ENV, SETTINGS_FILE_ENV, Settings
from tests.deploy.compose_file import COMPOSE_FILE, DOCKER, leaving_s, services, variables

OF_THE_SERVER = ("server-cpu", "server-gpu", "fallback")


@pytest.mark.parametrize("name", OF_THE_SERVER)
def test_every_variable_given_to_a_server_is_one_of_its_settings(name: str) -> None:
    known = {f"TIDEGATE_{field.upper()}" for field in Settings.model_fields} | {SECRETS_FOLDER_ENV, SETTINGS_FILE_ENV}
    given = {variable for variable in services()[name]["environment"] if variable.startswith("TIDEGATE_")}
    assert given <= known


def test_the_example_names_variables_that_exist_with_their_defaults() -> None:
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, flags=re.MULTILINE))
    del shown["COMPOSE_PROFILES"], shown["WEBUI_MODEL_METADATA"]  # examples of another value than the default
    assert shown.keys() <= variables().keys()
    with_a_default = {name: value for name, value in shown.items() if value and variables()[name]}
    assert with_a_default == {name: variables()[name] for name in with_a_default}


def test_every_image_and_every_published_port_can_be_changed() -> None:
    text = COMPOSE_FILE.read_text(encoding="utf-8")
    images = re.findall(r"^ +image: (.+)$", text, flags=re.MULTILINE)
    ports = re.findall(r'^ +- "(.+):\d+"$', text, flags=re.MULTILINE)
    assert len(images) == len(services())
    assert all(image.startswith("${") for image in images)
    assert all(re.fullmatch(r"\$\{\w+_BIND:-127\.0\.0\.1\}:\$\{\w+_PORT:-\d+\}", port) for port in ports)


def test_every_service_says_when_it_is_well() -> None:
    """`up --wait` waits for that. The servers' own check is in the image."""
    assert {name for name, service in services().items() if "healthcheck" not in service} == set(OF_THE_SERVER)


def test_open_webui_waits_until_a_chat_works_whatever_the_server_runs_on() -> None:
    assert services()["webui"]["depends_on"] == {
        server: {"condition": "service_healthy", "required": False} for server in ("server-gpu", "server-cpu")
    }


def test_open_webuis_own_calls_are_of_a_lower_class_and_short() -> None:
    asked = json.loads(services()["webui"]["environment"]["TASK_MODEL_PARAMS"])
    assert asked["service_tier"] == "flex"
    assert asked["max_tokens"] <= 512


def test_the_server_may_drain_before_it_is_killed() -> None:
    grace_s = int(services()["server-cpu"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > leaving_s()


def test_make_secrets_writes_a_key_for_both_and_keeps_it(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets"
    script.write_bytes((DOCKER / "make-secrets").read_bytes())
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run(["/bin/sh", script], check=True, env=environment)
    key = (secrets / "tidegate_api_key").read_text()
    subprocess.run(["/bin/sh", script], check=True, env=environment)
    assert re.fullmatch(r"tidegate-[0-9a-f]{48}", key)
    assert (secrets / "tidegate_api_key").read_text() == key == (secrets / "webui_api_key").read_text()
    assert (secrets / "tidegate_api_key").stat().st_mode & 0o777 == 0o644


def test_what_the_monitoring_mounts_is_there() -> None:
    """All but Prometheus's own files and Grafana's, which have tests of their own."""
    mounted = [str(volume).split(":")[0] for volume in services()["alertmanager"]["volumes"]]
    assert [path for path in mounted if path.startswith(("./", "../")) and not (DOCKER / path).exists()] == []


AMTOOL = shutil.which("amtool")


@pytest.mark.skipif(AMTOOL is None, reason="amtool is not installed (Debian: prometheus-alertmanager)")
def test_alertmanager_takes_its_configuration() -> None:
    assert AMTOOL is not None
    file = DOCKER.parent / "deploy" / "monitoring" / "alertmanager.yaml"
    checked = subprocess.run([AMTOOL, "check-config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
