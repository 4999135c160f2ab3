"""Long chats past the window: how much each turn has to prefill, and how long its first token takes.

The same histories are asked in three ways, turn by turn, on the same engine settings:

- Tidegate gets the whole history and fits it;
- plain vLLM gets the whole history and keeps its newest tokens (`truncate_prompt_tokens`);
- a client of plain vLLM drops oldest turns until the rest leaves room for an answer, as much as Tidegate leaves.

The answers in the histories are fixed texts, so that all three see the same; a turn generates only a few tokens. In a
real chat the cache holds each prompt together with the answer that was generated after it. So between two turns the
fixed answer is sent after its prompt, which is not measured and leaves the same blocks in the cache. Token slicing goes
without: its next prompt begins elsewhere, whatever is cached.

Counting for the client that drops turns is not charged to it. The last two share a server, and a salt at the start of
each system prompt keeps their cached prefixes apart. Before each request both servers come to rest.
"""

import json
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import contenders, conversations
from benchmarks.command import embedded_model
from benchmarks.comparison import say
from benchmarks.contenders import MODEL_NAME, Contender, ContenderFailed, shown_settings, started
from benchmarks.conversations import Conversation, Message
from benchmarks.load import LoadFailed
from benchmarks.long_chat_report import DROP_OLDEST, SLICING, TIDEGATE, WAYS, Report, Turn, plot

_MAX_TOKENS: Final = 8
_MAX_RESERVE_TOKENS: Final = 1024
_ONLY_WORD: Final = " tide"
_SALTS: Final[Mapping[str, str]] = {TIDEGATE: "A", SLICING: "B", DROP_OLDEST: "C"}
# Generated exchanges are longer than this on average, so a window's worth of them goes past the window.
_LEAST_EXCHANGE_TOKENS: Final = 32
_TEMPLATE_TOKENS: Final = 64
# Slicing and dropping share a cache; with less than this, what one writes in a turn evicts the other's prefix.
_LEAST_CACHED_WINDOWS: Final = 3
_TIMEOUT_S: Final = 600.0
_TURNS: Final = 24
_QUICK_TURNS: Final = 5
_DATA: Final = "data: "
_DONE: Final = "data: [DONE]"
_DROPPED: Final = re.compile(r"messages=(\d+)")

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
    cold_answers: bool

    @property
    def longest_prompt(self) -> int:
        """What token slicing keeps."""
        return self.window - _MAX_TOKENS

    @property
    def budget(self) -> int:
        """The longest prompt of a client that drops turns: the reserve is Tidegate's default."""
        return self.window - min(_MAX_RESERVE_TOKENS, self.window // 4)

    def material(self) -> Iterator[Conversation]:
        """Generated conversations, or those of the file, of which many may be too short."""
        if self.data is not None:
            yield from conversations.read(self.data)
            return
        exchanges = self.window // _LEAST_EXCHANGE_TOKENS + self.turns
        for number in range(self.conversations):
            yield conversations.generate(self.kinds[number % len(self.kinds)], self.seed + number, exchanges)


@dataclass(frozen=True, slots=True)
class Replay:
    """A conversation and the turns of it that are asked. The first of them only fills the caches."""

    number: int
    conversation: Conversation
    turns: range

    def messages(self, way: str, turn: int, dropped: int = 0) -> list[Message]:
        """What is sent to ask a question, without the `dropped` oldest exchanges."""
        return self.conversation.messages(turn, dropped, f"{_SALTS[way]}{self.number}.")

    def answered(self, way: str, turn: int, dropped: int) -> list[Message]:
        """The same with the answer, as an engine that generated it has it in its cache."""
        answer = {"role": "assistant", "content": self.conversation.exchanges[turn].assistant}
        return [*self.messages(way, turn, dropped), answer]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to keep a history within the window. `fields` go into each request."""

    name: str
    client: httpx.Client
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """Both servers, and the ways that ask them. `counter` is the client that counts tokens."""

    servers: Sequence[Contender]
    ways: Sequence[Way]
    counter: httpx.Client

    def count(self, messages: list[Message]) -> int:
        """The tokens of a chat as the template prints it."""
        answer = self.counter.post("/tokenize", json={"model": MODEL_NAME, "messages": messages}).raise_for_status()
        tokens: int = answer.json()["count"]
        return tokens

    def rest(self) -> None:
        """Wait until no engine spins: two of the ways share one, and would find it awake, and ours never."""
        for server in self.servers:
            server.wait_until_idle()


@dataclass(frozen=True, slots=True)
class _Answer:
    """`dropped_messages` is what the server says that it left out."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    dropped_messages: int


def run(plan: Plan, model: str, engine_flags: Sequence[str]) -> Report:
    """Start both servers and replay the conversations on them. Raises `ContenderFailed` and `LoadFailed`."""
    flags = (
        "--max-model-len", str(plan.window), "--block-size", "32", "--enable-prompt-tokens-details", *engine_flags,
    )  # fmt: skip
    with ExitStack() as opened:
        kinds = (contenders.TIDEGATE, contenders.PLAIN)
        servers = [opened.enter_context(started(kind, model, flags)) for kind in kinds]
        for server in servers:
            say(f"{server.name} ready after {server.wait_until_ready():.1f} s (both were starting)")
        ours, plain = (opened.enter_context(_client(server)) for server in servers)
        _check_cache(plain, plan.window)
        stage = Stage(servers, _ways(plan, ours, plain), plain)
        turns = [turn for replay in _replays(plan, stage) for turn in _replayed(replay, plan, stage)]
    if not turns:
        raise LoadFailed("No conversation goes past the window. Give other data, or a smaller --window.")
    settings = {**shown_settings(model, flags), **_shown(plan)}
    replayed = len({turn.conversation for turn in turns})
    notes = [
        f"{len(turns) // len(WAYS)} turns past the window of {plan.window} tokens (conversations: {replayed}); one "
        "conversation at a time, so nothing else competes for the prefix cache.",
        "TTFT is all that a request takes: sending and parsing the history, fitting and rendering it, and the prefill.",
    ]
    return Report(plan.window, settings, turns, notes)


def _shown(plan: Plan) -> dict[str, Any]:
    return {
        "window": plan.window,
        "max_tokens": _MAX_TOKENS,
        "drop_oldest_budget_tokens": plan.budget,
        "data": plan.data.name if plan.data else list(plan.kinds),
        "answers_in_prefix_cache": not plan.cold_answers,
        "seed": plan.seed,
    }


def _client(server: Contender) -> httpx.Client:
    # A connection for each request: kept ones may or may not have been closed while another way was asked.
    fresh = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=server.url, timeout=_TIMEOUT_S, trust_env=False, limits=fresh)


def _check_cache(plain: httpx.Client, window: int) -> None:
    families = text_string_to_metric_families(plain.get("/metrics").text)
    sizes = [sample.labels.get("kv_cache_size_tokens", "") for family in families for sample in family.samples]
    size = next((int(size) for size in sizes if size.isdigit()), None)
    if size is not None and size < _LEAST_CACHED_WINDOWS * window:
        raise LoadFailed(
            f"Plain vLLM's KV cache holds {size} tokens, less than {_LEAST_CACHED_WINDOWS} windows: two ways share it "
            "and would evict each other's prefixes. Give it more (on a CPU, VLLM_CPU_KVCACHE_SPACE in GiB)."
        )


def _ways(plan: Plan, ours: httpx.Client, plain: httpx.Client) -> tuple[Way, ...]:
    # Every answer is the same word: no token without text, and none that ends the answer, blurs the first one's time.
    word = plain.post("/tokenize", json={"prompt": _ONLY_WORD, "add_special_tokens": False}).raise_for_status()
    fields = {
        "model": MODEL_NAME,
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "logit_bias": {str(word.json()["tokens"][-1]): 100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sliced = {"truncate_prompt_tokens": plan.longest_prompt, "truncation_side": "left"}
    return Way(TIDEGATE, ours, fields), Way(SLICING, plain, {**fields, **sliced}), Way(DROP_OLDEST, plain, fields)


def _replays(plan: Plan, stage: Stage) -> Iterator[Replay]:
    """The conversations that go past the window, with their turns from the last one within it."""
    number = 0
    for given in plan.material():
        conversation = _without_endless_questions(given, plan.budget, stage.count)
        past = _first_turn_past(plan.window, conversation, stage.count)
        if not 0 < past < len(conversation.exchanges):
            continue
        turns = range(past - 1, min(past + plan.turns, len(conversation.exchanges)))
        number += 1
        say(f"conversation {number} of {plan.conversations}, {conversation.kind}: turns {past + 1} to {turns.stop}")
        yield Replay(number, conversation, turns)
        if number == plan.conversations:
            return


def _first_turn_past(window: int, conversation: Conversation, count: Count) -> int:
    asked = range(len(conversation.exchanges))
    return bisect_right(asked, window, key=lambda turn: count(conversation.messages(turn)))


def _without_endless_questions(conversation: Conversation, budget: int, count: Count) -> Conversation:
    """Without exchanges whose question alone is too long: dropping older turns does not help there."""

    def fits(turn: int) -> bool:
        most_tokens = len((conversation.system + conversation.exchanges[turn].user).encode()) + _TEMPLATE_TOKENS
        return most_tokens <= budget or count(conversation.messages(turn, dropped=turn)) <= budget

    asked = range(len(conversation.exchanges))
    return replace(conversation, exchanges=[conversation.exchanges[turn] for turn in asked if fits(turn)])


def _replayed(replay: Replay, plan: Plan, stage: Stage) -> Iterator[Turn]:
    """Ask the turns of one conversation in every way; each turn begins with another way."""
    dropped, cuts = 0, dict[str, int | None]()
    for turn in replay.turns:
        dropped = _drop_oldest(replay, turn, dropped, lambda prompt: stage.count(prompt) <= plan.budget)
        first = turn % len(stage.ways)
        for way in (*stage.ways[first:], *stage.ways[:first]):
            stage.rest()
            answer = _ask(way, replay.messages(way.name, turn, dropped if way.name == DROP_OLDEST else 0))
            cut = {TIDEGATE: answer.dropped_messages, SLICING: None, DROP_OLDEST: 2 * dropped}[way.name]
            if cut is not None and not plan.cold_answers:
                _fill_cache(way, replay.answered(way.name, turn, cut // 2), plan.window)
            if turn != replay.turns.start:
                yield _noted(replay, turn, way.name, answer, cut, cutting=cut is None or cut != cuts[way.name])
            cuts[way.name] = cut


def _drop_oldest(replay: Replay, turn: int, dropped: int, fits: Callable[[list[Message]], bool]) -> int:
    """How many exchanges a client drops that drops no more than it must. It never takes one back."""
    candidates = range(dropped, turn)
    return dropped + bisect_left(candidates, True, key=lambda cut: fits(replay.messages(DROP_OLDEST, turn, cut)))


def _noted(replay: Replay, turn: int, way: str, answer: _Answer, cut: int | None, *, cutting: bool) -> Turn:
    whole = 2 * turn + 2  # the system prompt, the exchanges before, and the question
    if cut == 0:
        raise LoadFailed(f"{way} dropped nothing from a history that is longer than the window")
    return Turn(
        conversation=replay.number,
        kind=replay.conversation.kind,
        turn=turn + 1,
        way=way,
        ttft_s=answer.ttft_s,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        whole_messages=whole,
        kept_messages=None if cut is None else whole - cut,
        cutting=cutting,
    )


def _ask(way: Way, messages: list[Message]) -> _Answer:
    """Ask and read the streamed answer. The clock runs from before the body is encoded to the first token's frame."""
    started_s, ttft_s, usage = time.perf_counter(), None, dict[str, Any]()
    with way.client.stream("POST", "/v1/chat/completions", json={**way.fields, "messages": messages}) as response:
        if response.status_code != httpx.codes.OK:
            raise LoadFailed(f"{way.name} answered {response.status_code}: {response.read().decode()[:300]}")
        for line in response.iter_lines():
            if not line.startswith(_DATA) or line == _DONE:
                continue
            frame = json.loads(line.removeprefix(_DATA))
            if "error" in frame:
                raise LoadFailed(f"{way.name} broke an answer off: {frame['error']}")
            if ttft_s is None and any(choice["delta"].get("content") for choice in frame.get("choices", ())):
                ttft_s = time.perf_counter() - started_s
            usage = frame.get("usage") or usage
        told = _DROPPED.match(response.headers.get("x-context-truncated", ""))
    if ttft_s is None or usage.get("completion_tokens") != _MAX_TOKENS:
        raise LoadFailed(f"{way.name} was asked for {_MAX_TOKENS} tokens, and its usage says {usage}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return _Answer(ttft_s, usage["prompt_tokens"], cached, int(told[1]) if told else 0)


def _fill_cache(way: Way, messages: list[Message], window: int) -> None:
    """Have the engine compute a prompt and its answer, as far as the window goes, without an end mark."""
    body = {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": 1,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "truncate_prompt_tokens": window - 1,
        "truncation_side": "right",
    }
    if way.name == TIDEGATE:  # an answer may be over the budget, and may move no cut before the next question
        body["truncation"] = "disabled"
    answer = way.client.post("/v1/chat/completions", json=body)
    if answer.status_code != httpx.codes.OK:
        raise LoadFailed(f"{way.name} answered {answer.status_code} to an answer's text: {answer.text[:300]}")


@click.command("long-chat")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--window", type=click.IntRange(512), default=2048, show_default=True, help="Tokens a model can see.")
@click.option("--turns", type=click.IntRange(1), help="Turns past the window, by conversation. [default: 24, quick 5]")
@click.option("--conversations", type=click.IntRange(1), default=4, show_default=True, help="How many are replayed.")
@click.option(
    "--kind", "kinds", type=click.Choice(conversations.KINDS), multiple=True, help="Repeatable. [default: all]"
)
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file in ShareGPT's format."
)
@click.option("--cold-answers", is_flag=True, help="Leave the answers out of the prefix caches.")
@click.option("--seed", default=0, show_default=True, help="Other numbers generate other conversations.")
@click.option(
    "--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw prefill tokens as SVG."
)
@click.option("--quick", is_flag=True, help="Fewer turns: minutes, and more noise.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
def command(
    model: str | None,
    turns: int | None,
    quick: bool,
    as_json: bool,
    plot_file: Path | None,
    engine_flags: tuple[str, ...],
    **given: Any,
) -> None:
    """Chats past the window: prefix hits, prefill and TTFT, against token slicing and drop-oldest."""
    plan = Plan(turns=turns or (_QUICK_TURNS if quick else _TURNS), **given)
    plan = replace(plan, kinds=plan.kinds or conversations.KINDS)
    try:
        report = run(plan, model or embedded_model(), engine_flags)
    except (ContenderFailed, LoadFailed, httpx.HTTPError) as failure:
        raise click.ClickException(str(failure)) from failure
    report.print()
    if plot_file:
        plot(report.turns, f"Prefill tokens per turn, window of {plan.window} tokens", plot_file)
    if as_json:
        click.echo(json.dumps({"benchmark": "long-chat", **report.as_dict()}))
