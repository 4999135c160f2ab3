"""The first page to look at."""

from typing import Final

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import INTERACTIVE, gauge, missed, number, only, quantiles, rate, summed

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
