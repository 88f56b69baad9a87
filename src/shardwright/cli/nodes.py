"""The two scripts in the repository's root, as functions: thin names for `worker`, `register` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from shardwright.cli import cluster, options
from shardwright.cli import generate as generating
from shardwright.cli.console import run_app
from shardwright.config import DEFAULT_PORT
from shardwright.errors import ConfigError


def worker_node(argv: Sequence[str] | None = None) -> int:
    """`python3 worker_node.py`: the same as `shardwright worker`."""
    app = _single()
    app.command()(cluster.worker)
    return run_app(app, argv, prog_name="worker_node.py")


def master_node(argv: Sequence[str] | None = None) -> int:
    """`python3 master_node.py`: `--register` is `shardwright register`, `--generate` is `shardwright generate`."""
    app = _single()
    app.command()(_master)
    return run_app(app, argv, prog_name="master_node.py")


def _single() -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _master(
    register: Annotated[bool, typer.Option("--register", help="Add a worker to workers.json.")] = False,
    ip: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The worker's IP address or host name.")] = None,
    username: Annotated[str | None, typer.Option(metavar="NAME", help="What to call the worker.")] = None,
    port: Annotated[int, typer.Option(metavar="PORT", help="The worker's port.")] = DEFAULT_PORT,
    generate: Annotated[bool, typer.Option("--generate", help="Answer a prompt on the registered workers.")] = False,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to answer or to continue.")] = None,
    model: options.Model = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of prompt and answer together.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the likeliest token; 1 samples as the model says.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Sample from the likeliest tokens that sum up to P.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0: no limit.")] = 0,
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed gives the same answer.")] = None,
    dtype: options.Dtype = None,
    local_workers: options.LocalWorkersCount = 0,
    registry: options.RegistryFile = None,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """Register workers, then generate text on them.

    [cyan]python3 master_node.py --register --ip 192.168.1.101 --username worker1[/cyan]

    [cyan]python3 master_node.py --generate --prompt "Explain quantum computing in simple terms"[/cyan]

    [cyan]shardwright --help[/cyan] lists what else there is.
    """
    if register == generate:
        raise ConfigError("choose one of --register and --generate; --help shows both")
    if register:
        if ip is None or username is None:
            missing = "--ip" if ip is None else "--username"
            raise ConfigError(
                f"{missing} is missing; for example: "
                "python3 master_node.py --register --ip 192.168.1.101 --username worker1"
            )
        cluster.register(ip=ip, username=username, port=port, registry=registry, config=config)
        return
    generating.generate(
        prompt=prompt,
        model=model,
        max_length=max_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        dtype=dtype,
        local_workers=local_workers,
        registry=registry,
        config=config,
    )
