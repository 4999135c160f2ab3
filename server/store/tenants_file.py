"""The tenants file: tenants that are declared rather than created, and the keys they hold.

    [tenants.search]
    class = "critical"
    limits = { requests_per_minute = 600, tokens_per_minute = 200_000 }
    models = ["qwen3-8b"]
    expires = 2027-06-30
    keys = [{ sha256 = "…" }, { env = "SEARCH_KEY" }, { file = "/run/secrets/search" }]

A key itself never stands in the file: its digest does, or the place where it is kept.
"""

import datetime as dt
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from server.policy.tenants import Tenant, name_problem
from server.store.keys import digest
from server.store.tenant_forms import Form, TenantForm, place, sentence

_SHORTEST_KEY: Final = 16
_HEADER: Final = re.compile(r"\s*\[+([^\]]+)\]+\s*(?:#.*)?$")
_FIELD: Final = re.compile(r"\s*([^=#\[\]{}]+?)\s*=")
_NAME: Final = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")


class TenantsFileError(Exception):
    """The file cannot be used; the message is one sentence for the operator, with the line where that is known."""


@dataclass(frozen=True, slots=True)
class FileKey:
    """Who holds a key, and until when (seconds since 1970)."""

    tenant: str
    expires_s: float | None

    def expired(self, now_s: float) -> bool:
        return self.expires_s is not None and now_s >= self.expires_s


@dataclass(frozen=True, slots=True)
class FileTenants:
    """What a tenants file declares. `holders` is by digest."""

    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    holders: Mapping[str, FileKey] = field(default_factory=dict)


def _moment(value: Any) -> Any:
    """TOML's dates and times; what has no zone is UTC, a date is its first moment."""
    if isinstance(value, dt.datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)
    if isinstance(value, dt.date):
        return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
    raise ValueError("write a date or a time as TOML does: 2027-06-30 or 2027-06-30T12:00:00Z")


class KeySource(Form):
    """One key: its digest, or the environment variable or file that holds it."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    env: Annotated[str, Field(min_length=1)] | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "KeySource":
        if sum(source is not None for source in (self.sha256, self.env, self.file)) != 1:
            raise ValueError("a key is one of { sha256 = … }, { env = … } and { file = … }")
        return self

    def digest(self, environment: Mapping[str, str]) -> str:
        """The key's digest. Raises `TenantsFileError`."""
        if self.sha256 is not None:
            return self.sha256
        if self.env is not None:
            key, where = environment.get(self.env, ""), f"the environment variable {self.env}"
        else:
            assert self.file is not None
            key, where = _read(self.file).strip(), f"the file {self.file}"
        if len(key) < _SHORTEST_KEY:
            problem = "holds no key" if not key else f"holds a key of less than {_SHORTEST_KEY} characters"
            raise TenantsFileError(f"{where} {problem}")
        return digest(key)


class FileTenantForm(TenantForm):
    """One `[tenants.NAME]` table. `expires` ends all its keys."""

    expires: Annotated[dt.datetime | None, BeforeValidator(_moment)] = None
    keys: tuple[KeySource, ...] = ()


class FileForm(Form):
    """The whole file."""

    tenants: dict[str, FileTenantForm] = Field(default_factory=dict)


def read_tenants(path: Path, environment: Mapping[str, str] = os.environ) -> FileTenants:
    """Read a tenants file and the keys it refers to. Raises `TenantsFileError`."""
    text = _read(path)
    try:
        form = FileForm.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise TenantsFileError(f"{path} is not valid TOML: {error}.") from error
    except ValidationError as error:
        raise TenantsFileError(f"{path}, line {_line_of(text, place(error))}: {sentence(error)}") from error
    holders: dict[str, FileKey] = {}
    for name, table in form.tenants.items():
        try:
            _add_keys(name, table, holders, environment)
        except TenantsFileError as error:
            raise TenantsFileError(f"{path}, line {_line_of(text, ('tenants', name))}: {error}.") from error
    return FileTenants({name: table.tenant(name) for name, table in form.tenants.items()}, holders)


def _add_keys(name: str, table: FileTenantForm, holders: dict[str, FileKey], environment: Mapping[str, str]) -> None:
    if (problem := name_problem(name)) is not None:
        raise TenantsFileError(problem.removesuffix("."))
    expires_s = None if table.expires is None else table.expires.timestamp()
    for source in table.keys:
        key_digest = source.digest(environment)
        if key_digest in holders:
            raise TenantsFileError(f"`{name}` has a key that `{holders[key_digest].tenant}` has as well")
        holders[key_digest] = FileKey(name, expires_s)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TenantsFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TenantsFileError(f"{path} is not UTF-8 text") from error


def _line_of(text: str, path: tuple[str, ...]) -> int:
    """The line that comes nearest to a place in the document; TOML's reader does not keep them."""
    best, best_length = 1, 0
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if (header := _HEADER.match(line)) is not None:
            table = at = _names(header[1])
        elif (named := _FIELD.match(line)) is not None:
            at = (*table, *_names(named[1]))
        else:
            continue
        shared = next((i for i, (a, b) in enumerate(zip(at, path, strict=False)) if a != b), min(len(at), len(path)))
        if shared > best_length:
            best, best_length = number, shared
    return best


def _names(dotted: str) -> tuple[str, ...]:
    """`tenants."team.b"` → `("tenants", "team.b")`."""
    return tuple(next(filter(None, found), "") for found in _NAME.findall(dotted))
