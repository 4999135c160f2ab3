import random
from collections.abc import Iterator
from typing import Any, SupportsIndex, overload

import pytest

from server.policy.context import Window, plan_fit
from server.policy.turns import MessageView, lay_out, view
from tests.policy.random_histories import Case, Message, converse


class CountedTokens(int):
    """A token count that knows how often any such counts were added up, subtracted or compared."""

    operations = 0

    def _counted(self, value: int) -> "CountedTokens":
        CountedTokens.operations += 1
        return CountedTokens(value)

    def __add__(self, other: int) -> "CountedTokens":
        return self._counted(int(self) + int(other))

    def __radd__(self, other: int) -> "CountedTokens":
        return self._counted(int(other) + int(self))

    def __sub__(self, other: int) -> "CountedTokens":
        return self._counted(int(self) - int(other))

    def __gt__(self, other: int) -> bool:
        CountedTokens.operations += 1
        return int(self) > int(other)

    def __le__(self, other: int) -> bool:
        CountedTokens.operations += 1
        return int(self) <= int(other)


class CountedViews(list[MessageView]):
    """Messages that count how many of them were read, slices included."""

    reads = 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> MessageView: ...
    @overload
    def __getitem__(self, index: slice) -> list[MessageView]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> MessageView | list[MessageView]:
        found = super().__getitem__(index)
        self.reads += len(found) if isinstance(found, list) else 1
        return found

    def __iter__(self) -> Iterator[MessageView]:
        for message in super().__iter__():
            self.reads += 1
            yield message


def short_turns(count: int) -> list[Message]:
    return [{"role": "user"}, {"role": "assistant"}] * (count // 2)


def one_agents_turn(count: int) -> list[Message]:
    steps = [
        message
        for i in range(count // 2)
        for message in (
            {"role": "assistant", "tool_calls": [{"id": f"call_{i}"}]},
            {"role": "tool", "tool_call_id": f"call_{i}"},
        )
    ]
    return [{"role": "user"}, *steps]


def results_at_the_very_end(count: int) -> list[Message]:
    calls = [{"role": "assistant", "tool_calls": [{"id": f"call_{i}"}]} for i in range(count // 3)]
    asked = [message for call in calls for message in ({"role": "user"}, call)]
    return [*asked, *({"role": "tool", "tool_call_id": f"call_{i}"} for i in range(count // 3))]


@pytest.mark.parametrize("write", [short_turns, one_agents_turn, results_at_the_very_end])
@pytest.mark.parametrize("max_model_len", [500, 8000])
def test_ten_thousand_tiny_messages_are_planned_in_a_few_operations_each(write: Any, max_model_len: int) -> None:
    messages = write(10_000)
    views = CountedViews(view(message) for message in messages)
    layout = lay_out(views)
    assert views.reads <= 6 * len(messages)
    CountedTokens.operations = 0
    fit = plan_fit(layout, [CountedTokens(1)] * len(messages), Window(max_model_len, reserve_tokens=100), 0.8)
    assert fit.truncated
    assert CountedTokens.operations <= 12 * len(messages)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_history_is_fitted_like_any_other(seed: int) -> None:
    rng = random.Random(seed)
    messages = converse(rng, turns=300)
    case = Case(messages, [rng.randrange(1, 9) for _ in messages], Window(800, 100), 0.8)
    fit = case.fit()
    assert fit.kept_tokens <= 700
    assert not case.only(fit.kept).fit().truncated
