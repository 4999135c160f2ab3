"""The tenants' page."""

from typing import Final

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import CACHED, LIMITED, PROMPT, gauge, only, quantiles, summed

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
                    "Stopped by a limit", "Requests that a tenant's own limit refused; the 15 with most of them.",
                    (
                        Query(
                            f"topk(15, {summed('tenant', 'tidegate_tenant_requests_total', LIMITED)})", "{{tenant}}"
                        ),
                    ), "reqps", stacked=True,
                ),
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
