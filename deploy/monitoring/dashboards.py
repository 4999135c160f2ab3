"""The dashboards. `python -m deploy.monitoring.dashboards` writes their JSON anew."""

import json
from pathlib import Path
from typing import Final

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import (
    CACHED,
    INTERACTIVE,
    PROMPT,
    gauge,
    missed,
    number,
    only,
    quantiles,
    rate,
    summed,
)

FOLDER: Final = Path(__file__).parent / "grafana" / "dashboards"
OVERVIEW: Final = Dashboard(
    "tidegate-overview",
    "Tidegate: overview",
    "What the server does, and whether it keeps what it promises.",
    (
        Row(
            "Now",
            (
                number("Engines", "Replicas with a serving engine.", f"sum(tidegate_engine_up{only()})", "none"),
                number(
                    "Level", "Highest degradation level of the replicas, 0 to 5.",
                    f"max(tidegate_degradation_level{only()})", "none", (1, 4),
                ),
                number(
                    "Errors", "Share of requests that got a server's error instead of an answer.",
                    missed("answered"), "percentunit", (0.005, 0.05),
                ),
                number(
                    "Late first tokens", "Share of streams whose first token came later than promised.",
                    missed("ttft"), "percentunit", (0.05, 0.25),
                ),
                number(
                    "Slow streams", "Share of streams that were slower than promised.",
                    missed("tpot"), "percentunit", (0.05, 0.25),
                ),
                number(
                    "Waiting", "Requests in the queue.", f"sum(tidegate_requests_waiting{only()})", "none",
                ),
            ),
            height=5,
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by status", "A stream that an error ended has that error's status.",
                    (Query(summed("status", "tidegate_requests_total"), "{{status}}"),), "reqps", stacked=True,
                ),
                Panel(
                    "Tokens per second", "As the engine counts them; `cache` was found in the prefix cache.",
                    (
                        Query(f"sum({rate('vllm:generation_tokens_total')})", "generated"),
                        Query(summed("source", "tidegate_engine_prompt_tokens_total"), "prompt, {{source}}"),
                    ),
                ),
                Panel(
                    "Refusals by reason", "The `code` that the client is told.",
                    (Query(summed("reason", "tidegate_refusals_total"), "{{reason}}"),), "reqps", stacked=True,
                ),
            ),
        ),
        Row(
            "Latency, as clients see it",
            (
                Panel(
                    "Time to first token", "From a request's first byte to its stream's first token, waiting included.",
                    (
                        *quantiles("tidegate_time_to_first_token_seconds"),
                        Query(
                            f"max by (class) (tidegate_objective_ttft_seconds{only(INTERACTIVE)})",
                            "{{class}} promised",
                        ),
                    ), "s",
                ),
                Panel(
                    "Time per token", "A stream's mean time per token after the first.",
                    (
                        *quantiles("tidegate_time_per_output_token_seconds"),
                        Query(f"max(tidegate_objective_tpot_seconds{only()})", "promised"),
                    ), "s",
                ),
                Panel(
                    "Whole answers", "From a request's first byte to its answer's last, refusals left out.",
                    quantiles("tidegate_request_duration_seconds"), "s",
                ),
            ),
        ),
        Row(
            "Queue and level",
            (
                Panel(
                    "Requests by class", "In the queue and in the engine.",
                    (
                        Query(f"sum by (class) (tidegate_requests_waiting{only()})", "{{class}} waiting"),
                        Query(f"sum by (class) (tidegate_requests_running{only()})", "{{class}} running"),
                    ),
                ),
                Panel(
                    "Wait for a place", "From a request's arrival to its place in the engine.",
                    quantiles("tidegate_queue_wait_seconds"), "s",
                ),
                Panel(
                    "Pressure and level",
                    "Pressure is the predicted wait over what is promised; above 1 the level rises.",
                    (
                        gauge("tidegate_degradation_pressure_ratio", "pressure {{instance}}"),
                        gauge("tidegate_degradation_level", "level {{instance}}"),
                    ),
                ),
            ),
        ),
        Row(
            "Error budget",
            (
                Panel(
                    "Missed objectives, 1 h", "Of the requests that an objective holds for; interactive classes.",
                    (Query("tidegate:slo_missed:ratio_rate1h", "{{class}} {{objective}}"),), "percentunit",
                ),
                Panel(
                    "Pace of the error budget, 6 h", "1 spends the whole budget in its month, 6 raises an alert.",
                    (
                        Query(
                            "tidegate:slo_missed:ratio_rate6h / on (objective) group_left () tidegate:slo_budget:ratio",
                            "{{class}} {{objective}}",
                        ),
                    ), limits=(1, 6),
                ),
            ),
        ),
    ),
)  # fmt: skip

ENGINE: Final = Dashboard(
    "tidegate-engine",
    "Tidegate: engine",
    "vLLM's own figures beside those of the gate in front of it.",
    (
        Row(
            "KV cache",
            (
                Panel(
                    "KV cache tokens", "Promised to running requests, in use, and all there are.",
                    (
                        gauge("tidegate_kv_reserved_tokens", "promised {{instance}}"),
                        gauge("tidegate_kv_used_tokens", "in use {{instance}}"),
                        gauge("tidegate_kv_capacity_tokens", "all {{instance}}"),
                    ),
                ),
                Panel(
                    "Found in the prefix cache", "Share of prompt tokens.",
                    (
                        Query(
                            f"sum({rate('vllm:prefix_cache_hits_total')})"
                            f" / (sum({rate('vllm:prefix_cache_queries_total')}) > 0)",
                            "vLLM",
                        ),
                    ), "percentunit",
                ),
                Panel(
                    "Preemptions", "Sequences taken out of the engine for lack of KV cache, and batch lines put back.",
                    (
                        Query(summed("instance", "tidegate_engine_preemptions_total"), "preempted {{instance}}"),
                        Query(summed("instance", "tidegate_batch_evictions_total"), "put back {{instance}}"),
                    ), "reqps",
                ),
            ),
        ),
        Row(
            "Pace",
            (
                Panel(
                    "Between two tokens", "vLLM's inter-token latency.",
                    quantiles("vllm:inter_token_latency_seconds", "instance"), "s",
                ),
                Panel(
                    "Running", "Requests in the engine, and the cap that follows its pace.",
                    (
                        gauge("vllm:num_requests_running", "running {{instance}}"),
                        gauge("vllm:num_requests_waiting", "waiting in the engine {{instance}}"),
                        gauge("tidegate_running_cap", "cap {{instance}}"),
                    ),
                ),
                Panel(
                    "Speed", "Tokens per second, smoothed, as the gate's forecasts use them.",
                    (
                        gauge("tidegate_prefill_tokens_per_second", "prompt {{instance}}"),
                        gauge("tidegate_decode_tokens_per_second", "generated {{instance}}"),
                    ),
                ),
            ),
        ),
        Row(
            "Life",
            (
                Panel(
                    "Engines", "1 while an engine serves.", (gauge("tidegate_engine_up", "{{instance}}"),), "none",
                ),
                Panel(
                    "Restarts", "Engines that were replaced, and tries that failed, in the last hour.",
                    (
                        Query(
                            f"sum by (instance, reason) (increase(tidegate_engine_restarts_total{only()}[1h]))",
                            "{{instance}} {{reason}}",
                        ),
                        Query(
                            f"sum by (instance) (increase(tidegate_engine_failed_restarts_total{only()}[1h]))",
                            "{{instance}} failed",
                        ),
                    ),
                ),
                Panel(
                    "Requests at a death", "Run again on the next engine, or lost with the one that died.",
                    (
                        Query(f"sum(increase(tidegate_requests_rerun_total{only()}[1h]))", "run again"),
                        Query(
                            f"sum by (reason) (increase(tidegate_requests_lost_total{only()}[1h]))", "lost: {{reason}}"
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Long chats",
            (
                Panel(
                    "Cut prompts", "Prompts that lost messages or tokens to fit the window.",
                    (Query(f"sum({rate('tidegate_context_truncated_requests_total')})", "prompts"),), "reqps",
                ),
                Panel(
                    "Left out", "Per second.",
                    (
                        Query(f"sum({rate('tidegate_context_dropped_messages_total')})", "messages"),
                        Query(f"sum({rate('tidegate_context_dropped_tokens_total')})", "tokens"),
                    ),
                ),
                Panel(
                    "Time to fit", "Counting and planning of histories that do not fit by length.",
                    quantiles("tidegate_context_fit_duration_seconds", "instance"), "s",
                ),
            ),
        ),
    ),
)  # fmt: skip

TENANTS: Final = Dashboard(
    "tidegate-tenants",
    "Tidegate: tenants",
    "Who uses what, and whom a limit stopped.",
    (
        Row(
            "Tokens",
            tuple(
                Panel(
                    title, about,
                    (Query(f"topk(15, {summed('tenant', 'tidegate_tokens_total', label)})", "{{tenant}}"),),
                    stacked=True,
                )
                for title, about, label in (
                    ("Prompt tokens per second", "The 15 largest tenants.", PROMPT),
                    ("Generated tokens per second", "The 15 largest tenants.", 'kind="completion"'),
                )
            ),
            height=10,
        ),
        Row(
            "Kinds of work",
            (
                Panel(
                    "Online and batch", "Tokens per second, prompt and generated.",
                    (Query(summed("work, kind", "tidegate_tokens_total", 'kind!="cached"'), "{{work}} {{kind}}"),),
                    stacked=True,
                ),
                Panel(
                    "Found in the prefix cache", "Share of each tenant's prompt tokens, over an hour.",
                    (
                        Query(
                            f"sum by (tenant) (increase(tidegate_tokens_total{only(CACHED)}[1h]))"
                            f" / (sum by (tenant) (increase(tidegate_tokens_total{only(PROMPT)}[1h])) > 0)",
                            "{{tenant}}",
                        ),
                    ), "percentunit",
                ),
            ),
        ),
        Row(
            "Limits",
            (
                Panel(
                    "Refused by a limit", "By the limit they met.",
                    (Query(summed("limit", "tidegate_limit_refusals_total"), "{{limit}}"),), "reqps",
                ),
                Panel(
                    "Charging a request", "One round trip to Redis.",
                    quantiles("tidegate_limiter_duration_seconds", "instance"), "s",
                ),
                Panel(
                    "Limits without Redis", "1 while a replica limits alone.",
                    (gauge("tidegate_limits_local", "{{instance}}"),), "none",
                ),
            ),
        ),
    ),
)  # fmt: skip

BATCHES: Final = Dashboard(
    "tidegate-batches",
    "Tidegate: batches and fallback",
    "Work that nobody waits for, and answers from other servers.",
    (
        Row(
            "Batches",
            (
                Panel(
                    "Lines", "By what became of them.",
                    (Query(summed("state", "tidegate_batch_lines_total"), "{{state}}"),), "reqps", stacked=True,
                ),
                Panel(
                    "Left to do", "Lines without an answer yet, and batches that have not ended.",
                    (
                        Query(f"max(tidegate_batch_lines_pending{only()})", "lines"),
                        Query(f"max(tidegate_batches_open{only()})", "batches"),
                    ),
                ),
                Panel(
                    "Age of the oldest batch", "After 24 hours its open lines expire.",
                    (Query(f"max(tidegate_batch_queue_age_seconds{only()})", "age"),), "s",
                ),
            ),
        ),
        Row(
            "How they run",
            (
                Panel(
                    "Lines in flight", "At the gate, and in the engine.",
                    (Query(f"sum by (where) (tidegate_batch_lines_in_flight{only()})", "{{where}}"),),
                ),
                Panel(
                    "Share of the engine's time", "Time in which the engine worked on at least one line.",
                    (Query(rate("tidegate_batch_engine_seconds_total"), "{{instance}}"),), "percentunit",
                ),
                Panel(
                    "Tokens per second", "Of lines that were answered.",
                    (Query(summed("kind", "tidegate_batch_tokens_total"), "{{kind}}"),),
                ),
            ),
        ),
        Row(
            "Fallback",
            (
                Panel(
                    "Upstreams", "1 while an upstream answers.",
                    (gauge("tidegate_fallback_up", "{{upstream}} {{instance}}"),), "none",
                ),
                Panel(
                    "Requests to upstreams", "By how they ended.",
                    (
                        Query(
                            summed("upstream, outcome", "tidegate_fallback_requests_total"), "{{upstream}} {{outcome}}"
                        ),
                    ),
                    "reqps", stacked=True,
                ),
                Panel(
                    "Degraded requests", "Requests that a level changed or refused, and changes of the level.",
                    (
                        Query(summed("level", "tidegate_degraded_requests_total"), "level {{level}}"),
                        Query(summed("to", "tidegate_degradation_transitions_total"), "to level {{to}}"),
                    ), "reqps",
                ),
            ),
        ),
    ),
)  # fmt: skip

DASHBOARDS: Final = (OVERVIEW, ENGINE, TENANTS, BATCHES)


def rendered(dashboard: Dashboard) -> str:
    """The file's text."""
    return json.dumps(dashboard.json(), indent=2) + "\n"


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(rendered(dashboard), encoding="utf-8")


if __name__ == "__main__":
    write()
