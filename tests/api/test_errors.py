import importlib
import json
import pkgutil
from typing import Any

import pytest

import server.policy
from server.api import errors
from server.api.errors import Dialect
from server.policy.refusals import (
    ClosedField,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidApiKey,
    InvalidRequest,
    NotReady,
    Overloaded,
    RateLimited,
    Refusal,
)

for module in pkgutil.iter_modules(server.policy.__path__, "server.policy."):
    importlib.import_module(module.name)  # a refusal may be declared beside the rule that raises it


def kinds_of(kind: type[Refusal]) -> list[type[Refusal]]:
    below = [each for child in kind.__subclasses__() for each in (child, *kinds_of(child))]
    return [each for each in below if each.__module__.startswith("server.")]


def blank(kind: type[Refusal]) -> Refusal:
    """One of that class, whatever its constructor wants."""
    refusal = kind.__new__(kind)
    Refusal.__init__(refusal, "No.")
    return refusal


ALL_KINDS = list(dict.fromkeys(kinds_of(Refusal)))


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.__name__)
def test_every_refusal_has_a_wire_form(kind: type[Refusal]) -> None:
    form = errors.wire(blank(kind))
    assert 400 <= form.status <= 599
    assert form.type
    assert form.anthropic


def test_the_walk_finds_the_children_of_children() -> None:
    assert {InvalidRequest, ClosedField, GenerationFailed} <= set(ALL_KINDS)


def test_a_refusal_without_a_row_takes_that_of_the_nearest_class_above_it() -> None:
    class OfMyOwn(ContextLengthExceeded):
        pass

    assert errors.wire(OfMyOwn("No.")) == errors.wire(ContextLengthExceeded("No."))


def test_openais_shape_has_message_type_param_and_code() -> None:
    refusal = ContextLengthExceeded("Too long.", param="messages")
    expected = {
        "message": "Too long.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    assert errors.body(refusal, "openai") == {"error": expected}


def test_the_responses_api_has_openais_body() -> None:
    refusal = InvalidRequest("No.", param="input")
    assert errors.body(refusal, "responses") == errors.body(refusal, "openai")


def test_anthropics_shape_has_its_own_type_names() -> None:
    assert errors.body(InvalidApiKey("No."), "anthropic") == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "No."},
    }


def frames(refusal: Refusal, dialect: Dialect) -> list[tuple[str, Any]]:
    """The events of an error that ends a stream: name (`""` for none) and data."""
    text = errors.event(refusal, dialect).decode()
    assert text.endswith("\n\n")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        events.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


def test_a_stream_in_openais_dialect_ends_with_the_error_and_done() -> None:
    refusal = GenerationFailed("It stopped.")
    assert frames(refusal, "openai") == [("", errors.body(refusal, "openai")), ("", "[DONE]")]


def test_a_stream_of_a_response_ends_with_a_flat_error_event() -> None:
    error = {"type": "error", "code": "internal_error", "message": "It stopped.", "param": None}
    assert frames(GenerationFailed("It stopped."), "responses") == [("error", error)]


def test_a_stream_in_anthropics_dialect_ends_with_an_error_event() -> None:
    error = {"type": "error", "error": {"type": "api_error", "message": "It stopped."}}
    assert frames(GenerationFailed("It stopped."), "anthropic") == [("error", error)]


@pytest.mark.parametrize("dialect", ["openai", "responses", "anthropic"])
def test_a_message_of_several_lines_stays_one_event(dialect: Dialect) -> None:
    events = frames(GenerationFailed("One.\n\nTwo: three."), dialect)
    assert "One.\n\nTwo: three." in str([data for _, data in events]).replace("\\n", "\n")


@pytest.mark.parametrize("dialect", ["openai", "responses", "anthropic"])
def test_letters_of_every_script_are_sent_as_they_are(dialect: Dialect) -> None:
    refusal = InvalidRequest("Größe: 模型 🙂")
    assert "Größe: 模型 🙂" in errors.encoded(refusal, dialect).decode()
    assert "Größe: 模型 🙂" in errors.event(refusal, dialect).decode()


@pytest.mark.parametrize("dialect", ["openai", "responses", "anthropic"])
def test_half_a_letter_out_of_a_clients_json_can_be_sent_back(dialect: Dialect) -> None:
    """JSON may hold a lone surrogate, and a message may quote what the client sent."""
    half = json.loads(r'"\ud800"')
    refusal = InvalidRequest(f"The model `{half}` does not exist.")
    assert json.loads(errors.encoded(refusal, dialect))
    assert errors.event(refusal, dialect)


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [
        (0.0, "0", "0"),
        (0.0001, "1", "1"),
        (0.25, "1", "250"),
        (1.0, "1", "1000"),
        (1.0001, "2", "1001"),
        (4.2, "5", "4200"),
        (3600.0, "3600", "3600000"),
    ],
)
def test_the_time_to_come_back_is_rounded_up(retry_after_s: float, seconds: str, milliseconds: str) -> None:
    headers = errors.headers(RateLimited("Slow down.", retry_after_s=retry_after_s))
    assert headers == {"retry-after": seconds, "retry-after-ms": milliseconds}


def test_where_waiting_does_not_help_no_time_is_named() -> None:
    assert errors.headers(InvalidRequest("No.")) == {}
    assert errors.headers(NotReady("Loading.")) == {}


def test_a_missing_key_is_asked_for_as_http_wants_it() -> None:
    assert errors.headers(InvalidApiKey("No.")) == {"www-authenticate": "Bearer"}


def test_a_refusal_that_is_not_worth_repeating_says_so_to_clients_that_would() -> None:
    hopeless = Overloaded("Too much.", retry_after_s=20.0, should_retry=False)
    assert errors.headers(hopeless) == {"x-should-retry": "false", "retry-after": "20", "retry-after-ms": "20000"}
    assert "x-should-retry" not in errors.headers(Overloaded("Busy.", retry_after_s=1.0))
