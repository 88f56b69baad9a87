"""Settings of a master, of a worker and of the HTTP server, read once, then passed down frozen.

Precedence: a flag, then the environment (`SHARDWRIGHT_<NAME>`; the HTTP server's `SHARDWRIGHT_SERVE_<NAME>`, since a
worker has a host and a port too), then the file `shardwright.toml` (tables `[master]`, `[worker]` and `[serve]`), then
the default here. Nothing below this module reads the environment.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

from shardwright.errors import ConfigError

MIB = 1024 * 1024
GIB = 1024 * MIB

DEFAULT_PORT = 50051
DEFAULT_MODEL = "google/gemma-2b"
OFFLOAD_CHOICES = ("none", "cpu", "nvme")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_cache_dir() -> Path:
    """Where models and tensors are kept unless told otherwise."""
    return Path("~/.cache/shardwright").expanduser()


ALL_REDUCES = ("auto", "shm", "gloo")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How one worker runs."""

    host: str = "0.0.0.0"  # noqa: S104  workers are reached over the network: that is what they are for
    port: int = DEFAULT_PORT
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    threads: int = 0  # 0: every core that this process may use
    tensor_parallel: int = 1  # devices that compute each layer together, from `device` on
    all_reduce: str = "auto"  # how they add up on CPUs: shm (DeepSpeed's kernel), gloo, or auto (shm where it compiles)
    memory_bytes: int = 0  # most for weights and KV; 0: what the device has free
    offload: str = "none"  # where weights go that the memory can't hold: cpu (beside a GPU), nvme (in `cache_dir`)
    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    cache_limit_bytes: int = 50 * GIB
    max_frame_bytes: int = 256 * MIB  # largest tensor that a peer may send
    otlp_endpoint: str = ""  # http(s)://host:port of an OTLP collector that gets traces, over gRPC; empty: none
    metrics_port: int | None = None  # where Prometheus is answered, on the same host; 0: a free one; None: nowhere

    def __post_init__(self) -> None:
        _check_range("port", self.port, 0, 65535)
        if self.metrics_port is not None:
            _check_range("metrics_port", self.metrics_port, 0, 65535)
            if self.metrics_port == self.port != 0:
                raise ConfigError(f"metrics_port is {self.metrics_port}, and so is port; choose two different ones")
        _check_range("threads", self.threads, 0, 1024)
        _check_range("tensor_parallel", self.tensor_parallel, 1, 64)
        if self.all_reduce not in ALL_REDUCES:
            raise ConfigError(f"all_reduce is {self.all_reduce!r}; choose one of {', '.join(ALL_REDUCES)}")
        _check_range("memory_bytes", self.memory_bytes, 0, None)
        if self.offload not in OFFLOAD_CHOICES:
            raise ConfigError(f"offload is {self.offload!r}; choose one of {', '.join(OFFLOAD_CHOICES)}")
        _check_range("cache_limit_bytes", self.cache_limit_bytes, 0, None)
        _check_range("max_frame_bytes", self.max_frame_bytes, 1, None)
        _check_endpoint(self.otlp_endpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterConfig:
    """How one master runs."""

    model: str = DEFAULT_MODEL
    dtype: str = "auto"
    registry: Path = Path("workers.json")
    metrics: Path = Path("metrics.json")
    metrics_interval_s: float = 5.0
    metrics_history_s: float = 3600.0  # how long back the history goes, in memory and in the rows beside `metrics`
    write_history: bool = True  # whether these rows are kept in a file
    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    block_size: int = 16
    token_budget: int = 512  # most tokens that one step computes
    max_running: int = 64  # most sequences that hold KV blocks
    typical_prompt_tokens: int = 512  # of a request: stages are balanced for such prompts,
    typical_new_tokens: int = 128  # and for such answers
    max_waiting: int = 512  # most requests that wait for their first place; over it they are refused; 0: any number
    kv_tokens: int = 65536  # most KV positions, whatever memory there is
    steps_in_flight: int = 0  # 0: chosen from measurements
    prefix_cache: bool = True
    connect_timeout_s: float = 10.0
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 10.0
    recover: bool = True  # from a lost worker: place the model again over those that are left; else requests end
    probe_interval_s: float = 5.0  # an idle pipeline is tried this often with a token of the master's own; 0: never
    gather_s: float = 0.002  # an idle pipeline waits so long for requests that come together; 0: it does not
    max_frame_bytes: int = 256 * MIB
    otlp_endpoint: str = ""  # http(s)://host:port of an OTLP collector that gets traces, over gRPC; empty: none

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        _check_range("block_size", self.block_size, 1, 1024)
        _check_range("token_budget", self.token_budget, 1, 1 << 20)
        _check_range("max_running", self.max_running, 1, 1 << 16)
        _check_range("typical_prompt_tokens", self.typical_prompt_tokens, 0, 1 << 24)
        _check_range("typical_new_tokens", self.typical_new_tokens, 1, 1 << 24)
        _check_range("max_waiting", self.max_waiting, 0, 1 << 20)
        _check_range("kv_tokens", self.kv_tokens, self.block_size, None)
        _check_range("steps_in_flight", self.steps_in_flight, 0, 1024)
        for name in ("metrics_interval_s", "connect_timeout_s", "heartbeat_interval_s", "heartbeat_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 seconds")
        _check_seconds("metrics_history_s", self.metrics_history_s)
        if self.write_history and self.metrics_log == self.metrics:
            raise ConfigError(
                f"metrics is {str(self.metrics)!r}; a file of that ending is for the history beside it: "
                "choose another name, such as metrics.json"
            )
        if not self.probe_interval_s >= 0:
            raise ConfigError(f"probe_interval_s is {self.probe_interval_s}; it must be 0 (never) or above")
        if not 0 <= self.gather_s <= 10:
            raise ConfigError(f"gather_s is {self.gather_s}; it must be from 0 (no waiting) to 10 seconds")
        _check_endpoint(self.otlp_endpoint)

    @property
    def metrics_log(self) -> Path:
        """Where the rows of the last hour are: beside `metrics`, with the ending for one JSON object a line."""
        return self.metrics.parent / f"{self.metrics.stem}.jsonl"


TOOL_STYLES = ("auto", "none", "hermes", "llama3", "gemma3", "functiongemma", "gemma4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How the HTTP API is served. Sizes are bytes, times are seconds."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key_file: Path | None = None  # None: everybody may use the API
    open_metrics: bool = False  # whether /metrics, /metrics.json and /prometheus/targets need no API key
    cors_origins: str = ""  # web origins whose pages may call the API, separated by commas; *: all
    tool_style: str = "auto"  # how the model writes tool calls; auto: told by its chat template
    max_body_bytes: int = 4 * MIB
    max_prompts: int = 64  # of one completion request
    max_choices: int = 16  # `n` of one request
    max_connections: int = 2048  # over it, connections that wait for nothing are closed in favour of new ones
    max_event_listeners: int = 64  # clients of /api/events, the dashboard's among them; over it 503
    head_timeout_s: float = 20.0  # for the head of a request, from the connection's start
    body_timeout_s: float = 30.0  # for the body of a request, from its head
    keep_alive_s: float = 60.0  # how long a connection without a request is kept
    write_timeout_s: float = 60.0  # how long a client may read nothing of an answer
    request_timeout_s: float = 600.0  # for an answer, and the most that a request may ask for
    shutdown_timeout_s: float = 10.0  # how long running answers may go on after the server was told to stop

    def __post_init__(self) -> None:
        _check_range("port", self.port, 0, 65535)
        _check_range("max_body_bytes", self.max_body_bytes, 1024, GIB)
        _check_range("max_prompts", self.max_prompts, 1, 4096)
        _check_range("max_choices", self.max_choices, 1, 1024)
        _check_range("max_connections", self.max_connections, 1, 1 << 20)
        _check_range("max_event_listeners", self.max_event_listeners, 1, 1 << 16)
        if self.tool_style not in TOOL_STYLES:
            raise ConfigError(f"tool_style is {self.tool_style!r}; choose one of {', '.join(TOOL_STYLES)}")
        for name in ("head_timeout_s", "body_timeout_s", "keep_alive_s", "write_timeout_s", "request_timeout_s"):
            _check_seconds(name, getattr(self, name))
        if not 0 <= self.shutdown_timeout_s <= _MAX_SECONDS:
            raise ConfigError(
                f"shutdown_timeout_s is {self.shutdown_timeout_s}; it must be between 0 and {_MAX_SECONDS:.0f} seconds"
            )


_MAX_SECONDS = 86400.0


def _check_seconds(name: str, value: float) -> None:
    if not 0 < value <= _MAX_SECONDS:
        raise ConfigError(f"{name} is {value}; it must be above 0 and at most {_MAX_SECONDS:.0f} seconds")


def _check_endpoint(value: str) -> None:
    if not value:
        return
    try:
        parts = urlsplit(value)
        is_good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(
            f"otlp_endpoint is {value!r}; it must be http://HOST:PORT or https://HOST:PORT of an OTLP collector "
            "that speaks gRPC (port 4317, most often)"
        )


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name} is {value}; it must be {bound}")


Config = TypeVar("Config", bound=MasterConfig | WorkerConfig | ServeConfig)

_TABLES: Mapping[type, str] = {MasterConfig: "master", WorkerConfig: "worker", ServeConfig: "serve"}
_PREFIXES: Mapping[type, str] = {ServeConfig: "SHARDWRIGHT_SERVE_"}

_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own, for all programs of a machine: heeded where nothing else is said."""


def read_config(
    kind: type[Config],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    file: Path | None = None,
) -> Config:
    """Merge flags (None: not given), environment and file into one frozen config.

    Raises `ConfigError` for a value of the wrong type or range, for an unknown key in the file, and for a file
    that was named but can't be read.
    """
    table = _TABLES[kind]
    prefix = _PREFIXES.get(kind, "SHARDWRIGHT_")
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    if file is not None:
        for name, value in _read_table(file, table).items():
            if name not in hints:
                raise ConfigError(f"{file}: [{table}] has no setting {name!r}; known: {', '.join(sorted(hints))}")
            values[name] = _convert(value, hints[name], f"{file}: {table}.{name}")
    for name, hint in hints.items():
        variable = f"{prefix}{name.upper()}"
        if variable in environ:
            values[name] = _convert(environ[variable], hint, variable)
    values |= {name: _convert(value, hints[name], name) for name, value in flags.items() if value is not None}
    if "otlp_endpoint" in hints and "otlp_endpoint" not in values:
        values["otlp_endpoint"] = next((environ[name] for name in _OTLP_VARIABLES if environ.get(name)), "")
    return kind(**values)  # type: ignore[arg-type]


def _read_table(file: Path, table: str) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as exc:
        raise ConfigError(f"{file}: can't be read: {exc.strerror}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{file}: not valid TOML: {exc}") from exc
    section: object = content.get(table, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {table} must be a table")
    return section


def _convert(value: object, hint: object, where: str) -> object:
    """Turn text or a TOML value into the field's type; the message names `where` the value came from."""
    kind = hint if isinstance(hint, type) else get_args(hint)[0]
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            return words[str(value).lower()]
        if kind is Path:
            return Path(str(value)).expanduser()
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return kind(value)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{where} is {value!r}; it must be {_KIND_NAMES[kind]}")


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
