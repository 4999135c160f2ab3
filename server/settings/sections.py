"""The settings by section, as `tidegate serve --help` shows them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_settings import NoDecode

INTERACTIVE_CLASSES: Final = ("critical", "default")


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
    api_server_count: int = Field(
        1, ge=1, le=64, description="Front-end processes on the one engine and port. More than one where a single "
        "process's CPU limits the server."
    )  # fmt: skip
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
    console: bool = Field(True, description="Serve the operator's console at /console.")
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
    coalesced_tokens: int = Field(
        8,
        ge=1,
        description="Tokens of a plain stream that may share a frame while the server is behind its engine; 1: none.",
    )
    keep_alive_s: float = Field(10, gt=0, description="Seconds a stream may wait before a comment keeps it alive.")


class Overload(BaseModel):
    """Overload"""

    ttft_slo_s: ByClass = Field(
        None, description="Seconds to the first token, waiting included: a number, or critical=2,default=5,batch=600. "
        "Unset: 5 times the unloaded figure, at least 10.",
        json_schema_extra={"flag": "--ttft-slo"},
    )  # fmt: skip
    tpot_slo_s: ByInteractiveClass = Field(
        None, description="Seconds per token of a running stream; the strictest class counts. Unset: twice the "
        "unloaded figure, at least 1.",
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
        0.76, gt=0, le=1, description="Share of the room that a cut leaves; lower cuts more and less often."
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
    engine_fork_server: bool = Field(
        True, description="Start engines as copies of a process that has imported vLLM: seconds instead of a minute."
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
    """Logs, metrics, traces"""

    log_format: Literal["auto", "json", "pretty"] = Field("auto", description="auto: pretty at a terminal, else JSON.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="Least level logged, by the server and the engine."
    )
    access_log: bool = Field(
        True, description="Log a line for each request.", json_schema_extra={"off": "--disable-uvicorn-access-log"}
    )
    metrics_tenants: int = Field(
        100, ge=0, description="Tenants with a label of their own in the metrics; the others share `other`."
    )
    otlp_endpoint: str | None = Field(
        None, description="Collector that traces go to by OTLP over HTTP, such as http://localhost:4318. Unset: none."
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://none")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("the collector's URL is http://HOST[:PORT] or https://…")
        return url


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
