"""The command `status`: how a running server does, in a few lines or as JSON, with an exit code for scripts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli import options
from shardwright.cli.console import stdout_console
from shardwright.errors import ClusterError

if TYPE_CHECKING:
    from shardwright.observation import ClusterView


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("status")(status)


def status(
    url: options.ServerUrl = options.DEFAULT_SERVER_URL,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="How long the server may send nothing.")
    ] = 10.0,
    debug: options.Debug = False,
) -> None:
    """Tell how a running server does; --json prints the whole state as the server tells it.

    [cyan]shardwright status[/cyan]

    [cyan]shardwright status --json | jq .snapshot.num_waiting[/cyan]

    Exit codes: 0 ready, 3 not ready or not to be reached (standard error says which), 2 a wrong option.
    """
    from shardwright.cli.cluster_screen import headline, pipeline, totals, troubles
    from shardwright.cli.server_watch import ServerWatch

    with ServerWatch(url, api_key=api_key, timeout_s=timeout) as server:
        seen = server.look()
    if as_json:
        print(json.dumps(json.loads(seen.state_json), indent=2, ensure_ascii=False))
    else:
        console = stdout_console()
        for part in (headline(seen.view, server.url), pipeline(seen.view, console.width), totals(seen)):
            console.print(part)
        for line in troubles(seen.view):
            if line:
                console.print(line, soft_wrap=True)
    if not seen.view.is_ready:
        raise ClusterError(f"{server.url} is not ready: {why_not(seen.view)}")


def why_not(view: ClusterView) -> str:
    """The reason in words."""
    if view.failure:
        return view.failure
    if view.snapshot.recovering_from:
        return f"recovering: {view.snapshot.recovering_from}"
    if not view.snapshot.stages:
        return "there is no pipeline yet"
    return "no token went through the pipeline lately"
