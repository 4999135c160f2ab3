"""The fit against real renders: what `plan_fit` keeps by estimates must be a prompt that the chat template takes."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from server.engine.thinking import Place
from server.policy.context import Window, default_reserve_tokens
from tests.models.templates import TEMPLATES, Template
from tests.policy.random_histories import Case, call_of, retained_share_is_left
from tests.policy.template_histories import (
    CALL,
    MARK,
    NEXT_USER,
    REPLY,
    RESULT,
    SYSTEM,
    TOOLS,
    USER,
    Chat,
    Prompt,
    TokensIn,
    chats,
    left_out,
    marks,
    say,
    send,
    settled,
    takes,
    template_overheads,
    text_tokens,
    tools_of,
)

# What stands in one prompt may stand otherwise in the next, by the template's own doing, from the last question on.
REWRITES_THE_LAST_TURN: Final = {
    "qwen3": "takes the thinking out of a turn when the user speaks again",
    "qwen3_5": "takes the thinking out of a turn when the user speaks again",
    "mistral": "moves the tools and the system prompt on to the newest question",
}
MOVES_INSTRUCTIONS_TO_THE_FRONT: Final = {"deepseek"}

some_examples = settings(max_examples=10, deadline=None)
each_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())


@pytest.fixture(scope="session")
def tokenizer(embedded_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(embedded_model)


@pytest.fixture(scope="session")
def tokens_in(tokenizer: Any) -> TokensIn:
    return cache(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))


# Templates


@each_template
def test_a_template_renders_as_transformers_renders_it(template: Template, tokenizer: Any) -> None:
    messages = [*[SYSTEM] * template.takes_system, USER, REPLY, NEXT_USER]
    expected = tokenizer.apply_chat_template(
        messages,
        tools=tools_of(template),
        chat_template=template.text,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert template.render(messages, tools_of(template)) == expected


@each_template
def test_a_template_is_what_it_is_said_to_be(template: Template) -> None:
    assert takes(template, [SYSTEM, USER]) == template.takes_system
    assert takes(template, [USER, NEXT_USER]) != template.alternates
    assert ("read_tides" in template.render([USER], TOOLS)) == template.takes_tools
    if template.takes_tools:
        assert takes(template, [USER, CALL, RESULT, REPLY, NEXT_USER])


# Thinking

_EVERYWHERE = {(place, calling) for place in Place for calling in (False, True)}
_IN_PLAIN_ANSWERS = {(Place.TAGS, False), (Place.CLOSING_TAG, False)}
_FIELD = {(Place.FIELD, False), (Place.FIELD, True)}  # these templates know no field for it
_IN_CALLS = {(Place.TAGS, True), (Place.CLOSING_TAG, True)}
LEAVES_OUT: Final = {
    "qwen3": _EVERYWHERE,
    "qwen3_5": _EVERYWHERE,
    "deepseek": _IN_PLAIN_ANSWERS | _FIELD,
    "glm4": _IN_PLAIN_ANSWERS | _FIELD,
    "llama3_1": _IN_CALLS | _FIELD,  # print nothing that is said beside a call
    "mistral": _IN_CALLS | _FIELD,
    "gemma2": {(Place.FIELD, False)},  # and these refuse tool messages
    "gemma3": {(Place.FIELD, False)},
    "refuses_tools": {(Place.FIELD, False)},
}


@each_template
def test_a_template_leaves_out_the_thinking_that_it_is_known_to_leave_out(
    template: Template, tokens_in: TokensIn
) -> None:
    assert left_out(template, tokens_in) == LEAVES_OUT.get(template.name, _FIELD)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "deepseek", "glm4"])
def test_a_history_full_of_thinking_is_counted_as_it_is_printed(name: str, tokens_in: TokensIn) -> None:
    template, thought = TEMPLATES[name], "The moon pulls at the sea, and the sea follows. " * 4
    answer = say("assistant", f"<think>\n{thought}\n</think>\n\nTwice a day, because of the moon.")
    messages = [*[say("user", "How often does the tide rise?"), answer] * 20, say("user", "And why?")]
    overheads, spots = template_overheads(template, tokens_in), left_out(template, tokens_in)
    later = [text_tokens(settled(m, spots), tokens_in) + overheads.around([m]) for m in messages]
    printed = tokens_in(template.render(messages, tools_of(template)))
    assert printed <= sum(later) + overheads.once <= 1.35 * printed
    with_all_thinking = sum(text_tokens(m, tokens_in) + overheads.around([m]) for m in messages)
    assert with_all_thinking > 1.7 * printed


# Properties


@each_template
@some_examples
@given(chat=chats)
def test_estimates_are_hardly_ever_too_low(template: Template, tokens_in: TokensIn, chat: Chat) -> None:
    case = chat.case(template, tokens_in)
    rendered = tokens_in(template.render(case.messages, tools_of(template)))
    assert sum(case.printed) + case.window.fixed_tokens >= 0.97 * rendered


@each_template
@some_examples
@given(chat=chats)
def test_a_kept_history_is_a_prompt_that_fits(template: Template, tokens_in: TokensIn, chat: Chat) -> None:
    for prompt in chat.prompts(template, tokens_in):
        if prompt is not None:
            assert tokens_in(prompt.text) <= prompt.case.window.max_model_len - 1
            assert prompt.rounds <= 2


@each_template
@some_examples
@given(chat=chats)
def test_a_prompt_shows_what_was_kept_and_nothing_else(template: Template, tokens_in: TokensIn, chat: Chat) -> None:
    for prompt in chat.prompts(template, tokens_in):
        if prompt is not None:
            messages, kept = prompt.case.messages, prompt.fit.kept
            unfitted = template.render(messages, tools_of(template))
            assert marks(unfitted) & marks(json.dumps(prompt.messages)) <= marks(prompt.text)
            assert marks(prompt.text) <= marks(json.dumps(prompt.messages))
            assert all(
                messages[i]["content"] in prompt.text for i in prompt.pinned if messages[i]["content"] in unfitted
            )
            assert {call_of(messages, i) for i in kept if messages[i]["role"] == "tool"} <= set(kept)


@each_template
@some_examples
@given(chat=chats)
def test_a_prompt_starts_with_the_one_before_or_a_cut_was_due_and_left_room(
    template: Template, tokens_in: TokensIn, chat: Chat
) -> None:
    for before, after in pairwise(chat.prompts(template, tokens_in)):
        if before is None or after is None or before.rounds or after.rounds:
            continue  # the next request cannot know of a round
        if after.fit.kept[: len(before.fit.kept)] == before.fit.kept:
            assert after.text.startswith(unchanging(before, after))
        else:
            case, new_tokens = after.case, after.case.printed[len(before.case.tokens) :]
            assert case.turn_tokens(before.fit) + sum(new_tokens) > case.budget()
            assert retained_share_is_left(case, after.fit, before.fit)


def unchanging(before: Prompt, after: Prompt) -> str:
    """What the template itself leaves as it was when the conversation goes on."""
    new = after.case.messages[len(before.case.messages) :]
    if before.template.name in MOVES_INSTRUCTIONS_TO_THE_FRONT and "system" in [message["role"] for message in new]:
        return ""
    if before.template.name not in REWRITES_THE_LAST_TURN:
        return before.text
    settled = [before.case.messages[i] for i in before.fit.kept if before.case.layout.head <= i < before.last_question]
    last_mark = MARK.findall(json.dumps(settled))[-1] if settled else ""
    start, mark, _ = before.text.rpartition(last_mark) if last_mark else ("", "", "")
    return start + mark


@pytest.mark.parametrize("max_model_len", [1000, 4000])
def test_a_question_asked_again_and_again_is_fitted_although_mistral_repeats_the_tools_for_each(
    tokens_in: TokensIn, max_model_len: int
) -> None:
    template = TEMPLATES["mistral"]
    overheads = template_overheads(template, tokens_in)
    question = say("user", "Go on.")
    messages = [*[question, say("assistant", "The tide rises and falls. " * 6)] * 40, question]
    tokens = [text_tokens(message, tokens_in) + overheads.around([message]) for message in messages]
    window = Window(max_model_len, default_reserve_tokens(max_model_len), fixed_tokens=overheads.once)
    prompt = send(template, Case(messages, tokens, window, retention_ratio=0.8), tokens_in)
    assert prompt is not None
    assert prompt.text.count("[AVAILABLE_TOOLS]") > 1
