"""`tidegate keys`: tenants, their keys and limits, from the command line."""

import datetime as dt
import re
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Column, Table

from server.commands.operator_client import CallRefused, OperatorClient, operator_options
from server.store.keys import digest, new_key

_TENANTS: Final = "/admin/tenants"
_UNITS_S: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN: Final = re.compile(r"([0-9]{1,6})([smhdw])")
_LIMIT_FIELDS: Final[Mapping[str, str]] = {
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    "tpd": "tokens_per_day",
    "concurrency": "concurrency",
}
_USAGE_FIELDS: Final[Mapping[str, str]] = {
    "requests": "requests",
    "prompt": "prompt_tokens",
    "of it cached": "cached_tokens",
    "completion": "completion_tokens",
    "total": "total_tokens",
}
_ENDLESS: Final = 1000
_CLASSES: Final = ("critical", "default", "batch")

Command = TypeVar("Command", bound=Callable[..., Any])


class Span(click.ParamType[float]):
    """A length of time such as 30d or 12h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _SPAN.fullmatch(str(value).strip().lower())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a length of time: write 90s, 45m, 12h, 30d or 8w.", param, ctx)
        return float(int(match[1]) * _UNITS_S[match[2]])


class LimitValue(click.ParamType[int]):
    """A whole number, 1 or more; 0 stands for `none`."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower().replace("_", "")
        if text == "none":
            return 0
        if not text.isdecimal() or int(text) == 0:
            self.fail(f"{value!r} is not a limit: write a whole number from 1 up, or none.", param, ctx)
        return int(text)


def _tenant_options(command: Command) -> Command:
    """What `create` and `limits` can set."""
    for option in reversed(
        (
            click.option("--class", "traffic_class", type=click.Choice(_CLASSES), help="How its work is ranked."),
            click.option("--rpm", type=LimitValue(), metavar="N", help="Requests per minute, or none."),
            click.option("--tpm", type=LimitValue(), metavar="N", help="Tokens per minute, or none."),
            click.option("--tpd", type=LimitValue(), metavar="N", help="Tokens per day, or none."),
            click.option("--concurrency", type=LimitValue(), metavar="N", help="Requests at the same time, or none."),
            click.option("--models", metavar="A,B", help="Models it may use, separated by commas, or `all`."),
            click.option("--trusted/--not-trusted", default=None, help="Whether it may name its end users in headers."),
        )
    ):
        command = option(command)
    return command


@click.group()
def keys() -> None:
    """Tenants: their keys, limits and usage."""


@keys.command()
@click.argument("name")
@_tenant_options
@click.option("--expires", type=Span(), metavar="TIME", help="When the key ends, such as 30d [default: never].")
@operator_options
def create(client: OperatorClient, name: str, expires: float | None, **given: Any) -> None:
    """Create the tenant NAME and print its key, which is shown only now.

    If the tenant exists, it gets one more key.
    """
    fields = _fields(given)
    try:
        client.call("POST", _TENANTS, {"name": name, **fields})
    except CallRefused as refused:
        if refused.status != HTTPStatus.CONFLICT or fields:
            raise
    made = client.call("POST", f"{_path(name)}/keys", {"expires_in_s": expires})
    click.echo(made["key"])


@keys.command("list")
@operator_options
def list_tenants(client: OperatorClient) -> None:
    """List tenants and their keys."""
    listed = client.call("GET", _TENANTS)["data"]
    if not listed:
        click.echo("There is no tenant.")
        return
    table = Table("tenant", "class", "limits", "models", "key", "created", "last used", "expires")
    for tenant in listed:
        about = (
            tenant["name"],
            tenant["class"],
            _limits_shown(tenant["limits"]),
            ", ".join(tenant["models"] or ["all"]),
        )
        for key in tenant["keys"] or [{"id": "in the file" if tenant["source"] == "file" else "none"}]:
            times = (_moment(key.get(f"{what}_at")) for what in ("created", "last_used", "expires"))
            table.add_row(*about, key["id"], *times)
            about = ("", "", "", "")
    _print(table)


@keys.command()
@click.argument("name")
@click.option("--key", "key_id", help="Id of one key; without it all keys of the tenant are revoked.")
@operator_options
def revoke(client: OperatorClient, name: str, key_id: str | None) -> None:
    """Revoke the keys of the tenant NAME. The tenant and its limits stay."""
    path = f"{_path(name)}/keys" if key_id is None else f"{_path(name)}/keys/{quote(key_id, safe='')}"
    revoked = client.call("DELETE", path)["ids"]
    click.echo(f"Revoked: {', '.join(revoked)}." if revoked else f"{name} had no key.", err=True)


@keys.command()
@click.argument("name")
@click.option(
    "--grace", type=Span(), metavar="TIME", help="For how long the old keys go on working [default: not at all]."
)
@click.option("--expires", type=Span(), metavar="TIME", help="When the new key ends [default: never].")
@operator_options
def rotate(client: OperatorClient, name: str, grace: float | None, expires: float | None) -> None:
    """Print a new key for the tenant NAME, in place of all it had."""
    body = {"grace_s": grace or 0, "expires_in_s": expires}
    click.echo(client.call("POST", f"{_path(name)}/rotate", body)["key"])


@keys.command()
@click.argument("name")
@_tenant_options
@operator_options
def limits(client: OperatorClient, name: str, **given: Any) -> None:
    """Show the limits of the tenant NAME, or change those that are given."""
    fields = _fields(given)
    tenant = client.call("PATCH", _path(name), fields) if fields else client.call("GET", _path(name))
    models = ", ".join(tenant["models"] or ["all"])
    click.echo(f"{name}: class {tenant['class']}, {_limits_shown(tenant['limits'])}, models: {models}")


@keys.command()
@click.argument("name")
@operator_options
def delete(client: OperatorClient, name: str) -> None:
    """Forget the tenant NAME and revoke its keys."""
    client.call("DELETE", _path(name))
    left = client.call("GET", _TENANTS)["data"]
    click.echo(
        f"Deleted {name}." + ("" if left else " It was the last tenant: without --api-key the server is open now."),
        err=True,
    )


@keys.command()
@click.argument("name")
@operator_options
def usage(client: OperatorClient, name: str) -> None:
    """Show what the tenant NAME has used today and this month, by model (days and months of UTC)."""
    used = client.call("GET", f"{_path(name)}/usage")
    table = Table("", "model", *(Column(title, justify="right") for title in _USAGE_FIELDS))
    for period, figures in ((used["today"]["date"], used["today"]), (used["this_month"]["month"], used["this_month"])):
        for model in figures["models"]:
            table.add_row(period, model["model"], *(f"{model[field]:,}" for field in _USAGE_FIELDS.values()))
            period = ""
    if table.row_count:
        _print(table)
    else:
        click.echo(f"{name} has used nothing this month.")


@keys.command()
def generate() -> None:
    """Print a key for the tenants file, and on the error output the line for it. No server is asked."""
    key = new_key()
    click.echo(key)
    click.echo(f'keys = [{{ sha256 = "{digest(key)}" }}]', err=True)


def _print(table: Table) -> None:
    """A table as wide as the terminal, or as wide as it needs where the output is read by a program."""
    Console(width=None if sys.stdout.isatty() else _ENDLESS).print(table)


def _path(name: str) -> str:
    return f"{_TENANTS}/{quote(name, safe='')}"


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as the operator API names them."""
    limits = {field: given[name] or None for name, field in _LIMIT_FIELDS.items() if given[name] is not None}
    fields: dict[str, Any] = {"limits": limits} if limits else {}
    if given["traffic_class"] is not None:
        fields["class"] = given["traffic_class"]
    if given["models"] is not None:
        names = [name.strip() for name in given["models"].split(",") if name.strip()]
        fields["models"] = None if names == ["all"] else names
    if given["trusted"] is not None:
        fields["trusted"] = given["trusted"]
    return fields


def _limits_shown(limits: Mapping[str, int | None]) -> str:
    shown = [f"{limits[field]:,} {name}" for name, field in _LIMIT_FIELDS.items() if limits[field] is not None]
    return ", ".join(shown) or "no limits"


def _moment(at_s: int | None) -> str:
    return "" if at_s is None else dt.datetime.fromtimestamp(at_s, tz=dt.UTC).strftime("%Y-%m-%d %H:%M")
