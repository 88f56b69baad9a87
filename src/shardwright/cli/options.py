"""The options that several commands share, each defined once; and how they become a frozen config."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from shardwright.cli.console import CliState
from shardwright.config import DEFAULT_MODEL, Config, MasterConfig, ServeConfig, WorkerConfig, read_config
from shardwright.errors import ConfigError

DEFAULT_CONFIG_FILE = Path("shardwright.toml")
DEFAULT_URL = "http://127.0.0.1:8000/v1"
DEFAULT_SERVER_URL = "http://127.0.0.1:8000"


def _set_debug(context: typer.Context, value: bool) -> bool:
    state = context.find_root().obj
    if value:
        logging.getLogger().setLevel(logging.DEBUG)
        if isinstance(state, CliState):
            state.debug = True
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Log everything; show the traceback of an error.", callback=_set_debug)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help=f"Settings file; {DEFAULT_CONFIG_FILE} is read if it is there.", dir_okay=False
    ),
]
RegistryFile = Annotated[
    Path | None, typer.Option("--registry", metavar="FILE", help="The list of workers (default: workers.json).")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Hugging Face id, folder with safetensors, GGUF file, or a bundled name (smollm2-135m, gemma3-270m). "
        f"Default: {DEFAULT_MODEL}.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16 (default: auto)."),
]
LocalWorkersCount = Annotated[
    int,
    typer.Option(
        "--local-workers",
        metavar="N",
        min=0,
        max=64,
        help="Start N worker processes on this machine instead of using the registry's; they end with the command.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps (default: auto).")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="CPU threads of a worker; 0: every core it may use (default: 0)."),
]
MemoryGib = Annotated[
    float | None,
    typer.Option(
        "--memory-gib", metavar="GIB", min=0.0, help="Most memory for weights and KV (default: what is free)."
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        metavar="WHERE",
        help="Where workers keep layers that their memory can't hold, if the model fits nowhere otherwise: nvme (a "
        "file in --cache-dir, read anew for each step), cpu (a GPU's, in the host's memory) or none (default: none).",
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        metavar="N",
        min=1,
        max=64,
        help="Devices (GPUs, or processes on CPU cores) over which DeepSpeed cuts each layer of a worker (default: 1).",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", metavar="DIR", help="Where models and tensors are kept (default: ~/.cache/shardwright)."
    ),
]
KvTokens = Annotated[
    int | None, typer.Option("--kv-tokens", metavar="N", help="Most KV positions, whatever memory there is.")
]
BlockSize = Annotated[int | None, typer.Option("--block-size", metavar="N", help="KV positions of one block.")]
TokenBudget = Annotated[
    int | None, typer.Option("--token-budget", metavar="N", help="Most tokens that one step computes.")
]
StepsInFlight = Annotated[
    int | None,
    typer.Option("--steps-in-flight", metavar="N", help="Steps under way at once; 0: chosen from measurements."),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otlp-endpoint",
        metavar="URL",
        help="Send traces to this OTLP collector over gRPC, say http://localhost:4317 (default: none are made).",
    ),
]
Recover = Annotated[
    bool | None,
    typer.Option(
        "--recover/--no-recover",
        help="When a worker is lost: place the model again over those that are left and go on, or end all requests "
        "with an error. Default: --recover.",
        show_default=False,
    ),
]
HeartbeatTimeout = Annotated[
    float | None,
    typer.Option(
        "--heartbeat-timeout", metavar="SECONDS", help="A worker that is silent for so long is lost (default: 10)."
    ),
]
Url = Annotated[
    str, typer.Option("--url", metavar="URL", help="The API's address; /v1 is added where there is no path.")
]
ServerUrl = Annotated[str, typer.Option("--url", metavar="URL", help="Where shardwright serve listens.")]
ServedModel = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Default: the first that the server names.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", help="The server's API key, if it wants one.", envvar="SHARDWRIGHT_API_KEY"
    ),
]
RequestTimeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="How long the server may send nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else, on standard output.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """Which model, on which workers: what every command takes that looks at a model."""

    model: Model = None
    local_workers: LocalWorkersCount = 0
    registry: RegistryFile = None
    dtype: Dtype = None
    device: Device = None
    threads: Threads = None
    memory_gib: MemoryGib = None
    offload: Offload = None
    tensor_parallel: TensorParallel = None
    kv_tokens: KvTokens = None
    block_size: BlockSize = None
    cache_dir: CacheDir = None
    config: ConfigFile = None

    def master_config(self, **more: object) -> MasterConfig:
        """The config with these flags and more of them (None: not given). Raises `ConfigError`."""
        names = ("model", "registry", "dtype", "kv_tokens", "block_size", "cache_dir")
        return master_config(self.config, **{name: getattr(self, name) for name in names}, **more)

    def worker_options(self) -> list[str]:
        """The command line that local workers get; what was not given is left to them.

        Raises `ConfigError` for flags that would have no effect: a registered worker got its own when it was started.
        """
        own = (
            ("--device", self.device),
            ("--threads", self.threads),
            ("--tensor-parallel", self.tensor_parallel),
            ("--memory-gib", self.memory_gib),
            ("--offload", self.offload),
        )
        for name, value in own:
            if value is not None and not self.local_workers:
                raise ConfigError(
                    f"{name} is for --local-workers; a registered worker gets it where it is started: "
                    f"shardwright worker {name} {value}"
                )
        given = (*own, ("--cache-dir", self.cache_dir))
        return [word for name, value in given if value is not None for word in (name, str(value))]


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command have a parameter that is a dataclass of options: the fields become options in its place."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = kind
        hints = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
            )
            for each in fields(kind)
        ]

    @functools.wraps(command)
    def run(**values: object) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{each.name: values.pop(each.name) for each in fields(kind) if each.name in values})
        command(**values)

    # Both are what typer reads.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def master_config(file: Path | None, **flags: object) -> MasterConfig:
    """Flags (None: not given) over `SHARDWRIGHT_*` over the settings file over the defaults."""
    return _config(MasterConfig, file, flags)


def worker_config(file: Path | None, **flags: object) -> WorkerConfig:
    """Flags (None: not given) over `SHARDWRIGHT_*` over the settings file over the defaults."""
    return _config(WorkerConfig, file, flags)


def serve_config(file: Path | None, **flags: object) -> ServeConfig:
    """Flags (None: not given) over `SHARDWRIGHT_SERVE_*` over the settings file over the defaults."""
    return _config(ServeConfig, file, flags)


def _config(kind: type[Config], file: Path | None, flags: dict[str, object]) -> Config:
    if file is None and DEFAULT_CONFIG_FILE.is_file():
        file = DEFAULT_CONFIG_FILE
    return read_config(kind, flags=flags, environ=os.environ, file=file)
