"""The commands about the cache folder: list what is kept, throw it away."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from shardwright.cli import options
from shardwright.cli.console import say, stdout_console
from shardwright.config import MIB, WorkerConfig

if TYPE_CHECKING:
    from shardwright.runtime.tensor_cache import TensorCache

cache = typer.Typer(
    help="Look at or clear the tensors and compiled kernels that workers keep on this machine's disk.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands under the application."""
    app.add_typer(cache, name="cache")


def _open(settings: WorkerConfig) -> TensorCache:
    from shardwright.runtime.tensor_cache import TensorCache

    return TensorCache(settings.cache_dir, limit_bytes=settings.cache_limit_bytes)


@cache.command("ls")
def list_entries(
    as_json: options.AsJson = False,
    cache_dir: options.CacheDir = None,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """List the cached tensors, the least recently used first, and the kernels that were compiled for this CPU.

    When the limit is reached, the first of the tensors go first. Kernels are small and stay.
    """
    from shardwright.runtime.kernel_cache import KernelCache

    settings = options.worker_config(config, cache_dir=cache_dir)
    compiled = KernelCache(settings.cache_dir)
    tensors, kernels = _open(settings).entries(), compiled.entries()
    if as_json:
        fields: list[dict[str, object]] = [
            {
                "kind": "tensor",
                "sha256": each.sha256,
                "num_bytes": each.num_bytes,
                "last_used": each.last_used_s,
                "partial": each.is_partial,
            }
            for each in tensors
        ]
        fields += [
            {"kind": "kernel", "name": each.name, "num_bytes": each.num_bytes, "last_used": each.last_used_s}
            for each in kernels
        ]
        print(json.dumps(fields, indent=2))
        return
    if tensors:
        _print_table(
            "tensor",
            [
                (each.sha256[:16], each.num_bytes, each.last_used_s, "partial" if each.is_partial else "")
                for each in tensors
            ],
        )
    if kernels:
        _print_table("kernel", [(each.name, each.num_bytes, each.last_used_s, "") for each in kernels])
    total = sum(each.num_bytes for each in tensors)
    print(
        f"{len(tensors)} tensors, {total / MIB:.1f} MiB of at most {settings.cache_limit_bytes / MIB:.0f} MiB, "
        f"in {settings.cache_dir}"
    )
    if kernels:
        of_kernels = sum(each.num_bytes for each in kernels)
        print(f"{len(kernels)} compiled kernels, {of_kernels / MIB:.1f} MiB, in {compiled.folder}")


def _print_table(what: str, rows: list[tuple[str, int, float, str]]) -> None:
    """Rows of a name, bytes, seconds since 1970 and a remark."""
    table = Table(what, "MiB", "last used", "")
    table.columns[1].justify = "right"
    for name, num_bytes, last_used_s, remark in rows:
        used = datetime.fromtimestamp(last_used_s, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(name, f"{num_bytes / MIB:.2f}", used, remark)
    stdout_console().print(table)


@cache.command("clear")
def clear(cache_dir: options.CacheDir = None, config: options.ConfigFile = None, debug: options.Debug = False) -> None:
    """Remove the cached tensors and the compiled kernels, which a worker's next start compiles again.

    What a worker is loading or compiling just now stays; models from the hub are not touched.
    """
    from shardwright.runtime.kernel_cache import KernelCache

    settings = options.worker_config(config, cache_dir=cache_dir)
    freed, busy = KernelCache(settings.cache_dir).clear()
    freed += _open(settings).clear()
    for folder in busy:
        say(f"a kernel is compiled in {folder} just now: what is there stays; clear again once the worker has started")
    print(f"{freed / MIB:.1f} MiB freed in {settings.cache_dir}")
