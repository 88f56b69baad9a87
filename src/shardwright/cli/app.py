"""The command line's entry: which commands there are, and what a user sees when one fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from shardwright import __version__
from shardwright.cli import (
    api_key,
    bench_serve,
    cache,
    chat,
    cluster,
    doctor,
    generate,
    grafana,
    options,
    plan,
    serve,
    status,
    top,
)
from shardwright.cli.bootstrap import start_with
from shardwright.cli.console import leave, run_app
from shardwright.runtime.threads import worker_environment

EPILOG = """
[bold]Examples[/bold]

One machine, two worker processes:
[cyan]shardwright generate --model smollm2-135m --local-workers 2 "Why is the sky blue?"[/cyan]

Several machines. On each worker:
[cyan]shardwright worker[/cyan]

then, where the prompts are:
[cyan]shardwright register --ip 192.168.1.101 --username worker1[/cyan]
[cyan]shardwright workers[/cyan]
[cyan]shardwright plan --model google/gemma-2b[/cyan]
[cyan]shardwright generate --model google/gemma-2b "Why is the sky blue?"[/cyan]

[cyan]shardwright COMMAND --help[/cyan] tells more about each.
"""

app = typer.Typer(
    name="shardwright",
    help="Run one language model over several machines that could not hold it alone.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for room in (cluster, plan, generate, serve, status, top, chat, bench_serve, doctor, api_key, cache, grafana):
    room.add_commands(app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"shardwright {__version__}")
        raise typer.Exit


@app.callback()
def before(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Take the options that stand before the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `shardwright`; gives the exit code instead of ending the process."""
    return run_app(app, argv, prog_name="shardwright")


def entry() -> NoReturn:
    """Be the process `shardwright`."""
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "worker":
        start_with(worker_environment())
    leave(main())
