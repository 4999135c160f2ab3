"""The engine's page."""

from typing import Final

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import gauge, only, quantiles, rate, summed

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
