"""The two scripts in the repository's root, as functions: thin names for `worker`, `register` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from shardwright.cli import cluster
from shardwright.cli.console import run_app


def worker_node(argv: Sequence[str] | None = None) -> int:
    """`python3 worker_node.py`: the same as `shardwright worker`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(cluster.worker)
    return run_app(app, argv, prog_name="worker_node.py")
