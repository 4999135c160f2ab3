"""The Ray Serve application as far as it needs no Ray; `tests/deploy/ray_replicas.py` runs it."""

import asyncio
import contextlib
import importlib
import inspect
import os
import socket
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from deploy.ray.replica import FIRST_PORT, BehindRay, CannotServe, _bound, settings_for_ray
from deploy.ray.scaling import WAIT, QueueWait, quantile, wait_counts, wanted
from server.settings import load_settings
from server.telemetry.admission import AdmissionMetrics
from server.telemetry.readings import Readings
from tests.deploy.compose_file import ROOT

FOLDER = ROOT / "deploy" / "ray"
REDIS = "--redis-url=redis://redis:6379/0"
CONFIGURATIONS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def helm_values() -> dict[str, Any]:
    chart = ROOT / "deploy" / "helm" / "tidegate"
    values: dict[str, Any] = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    return values


def deployment(configuration: dict[str, Any]) -> dict[str, Any]:
    [application] = configuration["applications"]
    [only] = application["deployments"]
    assert isinstance(only, dict)
    return only


# The figure


def test_a_replica_tells_how_long_people_waited_and_leaves_batch_work_out() -> None:
    registry = CollectorRegistry()
    metrics = AdmissionMetrics(registry)
    metrics.admitted("default", 0.3)
    metrics.admitted("critical", 3.0)
    metrics.admitted("batch", 200.0)
    counts = wait_counts(Readings(registry, (), (WAIT,)).take())
    assert (counts[f"{WAIT}:0.25"], counts[f"{WAIT}:0.5"], counts[f"{WAIT}:inf"]) == (0, 1, 2)


@pytest.mark.parametrize(
    ("counts", "seconds"),
    [
        ({}, 0),
        ({1.0: 0, float("inf"): 0}, 0),
        ({1.0: 9, 2.0: 10, float("inf"): 10}, 1.0),
        ({1.0: 0, 2.0: 10, float("inf"): 10}, 1.9),
        ({1.0: 5, 2.0: 5, 5.0: 10, float("inf"): 10}, 4.4),
        ({1.0: 1, 2.0: 1, float("inf"): 10}, 2.0),
    ],
)
def test_the_quantile_is_the_one_that_prometheus_calculates(counts: dict[float, float], seconds: float) -> None:
    assert quantile(0.9, counts) == pytest.approx(seconds)


@dataclass(frozen=True)
class Stamped:
    value: float


@dataclass(frozen=True)
class Context:
    current_num_replicas: int
    target_num_replicas: int
    raw_metrics: dict[str, dict[Any, list[Stamped]]]


def seen(**replicas: tuple[tuple[float, float], tuple[float, float]]) -> dict[str, dict[Any, list[Stamped]]]:
    """By replica: how many waited 1 s at most, and how many in all, at the begin and at the end of the time."""
    within = {name: [Stamped(begin[0]), Stamped(end[0])] for name, (begin, end) in replicas.items()}
    everyone = {name: [Stamped(begin[1]), Stamped(end[1])] for name, (begin, end) in replicas.items()}
    return {f"{WAIT}:1.0": within, f"{WAIT}:8.0": everyone, f"{WAIT}:inf": everyone, "ongoing requests": within}


@pytest.mark.parametrize(
    ("figures", "replicas"),
    [
        (seen(a=((0, 0), (10, 10)), b=((0, 0), (10, 10))), 1),
        (seen(a=((0, 0), (10, 10)), b=((0, 0), (0, 10))), 3),
        (seen(a=((900, 1000), (910, 1010)), b=((0, 900), (10, 910))), 1),  # they waited long before that time
        ({}, 1),
        ({f"{WAIT}:1.0": {"a": []}, f"{WAIT}:inf": {"a": []}}, 1),
    ],
)
def test_replicas_are_set_by_how_long_requests_waited_lately_over_all_of_them(figures: Any, replicas: int) -> None:
    assert QueueWait(2.0)(Context(2, 2, figures)) == (replicas, {})


@pytest.mark.parametrize(
    ("running", "ordered", "ratio", "replicas"),
    [
        (2, 2, 1.05, 2),
        (2, 2, 1.2, 3),
        (2, 2, 9.0, 3),
        (2, 3, 9.0, 3),  # one is on its way
        (2, 2, 0.6, 2),
        (2, 2, 0.4, 1),
        (4, 4, 0.0, 3),
        (1, 1, 0.0, 0),
        (0, 1, 0.0, 1),
    ],
)
def test_one_replica_at_a_time_comes_or_goes(running: int, ordered: int, ratio: float, replicas: int) -> None:
    assert wanted(running, ordered, ratio) == replicas


def test_ray_and_the_chart_go_by_the_same_wait() -> None:
    [scaled] = [one for one in map(deployment, CONFIGURATIONS) if "autoscaling_config" in one]
    ray, chart = scaled["autoscaling_config"], helm_values()["autoscaling"]
    assert ray["policy"]["policy_kwargs"]["seconds"] == chart["queueWaitSeconds"]
    assert ray["downscale_delay_s"] == chart["scaleDownSeconds"]
    query = (ROOT / "deploy/helm/tidegate/templates/autoscaling.yaml").read_text(encoding="utf-8")
    assert "histogram_quantile(0.9" in query
    assert f"{WAIT}_bucket" in query
    assert f"[{ray['look_back_period_s'] // 60}m]" in query


# The configuration


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_server_takes_the_flags_of_the_configuration(configuration: dict[str, Any]) -> None:
    [application] = configuration["applications"]
    settings, _ = settings_for_ray(application["args"]["flags"])
    assert settings.redis_url is not None
    assert settings.require_key


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_what_the_configuration_names_is_there(configuration: dict[str, Any]) -> None:
    [application] = configuration["applications"]
    module, _, builder = application["import_path"].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"\ndef {builder}(" in source
    assert f'name="{deployment(configuration)["name"]}"' in source
    if (scaling := deployment(configuration).get("autoscaling_config")) is not None:
        module, _, policy = scaling["policy"]["policy_function"].partition(":")
        given = inspect.signature(getattr(importlib.import_module(module), policy)).parameters
        assert set(scaling["policy"]["policy_kwargs"]) <= set(given)


def test_an_engine_over_many_nodes_has_a_bundle_for_each_worker() -> None:
    [(flags, bundles)] = [
        (configuration["applications"][0]["args"]["flags"], placed)
        for configuration in CONFIGURATIONS
        if (placed := deployment(configuration).get("placement_group_bundles"))
    ]
    sizes = [int(flag.partition("=")[2]) for flag in flags if "parallel-size" in flag]
    assert sizes[0] * sizes[1] == len(bundles)
    assert [bundle["GPU"] for bundle in bundles] == [1] * len(bundles)  # vLLM takes no other


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_running_answers_may_finish_before_ray_ends_a_replica(configuration: dict[str, Any]) -> None:
    assert deployment(configuration)["graceful_shutdown_timeout_s"] > load_settings({}, None).drain_timeout_s


def test_ray_is_pinned_and_no_dependency_of_the_server() -> None:
    pinned = [line for line in (FOLDER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.partition("==")[0] for line in pinned] == ["ray[serve]"]
    assert '"ray' not in str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


# The settings of a replica


def test_replicas_without_a_shared_redis_are_refused() -> None:
    with pytest.raises(CannotServe, match="--redis-url"):
        settings_for_ray(["model"])


def test_a_replica_has_one_front_end() -> None:
    with pytest.raises(CannotServe, match="--api-server-count"):
        settings_for_ray([REDIS, "--api-server-count=2"])


def test_a_wrong_flag_is_refused_with_the_sentence_of_the_command_line() -> None:
    with pytest.raises(CannotServe, match="--drain-timeout"):
        settings_for_ray([REDIS, "--drain-timeout=-1"])


def test_a_replica_listens_beside_ray_and_leaves_batches_to_who_shares_their_folder() -> None:
    settings, vllm_args = settings_for_ray(["model", REDIS, "--max-model-len", "512"])
    assert (settings.host, settings.port, settings.batches) == ("0.0.0.0", FIRST_PORT, False)  # noqa: S104
    assert vllm_args == ("model", "--max-model-len", "512")


def test_what_the_operator_chose_stays(tmp_path: Path) -> None:
    settings, _ = settings_for_ray([REDIS, "--host=127.0.0.1", "--port=9200", f"--batch-folder={tmp_path}"])
    assert (settings.host, settings.port, settings.batches) == ("127.0.0.1", 9200, True)


def test_two_replicas_of_a_node_listen_on_two_ports() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as first:
        port = first.getsockname()[1]
        settings, _ = settings_for_ray([REDIS, "--host=127.0.0.1", f"--port={port}"])
        with contextlib.closing(_bound(settings)) as second:
            assert port < second.getsockname()[1] < port + 32


def test_an_address_that_is_not_ours_is_told() -> None:
    settings, _ = settings_for_ray([REDIS, "--host=192.0.2.1"])
    with pytest.raises(CannotServe, match=r"192\.0\.2\.1"):
        _bound(settings)


def test_where_no_port_is_free_the_replica_says_so() -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 65535))
        settings, _ = settings_for_ray([REDIS, "--host=127.0.0.1", "--port=65535"])
        with pytest.raises(CannotServe, match="from 65535 to 65535"):
            _bound(settings)


# Calls by Ray's proxy


@pytest.mark.anyio
async def test_an_application_whose_call_is_cancelled_hears_that_its_client_has_left_and_ends_by_itself() -> None:
    heard: list[str] = []
    begun, ended = asyncio.Event(), asyncio.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, send
        while not heard or heard[-1] != "http.disconnect":
            heard.append((await receive())["type"])
            begun.set()
        await asyncio.sleep(0)  # its cleanup awaits
        ended.set()

    call = asyncio.create_task(called(BehindRay(application)))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(ended.wait(), 5)
    assert heard == ["http.request", "http.disconnect"]


@pytest.mark.anyio
async def test_what_an_application_raises_is_raised() -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # its own, without words
        await called(BehindRay(application))


@pytest.mark.anyio
async def test_the_id_of_a_request_is_left_to_ray_and_every_other_header_goes_out() -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        headers = [(b"x-request-id", b"a"), (b"retry-after", b"5")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"full"})

    head, body = await called(BehindRay(application))
    assert (head["status"], head["headers"], body["body"]) == (503, [(b"retry-after", b"5")], b"full")


async def called(application: BehindRay) -> list[Message]:
    """What is sent to a client that stays silent after its body."""
    sent: list[Message] = []
    bodies = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for body in bodies:
            return body
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    await application({"type": "http"}, receive, send)
    return sent
