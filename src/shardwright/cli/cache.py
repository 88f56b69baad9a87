"""The commands about the cache folder: list what is kept, throw it away."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from shardwright.cli import options
from shardwright.cli.console import stdout_console
from shardwright.config import MIB, WorkerConfig

if TYPE_CHECKING:
    from shardwright.runtime.tensor_cache import TensorCache

cache = typer.Typer(
    help="Look at or clear the tensors that workers keep on this machine's disk.",
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
def list_tensors(
    as_json: options.AsJson = False,
    cache_dir: options.CacheDir = None,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """List the cached tensors, the least recently used first; these go first when the limit is reached."""
    settings = options.worker_config(config, cache_dir=cache_dir)
    entries = _open(settings).entries()
    if as_json:
        fields = [
            {"sha256": e.sha256, "num_bytes": e.num_bytes, "last_used": e.last_used_s, "partial": e.is_partial}
            for e in entries
        ]
        print(json.dumps(fields, indent=2))
        return
    if entries:
        table = Table("tensor", "MiB", "last used", "")
        table.columns[1].justify = "right"
        for entry in entries:
            used = datetime.fromtimestamp(entry.last_used_s, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")
            table.add_row(
                entry.sha256[:16], f"{entry.num_bytes / MIB:.2f}", used, "partial" if entry.is_partial else ""
            )
        stdout_console().print(table)
    total = sum(entry.num_bytes for entry in entries)
    print(
        f"{len(entries)} tensors, {total / MIB:.1f} MiB of at most {settings.cache_limit_bytes / MIB:.0f} MiB, "
        f"in {settings.cache_dir}"
    )


@cache.command("clear")
def clear(cache_dir: options.CacheDir = None, config: options.ConfigFile = None, debug: options.Debug = False) -> None:
    """Remove the cached tensors. What a worker is loading just now stays; models from the hub are not touched."""
    settings = options.worker_config(config, cache_dir=cache_dir)
    freed = _open(settings).clear()
    print(f"{freed / MIB:.1f} MiB freed in {settings.cache_dir}")
