"""The chart, rendered by helm: `helm` on PATH, or named by HELM."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import load_settings
from tests.deploy.compose_file import ROOT

CHART = ROOT / "deploy" / "helm" / "tidegate"
HELM = os.environ.get("HELM") or shutil.which("helm")

needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed (or name it by HELM)")

CLUSTER: dict[str, Any] = {
    "replicas": 3,
    "model": "Qwen/Qwen3-8B",
    "flags": ["--max-model-len", "32768"],
    "settings": {"default_max_tokens": 4096, "ttft_slo_s": {"critical": 2, "default": 5.5}},
    "tenants": '[tenants.web]\nclass = "critical"\n',
    "secret": "tidegate-secrets",
    "gpu": {"count": 2},
    "redis": {"url": "redis://redis:6379/0"},
    "models": {"existingClaim": "models"},
    "batches": {"existingClaim": "batches"},
    "ingress": {"enabled": True, "host": "llm.example.com", "tlsSecret": "tls"},
    "serviceMonitor": {"enabled": True},
    "networkPolicy": {"enabled": True},
}


def helm(folder: Path, values: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    assert HELM is not None
    file = folder / "values.json"
    file.write_text(json.dumps(values))
    environment = {**os.environ, "HELM_CACHE_HOME": str(folder), "HELM_CONFIG_HOME": str(folder)}
    command = [HELM, "template", "release", str(CHART), "--values", str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def rendered(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The manifests by kind; the last one of a kind counts."""
    answer = helm(folder, values)
    assert answer.returncode == 0, answer.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(answer.stdout) if manifest}


def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


@needs_helm
def test_the_server_takes_the_settings_that_the_chart_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    files = rendered(tmp_path, CLUSTER)["ConfigMap"]["data"]
    (tmp_path / "tidegate.toml").write_text(files["tidegate.toml"])
    settings = load_settings({}, tmp_path / "tidegate.toml")
    assert (settings.model, settings.default_max_tokens) == ("Qwen/Qwen3-8B", 4096)
    assert settings.ttft_slo_s == {"critical": 2, "default": 5.5}
    assert (settings.redis_url, str(settings.batch_folder)) == ("redis://redis:6379/0", "/batches")
    assert tomllib.loads(files["tenants.toml"]) == {"tenants": {"web": {"class": "critical"}}}


@needs_helm
def test_the_number_of_front_ends_is_the_servers_setting_and_a_change_of_it_replaces_the_pods(tmp_path: Path) -> None:
    one, two, own = (
        rendered(tmp_path, values)
        for values in ({}, {"apiServerCount": 2}, {"apiServerCount": 2, "settings": {"api_server_count": 3}})
    )
    told = [tomllib.loads(manifests["ConfigMap"]["data"]["tidegate.toml"]) for manifests in (one, two, own)]
    assert [settings.get("api_server_count") for settings in told] == [None, 2, 3]
    (tmp_path / "tidegate.toml").write_text(two["ConfigMap"]["data"]["tidegate.toml"])
    assert load_settings({}, tmp_path / "tidegate.toml").api_server_count == 2
    checksums = {
        manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for manifests in (one, two, own)
    }
    assert len(checksums) == 3


@needs_helm
def test_a_pod_may_drain_before_it_is_killed(tmp_path: Path) -> None:
    manifests = rendered(tmp_path, {"drain": {"delaySeconds": 7, "timeoutSeconds": 200}})
    assert pod(manifests)["terminationGracePeriodSeconds"] > 207


@needs_helm
def test_a_service_called_tidegate_does_not_set_the_servers_port(tmp_path: Path) -> None:
    assert pod(rendered(tmp_path, {}))["enableServiceLinks"] is False


@needs_helm
def test_the_number_of_gpus_is_the_size_of_the_tensor_parallelism(tmp_path: Path) -> None:
    server = pod(rendered(tmp_path, CLUSTER))["containers"][0]
    assert server["args"] == ["serve", "--tensor-parallel-size=2", "--max-model-len", "32768"]
    assert server["resources"] == {"limits": {"nvidia.com/gpu": 2}}


@needs_helm
def test_replicas_are_left_to_the_autoscaler(tmp_path: Path) -> None:
    manifests = rendered(tmp_path, {**CLUSTER, "autoscaling": {"kind": "keda", "maxReplicas": 8}})
    assert "replicas" not in manifests["Deployment"]["spec"]
    query = manifests["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]
    assert re.search(r'tidegate_queue_wait_seconds_bucket\{namespace="default",class!="batch"\}', query)


@needs_helm
@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"replicas": 2}, "share their limits through one Redis"),
        ({"redis": {"deploy": True, "url": "redis://r"}}, "keep one"),
        ({"ingress": {"enabled": True}}, "needs ingress.host"),
        ({"replica": 2}, "replica"),
        ({"apiServerCount": 0}, "apiServerCount"),
        ({"settings": {"vllm": {"max-model-len": 1}}}, "vllm"),
        ({"redis": {"url": "redis:6379"}}, "redis"),
    ],
)
def test_values_that_would_go_wrong_are_refused(values: dict[str, Any], advice: str, tmp_path: Path) -> None:
    answer = helm(tmp_path, values)
    assert answer.returncode != 0
    assert advice in answer.stderr


def test_the_chart_has_the_version_of_the_server() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_every_value_is_described_by_the_schema() -> None:
    """helm refuses what the schema does not know; this finds what it knows and nobody can see in values.yaml."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert schema.keys() - {"global"} == values.keys()
