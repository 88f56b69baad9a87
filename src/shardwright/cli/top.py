"""The command `top`: a running server's pipeline, live in the terminal."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli import options
from shardwright.cli.console import one_sentence, stdout_console
from shardwright.errors import HttpServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from shardwright.cli.cluster_screen import Frame
    from shardwright.cli.server_watch import Seen, ServerWatch


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("top")(top)


def top(
    url: options.ServerUrl = options.DEFAULT_SERVER_URL,
    api_key: options.ApiKey = None,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, max=3600.0, help="Time between two frames.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="How long the server may send nothing.")
    ] = 5.0,
    debug: options.Debug = False,
) -> None:
    """Watch a running server: its workers and links, tokens/s and latencies, memory, queue and errors.

    Ctrl-C ends it. While the server can't be reached, the last frame stays with a banner above it, and the server is
    asked again and again.

    [cyan]shardwright top[/cyan]

    [cyan]shardwright top --url http://192.168.1.10:8000 --interval 5[/cyan]

    [cyan]shardwright top --once[/cyan]
    """
    from shardwright.cli.cluster_screen import Frame
    from shardwright.cli.server_watch import ServerWatch

    console = stdout_console()
    with ServerWatch(url, api_key=api_key, timeout_s=timeout) as server:
        # A wrong address or key is said before the screen is taken: asking again would not mend it.
        first = server.look()
        if once:
            console.print(Frame(server.url, first))
            return
        try:
            show(console, frames(server, first), interval_s=interval)
        except KeyboardInterrupt:
            return


def frames(server: ServerWatch, seen: Seen, clock: Callable[[], float] = time.monotonic) -> Iterator[Frame]:
    """Frames without end, from what was seen on: while nothing newer comes, the last one with the reason."""
    from shardwright.cli.cluster_screen import Frame

    seen_at, problem = clock(), ""
    while True:
        yield Frame(server.url, seen, problem=problem, age_s=clock() - seen_at)
        try:
            seen, seen_at, problem = server.look(), clock(), ""
        except HttpServerError as exc:
            problem = one_sentence(exc)


def show(console: Console, drawn: Iterator[Frame], *, interval_s: float) -> None:
    """Draw frames: over each other in a terminal, one after the other elsewhere."""
    from rich.live import Live

    if not console.is_terminal:
        for frame in drawn:
            console.print(frame)
            console.print()
            time.sleep(interval_s)
    # A terminal must get its screen back, however this ends.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for frame in drawn:
            live.update(frame, refresh=True)
            time.sleep(interval_s)
