"""What a real server tells: its metrics to a real Prometheus, its spans to a collector."""

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.monitoring.dashboards import DASHBOARDS
from tests.live.running_server import RunningServer, start_server
from tests.monitoring.prometheus_tools import MONITORING, program
from tests.telemetry.collector import Collector, collecting

pytestmark = [pytest.mark.engine]

CHAT = "/v1/chat/completions"
QUESTION = {
    "messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 16, "temperature": 0, "ignore_eos": True,
}  # fmt: skip
EXPRESSIONS = {query.expression for dashboard in DASHBOARDS for query in dashboard.queries()}
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
# What a server without tenants, batches, fallbacks, deaths and cut chats has no samples of.
SILENT = re.compile(
    r"fallback|batch_lines_total|degraded_requests|transitions|limit_refusals|limiter_duration|fit_duration|"
    r"refusals_total|limited|batch_lines_in_flight|batch_tokens"
)
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENTS_SPAN = "b7ad6b7169203331"


def wait_for(holds: Callable[[], bool], what: Callable[[], str], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.1)


def stream(server: RunningServer, **headers: str) -> str:
    body = {**QUESTION, "stream": True}
    answer = httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.text


def request_line(server: RunningServer, request_id: str) -> dict[str, Any]:
    """What the log says of one request."""
    (line,) = [e for e in server.log_events() if e["event"] == "request" and e.get("request_id") == request_id]
    return line


def test_every_metric_that_a_dashboard_or_a_rule_names_is_on_the_page(server: RunningServer) -> None:
    stream(server)
    declared = re.findall(r"^# TYPE (\S+) (\w+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    known = {f"{name}{suffix}" for name, kind in declared for suffix in suffixes.get(kind, ("",))}
    known |= {rule["record"] for rule in RULES if "record" in rule} | {"up"}
    for expression in EXPRESSIONS | {rule["expr"] for rule in RULES}:
        named = set(re.findall(r"\b(?:tidegate_|tidegate:|vllm:)\w+(?::\w+)*", expression))
        assert named <= known, expression


def test_the_page_has_no_metric_twice_and_is_quick(server: RunningServer) -> None:
    stream(server)
    took_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        page = httpx.get(f"{server.url}/metrics").text
        took_s.append(time.perf_counter() - started_s)
    declared = re.findall(r"^# TYPE .*$", page, re.MULTILINE)
    assert len(declared) == len(set(declared))
    assert "vllm:inter_token_latency_seconds_bucket" in page
    assert min(took_s) < 0.2  # vLLM's and ours; with a thousand tenants see tests/telemetry/test_tenants.py


def test_a_streams_figures_are_what_the_client_saw(server: RunningServer) -> None:
    server.wait_until_idle()
    names = ("tidegate_time_to_first_token_seconds_count", "tidegate_time_per_output_token_seconds_count")
    before = [server.metric(name) for name in names]
    tokens = server.metric("tidegate_tokens_total")
    started_s = time.perf_counter()
    stream(server, **{"x-request-id": "seen-by-its-client"})
    took_ms = 1000 * (time.perf_counter() - started_s)
    wait_for(lambda: [server.metric(name) for name in names] == [count + 1 for count in before], lambda: "not counted")
    line = request_line(server, "seen-by-its-client")
    assert line["completion_tokens"] == 16
    assert server.metric("tidegate_tokens_total") == tokens + line["prompt_tokens"] + line["cached_tokens"] + 16
    assert 0 <= line["queue_wait_ms"] <= line["ttft_ms"] < line["duration_ms"] <= took_ms
    last_token_ms = line["ttft_ms"] + 15 * line["tpot_ms"]
    assert line["duration_ms"] / 2 < last_token_ms < line["duration_ms"] + 1  # both are rounded


@contextmanager
def prometheus(server: RunningServer, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server every second and evaluates our rules."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "rules.yaml")],
        "scrape_configs": [
            {"job_name": "tidegate", "static_configs": [{"targets": [server.url.removeprefix("http://")]}]}
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        program("prometheus"), f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}", "--log.level=error",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", trust_env=False, timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def asked(client: httpx.Client, expression: str) -> list[Any]:
    """What Prometheus answers to an expression, with Grafana's variables put in."""
    query = expression.replace("$__rate_interval", "30s").replace("$instance", ".*")
    answer = client.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[Any] = answer["data"]["result"]
    return found


def has_scraped(client: httpx.Client) -> bool:
    """Whether Prometheus is up, and has some samples to make a rate of."""
    try:
        answer = client.get("/query", params={"query": "count_over_time(up[1m]) > 5"})
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK and bool(answer.json()["data"]["result"])


def unanswered(client: httpx.Client) -> set[str]:
    """Expressions without a sample that should have one."""
    return {one for one in EXPRESSIONS if not SILENT.search(one) and not asked(client, one)}


def test_a_real_prometheus_answers_every_expression_of_every_dashboard(server: RunningServer, tmp_path: Path) -> None:
    with prometheus(server, tmp_path) as client:
        wait_for(lambda: has_scraped(client), lambda: "Prometheus does not scrape")
        stream(server)
        httpx.post(f"{server.url}{CHAT}", json=QUESTION, timeout=60)
        wait_for(lambda: not unanswered(client), lambda: str(unanswered(client)))
        rules = client.get("/rules").json()["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
        assert asked(client, 'ALERTS{alertstate="firing"}') == []


@contextmanager
def traced_server(folder: Path, model: Path) -> Iterator[tuple[RunningServer, Collector]]:
    with collecting() as collector:
        server = start_server(
            folder, str(model), "--max-model-len", "2048", "--otlp-endpoint", collector.url,
            environment={"OTEL_BSP_SCHEDULE_DELAY": "200"},
        )  # fmt: skip
        try:
            server.wait_until_ready()
            yield server, collector
        finally:
            server.kill()


def test_one_trace_goes_from_the_client_through_the_queue_into_the_engine(
    tmp_path: Path, tiny_tools_model: Path
) -> None:
    with traced_server(tmp_path, tiny_tools_model) as (server, collector):
        stream(server, traceparent=f"00-{TRACE_ID}-{CLIENTS_SPAN}-01", **{"x-request-id": "traced"})
        assert httpx.post(f"{server.url}{CHAT}", json=QUESTION, timeout=60).status_code == 200
        assert server.stop() == 0
    clients = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE_ID}
    request = clients[f"POST {CHAT}"]
    assert set(clients) == {f"POST {CHAT}", "render", "queue", "llm_request"}
    assert request.parent_span_id.hex() == CLIENTS_SPAN
    assert {clients[name].parent_span_id for name in ("render", "queue", "llm_request")} == {request.span_id}
    times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in clients.values()]
    assert min(times)[0] == request.start_time_unix_nano
    values = {pair.key: pair.value for pair in request.attributes}
    assert values["tidegate.tenant"].string_value == "anyone"
    assert values["gen_ai.usage.output_tokens"].int_value == 16
    own = {span.name for span in collector.spans if span.trace_id.hex() != TRACE_ID}
    assert {f"POST {CHAT}", "render", "queue", "llm_request"} <= own  # beside them vLLM traces its own loading
    assert collector.services == {"tidegate"}
    assert not any("Tell a story" in str(span) for span in collector.spans)
    assert request_line(server, "traced")["trace_id"] == TRACE_ID
    assert "Overriding of current TracerProvider" not in server.log
