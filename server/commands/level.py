"""`tidegate level`: see and set the level of the degradation ladder."""

import getpass
import socket
from typing import Any, Final

import click

from server.commands.keys import Span
from server.commands.operator_client import OperatorClient, operator_options

_PATH: Final = "/admin/level"


@click.group()
def level() -> None:
    """The level of degradation: 0 normal, 1 economy, 2 short context, 3 essential, 4 fallback, 5 closed."""


@level.command("get")
@operator_options
def get_level(client: OperatorClient) -> None:
    """Show the level that counts, and why."""
    _show(client.call("GET", _PATH))


@level.command("set")
@click.argument("number", type=click.IntRange(0, 5))
@click.option("--reason", required=True, help="Why, for the audit log.")
@click.option("--ttl", type=Span(), default="1h", show_default=True, help="For how long, such as 90s, 45m or 12h.")
@operator_options
def set_level(client: OperatorClient, number: int, reason: str, ttl: float) -> None:
    """Hold level NUMBER (0 to 5) on every replica, whatever the pressure."""
    form = {"level": number, "reason": reason, "ttl_s": ttl, "by": _who()}
    _show(client.call("PUT", _PATH, form))


@level.command("clear")
@operator_options
def clear_level(client: OperatorClient) -> None:
    """Let the pressure decide again."""
    _show(client.call("DELETE", _PATH))


def _show(status: dict[str, Any]) -> None:
    click.echo(f"level {status['level']}: {status['description']}")
    click.echo(f"because: {status['because']}")
    pin = status["pin"]
    if pin is not None:
        click.echo(f"pinned for another {pin['ttl_s']:.0f} s")
    click.echo(f"pressure: {status['pressure']}, which alone would give level {status['automatic_level']}")
    click.echo(f"engine: {status['engine']}")


def _who() -> str:
    """The person at the keyboard, as well as the machine knows."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        name = "operator"
    return f"{name}@{socket.gethostname()}"[:100]
