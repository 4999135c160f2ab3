"""Histories with what they cost under a chat template, and the prompts that the server sends for them."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from hypothesis import strategies as st
from jinja2 import TemplateError

from server.engine.thinking import Spot, spot_of, spots_left_out, without_thinking
from server.policy.context import Fit, LastTurnTooLong, Window, default_reserve_tokens, drop_one_more, plan_fit
from tests.models.templates import Message, Template, Tool
from tests.policy.random_histories import Case

TokensIn = Callable[[str], int]

TOOLS: Final[list[Tool]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} the tide table of a harbour.",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}, "required": ["harbour"]},
        },
    }
    for name in ("read_tides", "plot_tides")
]


def say(role: str, content: str, **fields: Any) -> Message:
    return {"role": role, "content": content, **fields}


def calling(call_ids: Sequence[str], harbour: str = "Tide", content: str = "") -> Message:
    function = {"name": "read_tides", "arguments": {"harbour": harbour}}
    return say("assistant", content, tool_calls=[{"id": i, "type": "function", "function": function} for i in call_ids])


def tools_of(template: Template) -> list[Tool] | None:
    return TOOLS if template.takes_tools else None


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a template prints besides the texts, in tokens: around a message of each role, around a call, and once."""

    roles: Mapping[str, int]
    call: int
    once: int = 0

    def around(self, messages: Sequence[Message]) -> int:
        calls = sum(len(message.get("tool_calls", ())) for message in messages)
        return self.call * calls + sum(self.roles[message["role"]] for message in messages)


def text_tokens(message: Message, tokens_in: TokensIn) -> int:
    """The texts of a message. A result counts as JSON where that is longer: some templates escape it."""
    texts = [tokens_in(message["content"])]
    if message["role"] == "tool":
        texts = [max(*texts, tokens_in(json.dumps(message["content"], ensure_ascii=False)))]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        texts += [tokens_in(function["name"]), tokens_in(json.dumps(function["arguments"], ensure_ascii=False))]
    return sum(texts)


# All texts differ, or Mistral's template would take early questions for the last one and print the tools before each.
SYSTEM, LATER_SYSTEM = say("system", "Be kind."), say("system", "Be brief.")
USER, NEXT_USER, LAST_USER = (say("user", text) for text in ("One", "Two", "Three"))
REPLY, NEXT_REPLY = say("assistant", "Low"), say("assistant", "High")
CALL, TWO_CALLS = calling(["call_0001"]), calling(["call_0001", "call_0002"])
RESULT, OTHER_RESULT = (say("tool", f"{i} m", tool_call_id=f"call_000{i}") for i in (1, 2))
CARRYING: Final = (USER, CALL, TWO_CALLS)  # not left out: results need their call, and most templates a question
PROBES: Final = (
    [USER, REPLY, NEXT_USER, NEXT_REPLY, LAST_USER],
    [SYSTEM, USER, REPLY, LATER_SYSTEM, NEXT_USER, LAST_USER],
    [USER, CALL, RESULT, REPLY, NEXT_USER],
    [USER, TWO_CALLS, RESULT, OTHER_RESULT],
)


def one_left_out() -> Iterator[tuple[str, list[Message], list[Message]]]:
    """Every beginning of a probe without one of its messages, and with it; and that message's role."""
    for probe in PROBES:
        for i, message in enumerate(probe):
            if message not in CARRYING:
                for end in range(i + 1, len(probe) + 1):
                    yield message["role"], probe[:i] + probe[i + 1 : end], probe[:end]


@cache
def template_overheads(template: Template, tokens_in: TokensIn) -> Overheads:
    """The most that one message, or call, added to any conversation of a few that the template takes."""

    def beside_texts(messages: Sequence[Message]) -> int | None:
        try:
            prompt = template.render(messages, tools_of(template))
        except TemplateError:
            return None
        return tokens_in(prompt) - sum(text_tokens(message, tokens_in) for message in messages)

    def added(before: Sequence[Message], after: Sequence[Message]) -> int:
        less, more = beside_texts(before), beside_texts(after)
        return 0 if less is None or more is None else more - less

    roles = dict.fromkeys(("system", "user", "assistant", "tool"), 0)
    for role, before, after in one_left_out():
        roles[role] = max(roles[role], added(before, after))
    call = max(0, added([USER], [USER, CALL]) - roles["assistant"], added([USER, CALL], [USER, TWO_CALLS]))
    around = Overheads(roles, call).around
    starts = [probe[:end] for probe in PROBES for end in range(1, len(probe) + 1)]
    once = max(extra - around(start) for start in starts if (extra := beside_texts(start)) is not None)
    return Overheads(roles, call, once)


@cache
def left_out(template: Template, tokens_in: TokensIn) -> frozenset[Spot]:
    """Where the template leaves thinking out of earlier turns, as the server finds it."""

    async def length(messages: list[Message]) -> int | None:
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])  # as vLLM does
        try:
            return tokens_in(template.render(messages))
        except TemplateError:
            return None

    return asyncio.run(spots_left_out(length))


def settled(message: Message, spots: frozenset[Spot]) -> Message:
    """What is printed of a message when the user has spoken again."""
    spot = spot_of(message)
    return without_thinking(message, spot[0]) if spot is not None and spot in spots else message


# Histories

WORDS: Final = (
    *("The tide", "rises", "and falls", "twice a day", "because", "of", "the moon.", "潮位", "Gezeitenhub", "🌊"),
    *("3.14159", "https://example.org/tides?day=1", "\n\n", '{"high": [1, 2]}', "if high:\n\treturn", "C:\\tides"),
)
MARK: Final = re.compile(r"mark\d{3}")


class Conversation:
    """Writes a history that a template takes; every text ends with a mark, by which it is found in a prompt."""

    def __init__(self, rng: random.Random, template: Template) -> None:
        self._rng, self._template = rng, template
        self._parallel_calls = takes(template, [USER, TWO_CALLS, RESULT, OTHER_RESULT])
        self._late_system = template.takes_system and takes(template, [USER, REPLY, LATER_SYSTEM, NEXT_USER])
        self.messages: list[Message] = []

    def converse(self, turns: int) -> list[Message]:
        if self._template.takes_system and self._chance(0.6):
            self._say("system")
        if not self._template.alternates and self._chance(0.15):
            self._say("assistant")
        for _ in range(turns):
            self._turn()
        self._ask()
        self._call_tools()
        return self.messages

    def _turn(self) -> None:
        self._ask()
        self._call_tools()
        self._say("assistant")

    def _ask(self) -> None:
        if self._late_system and self._chance(0.1):
            self._say("system")
        for _ in range(1 if self._template.alternates else self._rng.choice([1, 1, 1, 2])):
            self._say("user")

    def _call_tools(self) -> None:
        for _ in range(self._rng.choice([0, 0, 1, 2, 6]) if self._template.takes_tools else 0):
            ids = [f"call_{len(self.messages):03}{i}" for i in range(self._calls())]
            content = self._text("assistant") if self._chance(0.3) else ""
            self.messages.append(calling(ids, harbour=self._text("call"), content=content))
            self._rng.shuffle(ids)
            for call_id in ids:
                self._say("tool", tool_call_id=call_id)

    def _calls(self) -> int:
        return self._rng.choice([1, 1, 2, 3]) if self._parallel_calls else 1

    def _say(self, role: str, **fields: Any) -> None:
        self.messages.append(say(role, self._text(role), **fields))

    def _text(self, role: str) -> str:
        thought = f"<think>\n{self._words()}\n</think>\n\n" if role == "assistant" and self._chance(0.3) else ""
        return f"{thought}{self._words()} mark{len(self.messages):03}".strip()

    def _words(self) -> str:
        return " ".join(self._rng.choices(WORDS, k=self._rng.choice([1, 1, 5, 5, 20, 60]))).strip()

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability


def takes(template: Template, messages: Sequence[Message]) -> bool:
    try:
        template.render(messages, tools_of(template))
    except TemplateError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the server sends to the model for a history."""

    template: Template
    case: Case
    fit: Fit
    rounds: int  # of `drop_one_more`

    @property
    def messages(self) -> list[Message]:
        return [self.case.messages[i] for i in self.fit.kept]

    @property
    def text(self) -> str:
        return self.template.render(self.messages, tools_of(self.template))

    @property
    def pinned(self) -> tuple[int, ...]:
        return (*range(self.case.layout.head), self.last_question)

    @property
    def last_question(self) -> int:
        return max(i for i, message in enumerate(self.case.messages) if message["role"] == "user")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation whose template is still open. `room` is the window in tokens, without what is printed once."""

    seed: int
    turns: int
    room: int
    retention_ratio: float

    def case(self, template: Template, tokens_in: TokensIn) -> Case:
        overheads = template_overheads(template, tokens_in)
        messages = Conversation(random.Random(self.seed), template).converse(self.turns)
        tokens = [text_tokens(message, tokens_in) + overheads.around([message]) for message in messages]
        shorter = [settled(message, left_out(template, tokens_in)) for message in messages]
        later = [text_tokens(message, tokens_in) + overheads.around([message]) for message in shorter]
        max_model_len = self.room + overheads.once
        window = Window(max_model_len, default_reserve_tokens(max_model_len), fixed_tokens=overheads.once)
        return Case(messages, tokens, window, self.retention_ratio, later)

    def prompts(self, template: Template, tokens_in: TokensIn) -> Iterator[Prompt | None]:
        """A prompt each time the model was asked, or `None` where that was refused."""
        case = self.case(template, tokens_in)
        roles = [message["role"] for message in case.messages]
        for length in range(1, len(roles) + 1):
            asked = length == len(roles) or roles[length] == "assistant"
            if asked and roles[length - 1] in ("user", "tool"):
                yield send(template, case.first(length), tokens_in)


chats = st.builds(
    Chat,
    seed=st.integers(0, 2**48),
    turns=st.integers(1, 6),
    room=st.integers(100, 1000),
    retention_ratio=st.sampled_from([0.8, 0.8, 0.5]),
)


def send(template: Template, case: Case, tokens_in: TokensIn) -> Prompt | None:
    fit, rounds = plan_fit(case.layout, case.tokens, case.window, case.retention_ratio, case.settled), 0
    while True:
        prompt = Prompt(template, case, fit, rounds)
        rendered = tokens_in(prompt.text)
        if rendered <= case.window.max_prompt_tokens:
            return prompt
        try:
            fit, rounds = drop_one_more(fit, case.layout, case.printed, case.window, rendered), rounds + 1
        except LastTurnTooLong:
            return None


def marks(text: str) -> set[str]:
    return set(MARK.findall(text))
