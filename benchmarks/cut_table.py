"""How far back a cut should go: hit rate, prefill and history for retention ratios, windows and conversations.

Nothing is served: the tokens of every message are counted once, and the rule is applied to the counts
(`cut_rules.py`). The last columns show what no rule can pass that drops oldest exchanges whole and keeps as much
history as the bar asks for, even if it knew the rest of the conversation.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks import conversations
from benchmarks.command import embedded_model
from benchmarks.conversations import Conversation
from benchmarks.cut_rules import PRICES, Cache, Cost, Sizes, best_possible, cheapest_cuts, cost_of, sticky_cuts

_MAX_RESERVE_TOKENS: Final = 1024
_HISTORY_BAR: Final = 0.85
_LEAST_EXCHANGE_TOKENS: Final = 32
_WINDOWS: Final = (2048, 8192)
_RATIOS: Final = (0.6, 0.7, 0.76, 0.8, 0.9)
_TABLE_WIDTH: Final = 200

CountAll = Callable[[list[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is worked out. A conversation is followed until its history fills `spans` windows past the first."""

    windows: Sequence[int]
    ratios: Sequence[float]
    kinds: Sequence[str]
    conversations: int  # of each kind
    spans: int
    cache: Cache
    data: Path | None
    seed: int

    def material(self, window: int) -> Iterator[Conversation]:
        if self.data is not None:
            yield from conversations.read(self.data)
            return
        exchanges = (self.spans + 1) * window // _LEAST_EXCHANGE_TOKENS
        for kind in self.kinds:
            for number in range(self.conversations):
                yield conversations.generate(kind, self.seed + number, exchanges)


@dataclass(frozen=True, slots=True)
class Line:
    """The costs of one kind of conversations in one window."""

    window: int
    kind: str
    exchange_tokens: float
    drop_oldest: Cost
    by_ratio: Sequence[Cost]
    by_price: Sequence[Cost]

    @property
    def best(self) -> Cost | None:
        return best_possible(self.by_price, _HISTORY_BAR * self.drop_oldest.prompt)

    def as_dict(self, ratios: Sequence[float]) -> dict[str, Any]:
        """For `--json`."""
        return {
            "window": self.window,
            "kind": self.kind,
            "exchange_tokens": self.exchange_tokens,
            "drop_oldest": self._figures(self.drop_oldest),
            "ratios": {str(ratio): self._figures(cost) for ratio, cost in zip(ratios, self.by_ratio, strict=True)},
            "best_possible": self._figures(self.best) if self.best else None,
        }

    def cells(self) -> Iterator[str]:
        """The line as the table shows it."""
        yield from (f"{self.window:,}", self.kind, f"{self.exchange_tokens:,.0f}", f"{self.drop_oldest.hit_ratio:.0%}")
        for cost in (*self.by_ratio, self.best):
            hit, prefill, history, *_ = self._figures(cost).values() if cost else (None, None, None)
            yield "-" if hit is None else f"{hit:.0%} · {prefill:.2f} · {history:.2f}"

    def _figures(self, cost: Cost) -> dict[str, float]:
        return {
            "prefix_hit_ratio": cost.hit_ratio,
            "prefill_of_drop_oldest": cost.prefill / self.drop_oldest.prefill,
            "history_of_drop_oldest": cost.prompt / self.drop_oldest.prompt,
            "cutting_turns_ratio": cost.cuts / cost.turns,
        }


def worked_out(plan: Plan, count_all: CountAll) -> Iterator[Line]:
    """The table's lines, window by window; with several kinds also all of them, a turn of each kind against another."""
    for window in plan.windows:
        by_kind: dict[str, list[Sizes]] = {}
        for conversation in plan.material(window):
            by_kind.setdefault(conversation.kind, []).append(_sizes(conversation, window, count_all))
        lines = [line for kind, sizes in by_kind.items() if (line := _line(plan, window, kind, sizes))]
        yield from lines
        if len(lines) > 1:
            yield _together(lines)


def _room(window: int) -> int:
    """A window less Tidegate's default reserve."""
    return window - min(_MAX_RESERVE_TOKENS, window // 4)


def _sizes(conversation: Conversation, window: int, count_all: CountAll) -> Sizes:
    """Without questions that alone are too long, which `long-chat` leaves out as well."""
    texts = [conversation.system, *(text for said in conversation.exchanges for text in (said.user, said.assistant))]
    head, *counts = count_all(texts)
    most = _room(window) - head - _LEAST_EXCHANGE_TOKENS
    pairs = zip(counts[::2], counts[1::2], strict=True)
    return Sizes.of(head, [(asked, said) for asked, said in pairs if asked <= most])


def _line(plan: Plan, window: int, kind: str, all_sizes: Sequence[Sizes]) -> Line | None:
    replayed = [(sizes, turns) for sizes in all_sizes if (turns := _turns(sizes, window, plan.spans))]
    room = _room(window)

    def sticky(ratio: float) -> Cost:
        costs = (cost_of(sticky_cuts(sizes, room, ratio), sizes, turns, plan.cache) for sizes, turns in replayed)
        return sum(costs, Cost())

    def cheapest(price: float) -> Cost:
        cuts = [cheapest_cuts(sizes, room, turns, plan.cache, price) for sizes, turns in replayed]
        costs = (cost_of(cut, sizes, turns, plan.cache) for cut, (sizes, turns) in zip(cuts, replayed, strict=True))
        return sum(costs, Cost())

    if not replayed:
        return None
    tokens = sum(sizes.before[turns.stop] - sizes.before[turns.start] for sizes, turns in replayed)
    exchange = tokens / sum(len(turns) for _, turns in replayed)
    by_ratio, by_price = list(map(sticky, plan.ratios)), list(map(cheapest, PRICES))
    return Line(window, kind, exchange, sticky(1.0), by_ratio, by_price)


def _turns(sizes: Sizes, window: int, spans: int) -> range:
    """From the last question within the window; empty for a conversation that never leaves it."""
    past, end = sizes.past(window), sizes.past((1 + spans) * window)
    return range(past - 1, end) if 0 < past < end else range(0)


def _together(lines: Sequence[Line]) -> Line:
    def mean(costs: Iterable[Cost]) -> Cost:
        return sum((cost.of_one_turn() for cost in costs), Cost())

    return Line(
        lines[0].window,
        "all",
        sum(line.exchange_tokens for line in lines) / len(lines),
        mean(line.drop_oldest for line in lines),
        [mean(costs) for costs in zip(*(line.by_ratio for line in lines), strict=True)],
        [mean(costs) for costs in zip(*(line.by_price for line in lines), strict=True)],
    )


def _shown(lines: Iterable[Line], ratios: Sequence[float]) -> Table:
    table = Table(box=box.MARKDOWN)
    headings = ("window", "conversations", "exchange, tokens", "hit rate, drop-oldest")
    for heading in (*headings, *(f"ratio {ratio:g}" for ratio in ratios), "any rule"):
        table.add_column(heading, justify="left" if heading == "conversations" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.cells())
    return table


@click.command("cut-table")
@click.option("--model", help="Folder or name of the model whose tokenizer counts. [default: the embedded model]")
@click.option("--window", "windows", type=click.IntRange(512), multiple=True, help="Repeatable. [default: 2048, 8192]")
@click.option(
    "--ratio", "ratios", type=click.FloatRange(0, 1, min_open=True), multiple=True,
    help="Repeatable. [default: 0.6, 0.7, 0.76, 0.8, 0.9]",
)  # fmt: skip
@click.option(
    "--kind", "kinds", type=click.Choice(conversations.KINDS), multiple=True, help="Repeatable. [default: all]"
)
@click.option("--conversations", type=click.IntRange(1), default=8, show_default=True, help="Of each kind.")
@click.option("--spans", type=click.IntRange(1), default=4, show_default=True, help="Windows that each goes on for.")
@click.option("--block-size", type=click.IntRange(1), default=32, show_default=True, help="Of the prefix cache.")
@click.option("--cold-answers", is_flag=True, help="The cache holds no answers, only what was asked.")
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file in ShareGPT's format."
)
@click.option("--seed", default=0, show_default=True, help="Other numbers generate other conversations.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
def command(model: str | None, block_size: int, cold_answers: bool, as_json: bool, **given: Any) -> None:
    """What retention ratios cost and keep, and what no rule can pass. Counts only: nothing is served."""
    plan = Plan(cache=Cache(block_size, answers=not cold_answers), **given)
    plan = replace(
        plan,
        windows=plan.windows or _WINDOWS,
        ratios=plan.ratios or _RATIOS,
        kinds=plan.kinds or conversations.KINDS,
    )
    tokenizer = AutoTokenizer.from_pretrained(model or embedded_model())

    def count_all(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    lines = list(worked_out(plan, count_all))
    if not lines:
        raise click.ClickException("No conversation goes past the window. Give other data, or a smaller --window.")
    console = Console(width=_TABLE_WIDTH)
    console.print(_shown(lines, plan.ratios))
    console.print("hit rate · prefill / drop-oldest's · history / drop-oldest's", highlight=False)
    if as_json:
        click.echo(json.dumps({"benchmark": "cut-table", "lines": [line.as_dict(plan.ratios) for line in lines]}))
