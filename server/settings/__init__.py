"""Every setting, from flag, environment (`TIDEGATE_*`), secrets folder or TOML file, in that order of precedence.

The same name everywhere: the field `max_body_mib` is `--max-body-mib`, `TIDEGATE_MAX_BODY_MIB` and `max_body_mib = 8`.
A file in the folder that `TIDEGATE_SECRETS` names is called like the variable, in small letters: `tidegate_api_key`.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from platformdirs import user_data_path
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as UnreadableVariable

from server.settings.sections import (
    SECTIONS,
    Access,
    Batches,
    Context,
    ContextOverride,
    Degradation,
    FallbackUpstream,
    Listen,
    Logs,
    Overload,
    Requests,
    Resilience,
    SettingsError,
    Store,
)

__all__ = [
    "SECTIONS",
    "SETTINGS_FILE_ENV",
    "FallbackUpstream",
    "Settings",
    "SettingsError",
    "flag_name",
    "load_settings",
    "switch_off_alias",
]

ENV_PREFIX: Final = "TIDEGATE_"
SETTINGS_FILE_ENV: Final = f"{ENV_PREFIX}SETTINGS"
SECRETS_FOLDER_ENV: Final = f"{ENV_PREFIX}SECRETS"
FALLBACK_API_KEY_ENV: Final = f"{ENV_PREFIX}FALLBACK_API_KEY"
_SECRET: Final = frozenset({"api_key", "operator_key"})


class Settings(
    Listen, Access, Requests, Overload, Context, Store, Batches, Resilience, Degradation, Logs, BaseSettings
):
    """The whole tree, frozen. Only the composition (`server/app.py`) sees it; rooms get their own small parts."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    model: str | None = Field(None, description="Model folder or name. Unset: a small embedded chat model.")
    context_models: dict[str, ContextOverride] = Field(
        default_factory=dict, description="Context settings by served name, as tables [context_models.NAME]."
    )
    fallback: tuple[FallbackUpstream, ...] = Field(
        default_factory=tuple, description="Servers to fall back on in their order, as tables [[fallback]]."
    )
    vllm: dict[str, Any] = Field(default_factory=dict, description="vLLM flags in the settings file's [vllm] table.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # the base class names it
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, file_secret_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def fallbacks(self) -> tuple[FallbackUpstream, ...]:
        """The tables, then those of the flag."""
        models = {} if self.fallback_model is None else {"*": self.fallback_model}
        key_file = self.fallback_api_key_file
        key_env = FALLBACK_API_KEY_ENV if key_file is None and FALLBACK_API_KEY_ENV in os.environ else None
        plain = [
            FallbackUpstream(url=url, models=models, api_key_env=key_env, api_key_file=key_file)
            for url in self.fallback_url
        ]
        return (*self.fallback, *plain)

    @property
    def data_path(self) -> Path:
        """The folder for what the server keeps; it may not exist yet."""
        return self.data_folder or user_data_path("tidegate")

    @property
    def vllm_flags(self) -> tuple[str, ...]:
        """The `[vllm]` table as command-line flags."""
        return tuple(flag for name, value in self.vllm.items() for flag in _as_flags(name, value))


def load_settings(flags: Mapping[str, Any], file: Path | None) -> Settings:
    """Settings from the given flags, the environment, its secrets folder and the file. Raises `SettingsError`."""
    apart = {SETTINGS_FILE_ENV, SECRETS_FOLDER_ENV, FALLBACK_API_KEY_ENV}
    ours = (name for name in os.environ if name.startswith(ENV_PREFIX) and name not in apart)
    _refuse_unknown(ours, "environment variable", _env_name)

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=_checked(file), secrets_dir=_secrets_folder())

    try:
        settings = FromFile(**flags)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from error
    except UnreadableVariable as error:
        raise SettingsError(f"{str(error).capitalize()}: write it as JSON.") from error
    _check_fallbacks(settings)
    for name in settings.vllm:
        if (field := name.replace("-", "_")) in Settings.model_fields:
            raise SettingsError(f"`{name}` in [vllm] is Tidegate's own setting: write `{field}` above the tables.")
    return settings


def _check_fallbacks(settings: Settings) -> None:
    """Find at the start what would be found when the fallback is needed. Raises `SettingsError`."""
    try:
        for fallback in settings.fallbacks:
            fallback.api_key()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise SettingsError(f"Wrong --fallback-url: {problem['msg']} (given: {problem['input']!r}).") from error


def flag_name(field: str) -> str:
    """The command-line flag of a field."""
    return _extra(field, "flag") or f"--{field.replace('_', '-')}"


def switch_off_alias(field: str) -> str | None:
    """vLLM's own flag that turns a boolean field off, where it has one."""
    return _extra(field, "off")


def _extra(field: str, key: str) -> str | None:
    extra = Settings.model_fields[field].json_schema_extra
    return str(extra[key]) if isinstance(extra, dict) and key in extra else None


def _env_name(field: str) -> str:
    return f"{ENV_PREFIX}{field.upper()}"


def _checked(file: Path | None) -> Path | None:
    if file is None:
        return None
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The settings file {file} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {file} is not valid TOML: {error}.") from error
    _refuse_unknown(keys, f"key in {file}", str)
    return file


def _secrets_folder() -> Path | None:
    """The folder of secrets, with every secret in it readable and known."""
    if not (given := os.environ.get(SECRETS_FOLDER_ENV)):
        return None
    folder = Path(given)
    try:
        files = [file for file in folder.iterdir() if file.name.lower().startswith(ENV_PREFIX.lower())]
        _refuse_unknown(
            (file.name.lower() for file in files), f"secret in {folder}", lambda field: _env_name(field).lower()
        )
        for file in files:
            file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The secrets in {folder}, named by {SECRETS_FOLDER_ENV}, cannot be read: {error}."
        ) from error
    return folder


def _refuse_unknown(names: Iterable[str], kind: str, spelled: Callable[[str], str]) -> None:
    known = [spelled(field) for field in Settings.model_fields]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SettingsError(f"Unknown {kind}: {name}.{f' Did you mean {near[0]}?' if near else ''}")


def _sentence(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field, *inside = problem["loc"]
    in_a_table = any(isinstance(part, str) for part in inside)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
    name = f"{field}{path}" if in_a_table else flag_name(str(field))
    # What stands in a field that does not exist may be a secret.
    hidden = field in _SECRET or problem["type"] == "extra_forbidden"
    given = "" if hidden else f" (given: {problem['input']!r})"
    return f"Wrong value for {name}: {problem['msg']}{given}."


def _as_flags(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, list) else [value]
    return [flag, *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
