"""Every setting, from flag, environment (`TIDEGATE_*`) or TOML file, in that order of precedence.

The same name everywhere: the field `max_body_mib` is `--max-body-mib`, `TIDEGATE_MAX_BODY_MIB` and `max_body_mib = 8`.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from platformdirs import user_data_path
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as UnreadableVariable

ENV_PREFIX: Final = "TIDEGATE_"
INTERACTIVE_CLASSES: Final = ("critical", "default")
SETTINGS_FILE_ENV: Final = f"{ENV_PREFIX}SETTINGS"
FALLBACK_API_KEY_ENV: Final = f"{ENV_PREFIX}FALLBACK_API_KEY"
_SECRET: Final = frozenset({"api_key", "operator_key"})


def _split(value: Any) -> Any:
    """Several values in one environment variable are separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _by_class(value: Any) -> Any:
    """`5` holds for the classes that people wait for; `critical=2,default=5` names each."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return dict.fromkeys(INTERACTIVE_CLASSES, value)
    if not isinstance(value, str):
        return value
    if "=" not in value:
        return dict.fromkeys(INTERACTIVE_CLASSES, value.strip())
    return {name.strip(): seconds.strip() for name, _, seconds in (part.partition("=") for part in value.split(","))}


Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Seconds = Annotated[float, Field(gt=0)]
AnyClass = Literal["critical", "default", "batch"]
InteractiveClass = Literal["critical", "default"]
ByClass = Annotated[Mapping[AnyClass, Seconds] | None, NoDecode, BeforeValidator(_by_class)]
ByInteractiveClass = Annotated[Mapping[InteractiveClass, Seconds] | None, NoDecode, BeforeValidator(_by_class)]
ClientField = Literal["kv_transfer_params", "cache_salt", "stream_interval", "vllm_xargs", "headers"]
ClientFields = Annotated[tuple[ClientField, ...], NoDecode, BeforeValidator(_split)]


class SettingsError(Exception):
    """A setting that is unknown or wrong; the message is one sentence for the operator."""


class Listen(BaseModel):
    """Listening"""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    uds: str | None = Field(None, description="Unix socket to listen on instead of host and port.")
    root_path: str = Field("", description="Path prefix that a proxy in front strips.")
    ssl_keyfile: str | None = Field(None, description="TLS key file.")
    ssl_certfile: str | None = Field(None, description="TLS certificate file.")
    ssl_ca_certs: str | None = Field(None, description="CA file that client certificates are checked against.")
    ssl_cert_reqs: int = Field(0, ge=0, le=2, description="0: no client certificate, 1: optional, 2: required.")
    ssl_ciphers: str = Field("TLSv1", description="OpenSSL cipher string for TLS 1.2 and below.")
    drain_timeout_s: float = Field(
        30, ge=0, description="Seconds that running requests may take to finish on SIGTERM.",
        json_schema_extra={"flag": "--drain-timeout"},
    )  # fmt: skip
    drain_delay_s: float = Field(
        0, ge=0, description="Seconds between not ready and the first refusal on SIGTERM, for a balancer to notice.",
        json_schema_extra={"flag": "--drain-delay"},
    )  # fmt: skip


class Access(BaseModel):
    """Access"""

    api_key: Strings = Field((), description="A key that clients may use; repeatable. None: open to all.")
    require_key: bool = Field(
        False, description="Want a key also while there is no --api-key and no tenant. Advised with a shared Redis."
    )
    tenants_file: Path | None = Field(None, description="TOML file that declares tenants; read again when it changes.")
    operator_key: str | None = Field(
        None, min_length=16, description="Key of the operator's routes. Unset: made once, in the data folder."
    )
    failed_logins_per_minute: int = Field(20, ge=1, description="Wrong keys from one address before it has to wait.")
    model_lists_per_minute: int = Field(600, ge=1, description="Calls of /v1/models from one address.")
    operator_requests_per_minute: int = Field(300, ge=1, description="Calls of the operator's routes from one address.")
    forwarded_allow_ips: Strings = Field(
        ("127.0.0.1", "::1"),
        description="Proxy whose X-Forwarded-For is believed, address or network; repeatable, * for all.",
    )
    allowed_origins: Strings = Field((), description="Browser origin allowed by CORS; repeatable, * for all.")
    allowed_methods: Strings = Field(("*",), description="Methods allowed by CORS; repeatable.")
    allowed_headers: Strings = Field(("*",), description="Headers allowed by CORS; repeatable.")
    allow_credentials: bool = Field(False, description="Let browsers send credentials across origins.")
    allow_client_field: ClientFields = Field(
        (), description="Open an engine field to clients; repeatable. `headers` opens X-Vllm-Priority and its like."
    )
    developer_routes: bool = Field(False, description="Mount vLLM's developer and cluster routes.")
    docs: bool = Field(
        True, description="Serve /docs and /openapi.json.", json_schema_extra={"off": "--disable-fastapi-docs"}
    )


class Requests(BaseModel):
    """Requests"""

    max_body_mib: float = Field(64, gt=0, description="Largest request body in MiB.")
    default_max_tokens: int | None = Field(
        None, ge=1, description="Answer length for chats that name none. Unset: what the window leaves."
    )
    background_task_max_tokens: int | None = Field(
        2048, ge=1, description="The same for a chat UI's own calls (titles, tags, follow-ups)."
    )
    fast_streams: bool = Field(
        True, description="Make the frames of plain text streams without vLLM's objects; the same bytes, less CPU."
    )
    keep_alive_s: float = Field(10, gt=0, description="Seconds a stream may wait before a comment keeps it alive.")


class Overload(BaseModel):
    """Overload"""

    ttft_slo_s: ByClass = Field(
        None, description="Seconds to the first token, waiting included: a number, or critical=2,default=5,batch=600. "
        "Unset: 5 times the unloaded figure, at least 5.",
        json_schema_extra={"flag": "--ttft-slo"},
    )  # fmt: skip
    tpot_slo_s: ByInteractiveClass = Field(
        None, description="Seconds per token of a running stream; the strictest class counts. Unset: twice the "
        "unloaded figure, at least 0.05.",
        json_schema_extra={"flag": "--tpot-slo"},
    )  # fmt: skip
    slow_reader_timeout_s: float = Field(
        30, gt=0, description="Seconds that a client may leave a part of its answer unread before the answer is ended.",
        json_schema_extra={"flag": "--slow-reader-timeout"},
    )  # fmt: skip


class ContextOverride(BaseModel):
    """The context settings of one served model or adapter; what is unset is as for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    truncation: Literal["auto", "disabled"] | None = None
    retention_ratio: float | None = Field(None, gt=0, le=1)
    reserve_tokens: int | None = Field(None, ge=1)


class Context(BaseModel):
    """Long chats"""

    context_truncation: Literal["auto", "disabled"] = Field(
        "auto", description="What happens to a chat that is longer than the window, unless the request says."
    )
    context_retention_ratio: float = Field(
        0.75, gt=0, le=1, description="Share of the room that a cut leaves; lower cuts more and less often."
    )
    context_reserve_tokens: int | None = Field(
        None, ge=1, description="Tokens kept free for the answer. Unset: 1,024, or a quarter of a small window."
    )
    context_count_cache_entries: int = Field(
        200_000, ge=1, description="Messages whose token counts are remembered, at about 200 bytes each."
    )


class Store(BaseModel):
    """Tenants and limits"""

    redis_url: str | None = Field(
        None,
        description="Redis that all replicas share: redis://, rediss://, unix://, redis+sentinel://HOST,HOST/SERVICE, "
        "redis+cluster://HOST,HOST. Unset: an embedded one in the data folder.",
    )
    redis_timeout_s: float = Field(
        0.05, gt=0, description="Seconds a request waits for Redis; after that it is served without."
    )
    data_folder: Path | None = Field(
        None, description="Folder for what the server keeps. Unset: the user's data folder for tidegate."
    )
    cached_token_price: float = Field(
        1.0, ge=0, le=1, description="What a prompt token found in the prefix cache counts against token limits."
    )
    limit_reserve_tokens: int = Field(
        1024, ge=0,
        description="Tokens reserved for an answer whose length the request leaves open; what it uses more is made up "
        "for afterwards. 0 reserves all it may get.",
    )  # fmt: skip


class Batches(BaseModel):
    """Batches"""

    batches: bool = Field(True, description="Serve /v1/files and /v1/batches, and run batches in the gaps.")
    batch_folder: Path | None = Field(
        None, description="Folder for files, shared by replicas that share one Redis. Unset: in the data folder."
    )
    batch_max_lines: int = Field(50_000, ge=1, description="Most requests in one batch.")
    batch_max_file_mib: float = Field(512, gt=0, description="Largest uploaded file in MiB.")
    batch_quota_mib: float = Field(
        10_240, ge=0, description="What one tenant's files may take together, in MiB; 0 for any."
    )
    batch_files_kept_days: float = Field(30, gt=0, description="Days that files are kept, unless a client says fewer.")


class Resilience(BaseModel):
    """Engine restarts"""

    engine_hang_timeout_s: float = Field(
        30, gt=0, description="Seconds an engine with requests may make no step before it is replaced.",
        json_schema_extra={"flag": "--engine-hang-timeout"},
    )  # fmt: skip
    engine_max_failed_restarts: int = Field(
        5, ge=1, description="Failed restarts of the engine in a row after which the process ends."
    )
    restart_wait_s: float = Field(
        60, ge=0, description="Seconds a request waits while a dead engine is replaced.",
        json_schema_extra={"flag": "--restart-wait"},
    )  # fmt: skip


class Degradation(BaseModel):
    """Overload"""

    highest_automatic_level: int | None = Field(
        None, ge=0, le=5, description="Highest level that pressure alone reaches; 0 leaves all to the operator. "
        "Unset: 4 with a fallback, else 3.",
    )  # fmt: skip
    economy_max_tokens: int = Field(512, ge=1, description="Longest answer in tokens from level 1 on.")
    canned_reply: str | None = Field(
        None, description="What level 5 answers to chats that opted in by `x-degradation: canned`."
    )
    fallback_url: Strings = Field(
        (), description="OpenAI-compatible server to fall back on, such as https://host/v1; repeatable, in order."
    )
    fallback_model: str | None = Field(None, description="Model to ask for there. Unset: the client's own choice.")
    fallback_api_key_file: Path | None = Field(
        None, description="File with the key for it. Unset: the variable TIDEGATE_FALLBACK_API_KEY, if it is there."
    )


class FallbackUpstream(BaseModel):
    """A fallback as a table [[fallback]]; the key comes from a variable or a file, never from the settings file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    name: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    models: dict[str, str] = Field(default_factory=dict)
    connect_timeout_s: float = Field(default=5, gt=0)
    first_byte_timeout_s: float = Field(default=30, gt=0)
    idle_timeout_s: float = Field(default=60, gt=0)
    whole_answer_timeout_s: float = Field(default=300, gt=0)
    canary_share: float = Field(default=0, ge=0, le=1)

    @field_validator("url")
    @classmethod
    def _has_scheme_and_host(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("a fallback URL is http://HOST[:PORT]/v1 or https://…")
        return url

    @property
    def host(self) -> str:
        """The host and port, which name an upstream that has no name of its own."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def api_key(self) -> str | None:
        """The key from where the table says. Raises `SettingsError`."""
        if self.api_key_env is not None:
            if not (key := os.environ.get(self.api_key_env)):
                raise SettingsError(f"The fallback {self.url} takes its key from {self.api_key_env}, which is not set.")
            return key
        if self.api_key_file is None:
            return None
        try:
            return self.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(
                f"The key file {self.api_key_file} of the fallback {self.url} cannot be read: {error.strerror}."
            ) from error


class Logs(BaseModel):
    """Logs"""

    log_format: Literal["auto", "json", "pretty"] = Field("auto", description="auto: pretty at a terminal, else JSON.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="Least level logged, by the server and the engine."
    )
    access_log: bool = Field(
        True, description="Log a line for each request.", json_schema_extra={"off": "--disable-uvicorn-access-log"}
    )


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
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

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


SECTIONS: Final[tuple[type[BaseModel], ...]] = (
    Listen,
    Access,
    Requests,
    Overload,
    Context,
    Store,
    Batches,
    Resilience,
    Degradation,
    Logs,
)


def load_settings(flags: Mapping[str, Any], file: Path | None) -> Settings:
    """Settings from the given flags, the environment and the file. Raises `SettingsError`."""
    apart = {SETTINGS_FILE_ENV, FALLBACK_API_KEY_ENV}
    ours = (name for name in os.environ if name.startswith(ENV_PREFIX) and name not in apart)
    _refuse_unknown(ours, "environment variable", _env_name)

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=_checked(file))

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
