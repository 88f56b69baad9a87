"""The command `grafana export`: writes what Prometheus and Grafana need to show a cluster."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from shardwright.cli import options
from shardwright.cli.console import say
from shardwright.errors import ConfigError

if TYPE_CHECKING:
    from urllib.parse import SplitResult

grafana = typer.Typer(
    help="Write dashboards, alerts and settings for Grafana and Prometheus.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands under the application."""
    app.add_typer(grafana, name="grafana")


@grafana.callback()
def _group() -> None:
    """Write dashboards, alerts and settings for Grafana and Prometheus."""


@grafana.command("export")
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; it is made if need be.")],
    prometheus_url: Annotated[
        str, typer.Option(metavar="URL", help="Where Grafana reaches Prometheus.")
    ] = "http://127.0.0.1:9090",
    master: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where Prometheus and Grafana reach `shardwright serve`; https:// before it, if it is behind TLS.",
        ),
    ] = "127.0.0.1:8000",
    ttft_objective_s: Annotated[
        float, typer.Option(metavar="S", help="Alert when 5 of 100 first tokens come later than this.")
    ] = 2.0,
    dashboards_path: Annotated[
        str, typer.Option(metavar="PATH", help="Where Grafana will find the exported folder dashboards.")
    ] = "/etc/grafana/dashboards",
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ from what is written.")] = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Write provisioning files, dashboards and alert rules for Grafana, and settings and rules for Prometheus.

    [cyan]shardwright grafana export monitoring --master 192.168.1.10:8000[/cyan]

    Files that are there and differ stay as they are, and nothing is written, unless --force is given.
    """
    from shardwright.grafana.export import Places, files

    if not 0 < ttft_objective_s < float("inf"):
        raise ConfigError(f"--ttft-objective-s is {ttft_objective_s:g}; it must be a number of seconds above 0")
    at = _address("--master", master if "://" in master else f"http://{master}")
    prometheus = _address("--prometheus-url", prometheus_url)
    if at.path.strip("/"):
        raise ConfigError(f"--master is {master!r}; it takes a host and a port, without a path")
    made = files(
        Places(
            prometheus_url=prometheus.geturl(),
            master=at.netloc,
            master_scheme=at.scheme,
            dashboards_path=dashboards_path,
            ttft_objective_s=ttft_objective_s,
        )
    )
    written, unchanged = _write_all(folder, made, force=force)
    if as_json:
        print(json.dumps({"folder": str(folder), "written": written, "unchanged": unchanged}, indent=2))
        return
    for name in written:
        print(folder / name)
    say(f"{len(written)} files written to {folder}, {len(unchanged)} were up to date.")


def _address(option: str, value: str) -> SplitResult:
    """A URL with a host and, for the master, a port; whoever can't be reached is not asked here."""
    try:
        parts = urlsplit(value)
        is_good = parts.scheme in {"http", "https"} and parts.hostname and (parts.port or option != "--master")
    except ValueError:  # a port that is no number, a bracket that is not closed
        is_good = False
    if not is_good or parts.username or parts.query or parts.fragment:
        what = "host:port" if option == "--master" else "a URL like http://127.0.0.1:9090"
        raise ConfigError(f"{option} is {value.removeprefix('http://')!r}; it must be {what}, without a password")
    return parts


def _write_all(folder: Path, made: Mapping[str, str], *, force: bool) -> tuple[list[str], list[str]]:
    """Write what is new or differs; gives the names of those, and of those that were the same already.

    Raises:
        ConfigError: Without `force`, some that are there differ; nothing was written. Or the disk refuses.
    """
    try:
        there = {name: (folder / name).read_text(encoding="utf-8") for name in made if (folder / name).exists()}
        unchanged = [name for name, text in there.items() if text == made[name]]
        differing = [name for name in there if name not in unchanged]
        if differing and not force:
            raise ConfigError(
                f"{folder} has files that differ from what would be written: {', '.join(differing)}; "
                "nothing was written. Export to another folder, or replace them with --force"
            )
        written = [name for name in made if name not in unchanged]
        for name in written:
            _write(folder / name, made[name])
    except (OSError, UnicodeDecodeError) as exc:
        where = getattr(exc, "filename", None) or folder
        raise ConfigError(f"{where}: can't be written: {getattr(exc, 'strerror', None) or exc}") from exc
    return written, unchanged


def _write(path: Path, text: str) -> None:
    """Put the file in place as a whole: Prometheus and Grafana watch these folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)  # containers read it as another user
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
