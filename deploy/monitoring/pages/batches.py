"""The page of batches and fallbacks."""

from typing import Final

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import gauge, only, rate, summed

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
