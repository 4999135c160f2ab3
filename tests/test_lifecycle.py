from typing import Any

import pytest

from server.lifecycle import _all_flags
from server.settings import load_settings


@pytest.mark.parametrize(
    ("settings", "command_line", "flags"),
    [
        ({}, ("m", "--seed", "1"), ("m", "--seed", "1")),
        ({"model": "a"}, (), ("--model", "a")),
        ({"model": "a"}, ("--model", "b"), ("--model", "a", "--model", "b")),
        ({"vllm": {"served-model-name": ["x", "y"]}}, ("m",), ("m", "--served-model-name", "x", "y")),
        ({"vllm": {"seed": 1}}, ("--seed", "2"), ("--seed", "1", "--seed", "2")),
    ],
)
def test_the_command_line_wins_over_the_file_and_its_model_stays_in_front(
    settings: dict[str, Any], command_line: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    assert _all_flags(load_settings(settings, None), command_line) == flags
