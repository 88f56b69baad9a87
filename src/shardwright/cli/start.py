"""What the commands that need a model share: which workers to use, and a session on them with its progress shown."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.cli.cluster import grpc_transport
from shardwright.cli.console import stderr_console
from shardwright.cli.progress import StartProgress
from shardwright.config import MasterConfig
from shardwright.errors import ConfigError, RegistryError
from shardwright.runtime.registry import Registry, WorkerEntry

if TYPE_CHECKING:
    from shardwright.runtime.session import OpenModel, Session


def local_worker_options(*, device: str | None, threads: int | None, cache_dir: Path | None) -> list[str]:
    """The command line that local workers get; what was not given is left to them."""
    options: list[str] = []
    for name, value in (("--device", device), ("--threads", threads), ("--cache-dir", cache_dir)):
        if value is not None:
            options += [name, str(value)]
    return options


def check_worker_flags(*, local_workers: int, device: str | None, threads: int | None) -> None:
    """Refuse flags that would have no effect: a registered worker got its own when it was started."""
    for name, value in (("--device", device), ("--threads", threads)):
        if value is not None and not local_workers:
            raise ConfigError(
                f"{name} is for --local-workers; a registered worker gets it where it is started: "
                f"shardwright worker {name} {value}"
            )


@contextlib.asynccontextmanager
async def workers_for(
    config: MasterConfig, *, local_workers: int, options: Sequence[str] = ()
) -> AsyncIterator[Sequence[WorkerEntry]]:
    """The workers that a command uses: new ones on this machine, or those of the registry.

    Raises `RegistryError` when the registry lists none.
    """
    if local_workers:
        from shardwright.runtime.launcher import LocalWorkers

        async with LocalWorkers(local_workers, options=options) as started:
            yield started.entries
        return
    entries = Registry(config.registry).load()
    if not entries:
        raise RegistryError(
            f"{config.registry} lists no worker; add one (shardwright register --ip ADDRESS --username NAME), "
            "or use this machine alone (--local-workers 2)"
        )
    yield entries


async def model_and_workers(
    stack: contextlib.AsyncExitStack,
    config: MasterConfig,
    progress: StartProgress,
    *,
    local_workers: int,
    options: Sequence[str],
) -> tuple[OpenModel, Sequence[WorkerEntry]]:
    """The model's files and the workers to use, cheapest check first, so that nothing is started in vain.

    An empty registry is told at once, before torch is imported; local workers start when the model is known to be good.
    """
    entries: Sequence[WorkerEntry] = ()
    if not local_workers:
        entries = await stack.enter_async_context(workers_for(config, local_workers=0))
    progress.doing(f"looking at {config.model}")
    from shardwright.runtime.session import open_model

    model = await open_model(config, progress)
    if local_workers:
        count = "1 worker" if local_workers == 1 else f"{local_workers} workers"
        progress.doing(f"starting {count} on this machine")
        entries = await stack.enter_async_context(workers_for(config, local_workers=local_workers, options=options))
    return model, entries


@contextlib.asynccontextmanager
async def session_for(
    config: MasterConfig, *, local_workers: int, options: Sequence[str] = ()
) -> AsyncIterator[Session]:
    """A session on the workers that a command uses, with its start shown."""
    async with contextlib.AsyncExitStack() as stack:
        progress = stack.enter_context(StartProgress(stderr_console()))
        model, entries = await model_and_workers(stack, config, progress, local_workers=local_workers, options=options)
        progress.doing("loading the stages")
        from shardwright.runtime.session import open_session

        session = await stack.enter_async_context(
            open_session(config, entries, listener=progress, transport=grpc_transport(config), model=model)
        )
        yield session
