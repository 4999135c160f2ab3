"""Fair turns between tenants, by the tokens they were served: the Virtual Token Counter.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024. The tenant with the lowest counter is next. A
tenant that comes back is lifted to the lowest counter among those who wait, so that it cannot save up turns.
"""

from collections.abc import Iterable
from typing import Final

# A token of an answer costs about as much as two of a prompt (the paper's weights).
_PROMPT_WEIGHT: Final = 1.0
_COMPLETION_WEIGHT: Final = 2.0


def cost(prompt_tokens: float, completion_tokens: float) -> float:
    """The weighted tokens of one request."""
    return _PROMPT_WEIGHT * prompt_tokens + _COMPLETION_WEIGHT * completion_tokens


class TokenCounters:
    """One counter for each tenant that ever waited."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._last_served = 0.0  # the counter of whom the queue saw last: what a new one starts from when none waits

    def __getitem__(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def arrived(self, tenant: str, waiting: Iterable[str]) -> None:
        """`tenant` begins to wait beside those in `waiting`; it did not wait before."""
        floor = min((self[other] for other in waiting), default=self._last_served)
        self._counters[tenant] = max(self[tenant], floor)

    def next_of(self, tenants: Iterable[str]) -> str:
        """Whose turn it is among `tenants`, of which there is at least one."""
        return min(tenants, key=self.__getitem__)

    def charge(self, tenant: str, tokens: float) -> None:
        """Add weighted tokens; the difference to what was expected may be negative."""
        self._counters[tenant] = self[tenant] + tokens

    def served(self, tenant: str, tokens: float) -> None:
        """`tenant` had its turn."""
        self.charge(tenant, tokens)
        self._last_served = max(self._last_served, self[tenant])
