"""Long chats past the window: how much each turn has to prefill, and how long its first token takes.

The same histories are asked in three ways, turn by turn, on the same engine settings:

- to Tidegate, which gets the whole history and fits it;
- to plain vLLM, which gets the whole history and keeps its newest tokens (`truncate_prompt_tokens`);
- to plain vLLM by a client that drops oldest turns until the rest leaves room for an answer, with Tidegate's reserve.

The answers in the histories are fixed texts, so that all three see the same; each turn generates only a few tokens.
Counting for the client that drops turns is not charged to it. The last two share a server, and a salt at the start of
each system prompt keeps their cached prefixes apart.
"""

import json
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import contenders, conversations
from benchmarks.command import _embedded_model as embedded_model
from benchmarks.comparison import say
from benchmarks.contenders import MODEL_NAME, Contender, ContenderFailed, shown_settings, started
from benchmarks.conversations import Conversation, Message
from benchmarks.load import LoadFailed
from benchmarks.long_chat_report import DROP_OLDEST, SLICING, TIDEGATE, Report, Turn, plot

_MAX_TOKENS: Final = 8
_MAX_RESERVE_TOKENS: Final = 1024
_BLOCK_TOKENS: Final = 32
# Generated exchanges are longer than this on average, so a window's worth of them goes past the window.
_LEAST_EXCHANGE_TOKENS: Final = 32
_TEMPLATE_TOKENS: Final = 64
# What slicing and dropping write between two turns of one conversation, so that neither evicts the other's prefix.
_LEAST_CACHED_WINDOWS: Final = 3
_TIMEOUT_S: Final = 600.0
_DATA: Final = "data: {"
_DROPPED: Final = re.compile(r"messages=(\d+)")
_ONLY_WORD: Final = " tide"

Count = Callable[[list[Message]], int]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is replayed: `turns` past the window in each of so many conversations."""

    window: int
    turns: int
    conversations: int
    kinds: Sequence[str]
    data: Path | None
    seed: int

    @property
    def budget(self) -> int:
        """The longest prompt of a client that drops turns."""
        return self.window - min(_MAX_RESERVE_TOKENS, self.window // 4)

    def material(self) -> Iterator[Conversation]:
        """Conversations without end, or those of the file; many of these may be too short."""
        if self.data is not None:
            yield from conversations.read(self.data)
            return
        exchanges = self.window // _LEAST_EXCHANGE_TOKENS + self.turns
        for number in range(self.conversations):
            yield conversations.generate(self.kinds[number % len(self.kinds)], self.seed + number, exchanges)


@dataclass(frozen=True, slots=True)
class Replay:
    """A conversation and the turns of it that are asked; the first one is not measured, it fills the caches."""

    number: int
    conversation: Conversation
    turns: range


@dataclass(frozen=True, slots=True)
class Way:
    """A way to keep a history within the window. `fields` are added to each request; the salt is its own."""

    name: str
    client: httpx.Client
    salt: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Answer:
    ttft_s: float
    usage: dict[str, Any]
    dropped_messages: int


def run(plan: Plan, model: str, engine_flags: Sequence[str]) -> Report:
    """Start both servers and replay the conversations on them."""
    flags = (
        "--max-model-len", str(plan.window), "--block-size", str(_BLOCK_TOKENS), "--enable-prompt-tokens-details",
        *engine_flags,
    )  # fmt: skip
    with ExitStack() as stack:
        servers = [
            stack.enter_context(started(kind, model, flags)) for kind in (contenders.TIDEGATE, contenders.PLAIN)
        ]
        for server in servers:
            say(f"{server.name} ready after {server.wait_until_ready():.1f} s (both were starting)")
        ours, plain = (stack.enter_context(_client(server)) for server in servers)
        _check_cache(plain, plan.window)
        turns = [turn for replay in _replays(plan, plain) for turn in _replayed(replay, plan, ours, plain)]
    if not turns:
        raise LoadFailed("No conversation goes past the window. Give other data or a smaller --window.")
    settings = {
        **shown_settings(model, flags),
        "window": plan.window,
        "max_tokens": _MAX_TOKENS,
        "drop_oldest_budget_tokens": plan.budget,
        "data": plan.data.name if plan.data else list(plan.kinds),
        "seed": plan.seed,
    }
    replayed = len({turn.conversation for turn in turns})
    notes = [
        f"{len(turns) // 3} turns of {replayed} conversations, each past the window of {plan.window} tokens; one "
        "conversation at a time, so that nothing competes for the prefix cache.",
        "TTFT holds all that a request takes: sending and parsing the whole history, fitting it, rendering, prefill.",
    ]
    return Report(plan.window, settings, turns, notes)


def _client(server: Contender) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=_TIMEOUT_S, trust_env=False)


def _check_cache(plain: httpx.Client, window: int) -> None:
    families = text_string_to_metric_families(plain.get("/metrics").text)
    sizes = [sample.labels.get("kv_cache_size_tokens", "") for family in families for sample in family.samples]
    size = next((int(size) for size in sizes if size.isdigit()), None)
    if size is not None and size < _LEAST_CACHED_WINDOWS * window:
        raise LoadFailed(
            f"Plain vLLM's KV cache holds {size} tokens, less than {_LEAST_CACHED_WINDOWS} windows: two ways share it "
            "and would evict each other's prefixes. Give it more (on a CPU, VLLM_CPU_KVCACHE_SPACE in GiB)."
        )


def _replays(plan: Plan, plain: httpx.Client) -> Iterator[Replay]:
    """The conversations that go past the window, with the turns from the last one within it."""

    def count(messages: list[Message]) -> int:
        answer = plain.post("/tokenize", json={"model": MODEL_NAME, "messages": messages}).raise_for_status()
        tokens: int = answer.json()["count"]
        return tokens

    def playable() -> Iterator[tuple[Conversation, range]]:
        for given in plan.material():
            conversation = _without_endless_questions(given, plan.budget, count)
            asked = range(len(conversation.exchanges))
            past = bisect_right(asked, plan.window, key=lambda turn: count(conversation.messages(turn)))
            if 0 < past < len(asked):
                yield conversation, range(past - 1, min(past + plan.turns, len(asked)))

    for number, (conversation, turns) in enumerate(islice(playable(), plan.conversations), start=1):
        say(f"conversation {number} of {plan.conversations}, {conversation.kind}: turns {turns.start + 2} to {turns.stop}")
        yield Replay(number, conversation, turns)


def _without_endless_questions(conversation: Conversation, budget: int, count: Count) -> Conversation:
    """Without exchanges whose question alone is too long: no way of dropping older turns answers those."""

    def fits(turn: int) -> bool:
        most_tokens = len((conversation.system + conversation.exchanges[turn].user).encode()) + _TEMPLATE_TOKENS
        return most_tokens <= budget or count(conversation.messages(turn, dropped=turn)) <= budget

    asked = range(len(conversation.exchanges))
    return replace(conversation, exchanges=[conversation.exchanges[turn] for turn in asked if fits(turn)])
