"""The command `api-key`: makes keys for `serve --api-key-file`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwright.cli import options
from shardwright.cli.console import say
from shardwright.errors import ConfigError

api_key = typer.Typer(help="Make keys for serve --api-key-file.", no_args_is_help=True, rich_markup_mode="rich")


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands under the application."""
    app.add_typer(api_key, name="api-key")


@api_key.callback()
def _group() -> None:
    """Make keys for serve --api-key-file."""


@api_key.command("new")
def new(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Whose key it is; stands in logs.")],
    max_concurrent: Annotated[
        int, typer.Option(metavar="N", min=0, help="Most requests of this key at once; 0: no limit.")
    ] = 0,
    tokens_per_minute: Annotated[
        int, typer.Option(metavar="N", min=0, help="Most tokens a minute, prompts and answers; 0: no limit.")
    ] = 0,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Add it to this key file.", dir_okay=False),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Make a key. It is shown this once: the key file holds only its hash.

    [cyan]shardwright api-key new --name alice --file keys.toml[/cyan]

    A running server reads its key file only when it starts.
    """
    from shardwright.api.keys import new_key, read_key_file

    key, entry = new_key(name, max_concurrent=max_concurrent, tokens_per_minute=tokens_per_minute)
    if file is None:
        print(f"{key}\n")
        print(entry.to_toml(), end="")
        say("\nThe first line is the key, shown this once; the rest goes into the key file.")
        return
    if file.exists() and any(known.name == name for known in read_key_file(file)):
        raise ConfigError(f"{file} has a key of the name {name} already; choose another name, or remove its lines")
    _append(file, entry.to_toml())
    print(key)
    say(f"The key, shown this once; its hash was added to {file}.")


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{text}" if stream.tell() else text)
    except OSError as exc:
        raise ConfigError(f"{file}: can't be written: {exc.strerror}") from exc
