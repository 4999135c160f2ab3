"""Tenants as an operator writes them, in the tenants file and in the operator API alike."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from server.policy.tenants import Limits, Tenant, TrafficClass

_MOST: Final = 10**12
_MODEL_NAME: Final = 256


def _limit(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST):
        return value
    raise ValueError(f"a limit is a whole number from 1 to {_MOST:,}; leave it out for no limit")


Limit = Annotated[int | None, BeforeValidator(_limit)]
Models = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=_MODEL_NAME)], ...], Field(min_length=1)]


class Form(BaseModel):
    """Unknown fields are refused: a misspelt limit would be no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class LimitsForm(Form):
    """What one tenant or one end user may use; null or left out: no limit."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None
    concurrency: Limit = None

    def limits(self) -> Limits:
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            tokens_per_day=self.tokens_per_day,
            concurrency=self.concurrency,
        )


class TenantForm(Form):
    """Everything about a tenant but its name and its keys."""

    traffic_class: TrafficClass = Field("default", alias="class")
    limits: LimitsForm = LimitsForm()
    models: Models | None = None
    trusted: bool = Field(False, strict=True)
    end_user_limits: LimitsForm | None = None

    @model_validator(mode="after")
    def _end_users_are_named(self) -> "TenantForm":
        if self.end_user_limits is not None and not self.trusted:
            raise ValueError("end_user_limits need trusted = true: only a trusted tenant names its end users")
        return self

    def tenant(self, name: str) -> Tenant:
        return Tenant(
            name=name,
            traffic_class=self.traffic_class,
            limits=self.limits.limits(),
            models=None if self.models is None else frozenset(self.models),
            trusted=self.trusted,
            end_user_limits=None if self.end_user_limits is None else self.end_user_limits.limits(),
        )


def written_limits(limits: Limits) -> dict[str, int | None]:
    """Limits as JSON holds them."""
    return {
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "tokens_per_day": limits.tokens_per_day,
        "concurrency": limits.concurrency,
    }


def written(tenant: Tenant) -> dict[str, Any]:
    """A tenant as JSON holds it, without its name; `TenantForm` reads it back."""
    return {
        "class": tenant.traffic_class,
        "limits": written_limits(tenant.limits),
        "models": None if tenant.models is None else sorted(tenant.models),
        "trusted": tenant.trusted,
        "end_user_limits": None if tenant.end_user_limits is None else written_limits(tenant.end_user_limits),
    }


def place(error: ValidationError) -> tuple[str, ...]:
    """Where the first fault is, as the names on the way to it."""
    return tuple(str(part) for part in error.errors(include_url=False)[0]["loc"])


def sentence(error: ValidationError) -> str:
    """The first fault, for the operator."""
    problem = error.errors(include_url=False)[0]
    reason = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        reason = "there is no such field"
    where = _path(problem["loc"])
    shown = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
    return f"{where}: {reason}{shown}." if where else f"{reason[:1].upper()}{reason[1:]}."


def _path(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc)
