"""The rules, by Prometheus' own tool."""

import subprocess
from typing import Any

import pytest
import yaml

from tests.monitoring.prometheus_tools import MONITORING, program

RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]


def test_promtools_unit_tests_pass() -> None:
    command = [program("promtool"), "test", "rules", "rules_test.yaml"]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("check", "config", "--syntax-only")])
def test_promtool_accepts_the_files(arguments: tuple[str, ...]) -> None:
    file = () if "rules" in arguments else ("prometheus.yaml",)
    command = [program("promtool"), *arguments, *file]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_a_summary_a_unit_test_and_advice(rule: dict[str, Any]) -> None:
    tests = (MONITORING / "rules_test.yaml").read_text(encoding="utf-8")
    advice = (MONITORING.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    assert f"alertname: {rule['alert']}" in tests
    assert f"`{rule['alert']}`" in advice


def test_grafanas_provisioning_names_the_folder_that_is_mounted_and_the_datasource() -> None:
    folder = MONITORING / "grafana" / "provisioning"
    provider = yaml.safe_load((folder / "dashboards" / "tidegate.yaml").read_text(encoding="utf-8"))["providers"][0]
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))["datasources"][0]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
