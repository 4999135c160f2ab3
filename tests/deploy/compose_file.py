"""`docker/compose.yaml` as data, with its variables at the values they have when nobody sets them."""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from server.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
DOCKER: Final = ROOT / "docker"
COMPOSE_FILE: Final = DOCKER / "compose.yaml"
# `${NAME:-default}` or `${NAME-default}`; a default may be a JSON object, with braces of its own.
_VARIABLE: Final = re.compile(r"(?<!\$)\$\{(?P<name>[A-Z_]+)(?::?-(?P<default>(?:\{[^{}]*\}|[^{}])*))?\}")


def services() -> dict[str, Any]:
    """The services by name, variables replaced by their defaults."""
    document = _filled(yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8")))
    return dict(document["services"])


def _filled(part: Any) -> Any:
    """As Compose does it: in the strings of the parsed file, not in its text."""
    if isinstance(part, dict):
        return {name: _filled(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_filled(value) for value in part]
    return _VARIABLE.sub(lambda found: found["default"] or "", part) if isinstance(part, str) else part


def variables() -> dict[str, str]:
    """The variables that a person may set, with their defaults."""
    text = COMPOSE_FILE.read_text(encoding="utf-8")
    named = {found["name"]: found["default"] or "" for found in _VARIABLE.finditer(text)}
    # A name in an environment without a value is passed on.
    passed_on = re.findall(r"^ +([A-Z_]+):$", text, flags=re.MULTILINE)
    return {**named, **dict.fromkeys(passed_on, "")}


def leaving_s() -> float:
    """Seconds that the server may take to leave, if nobody sets it."""
    fields = Settings.model_fields
    return float(fields["drain_timeout_s"].default + fields["drain_delay_s"].default)
