"""What the commands that need a model share: which workers to use, and a session on them with its progress shown."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from shardwright.cli.cluster import grpc_transport
from shardwright.cli.console import stderr_console
from shardwright.cli.progress import StartProgress
from shardwright.config import MasterConfig
from shardwright.errors import RegistryError
from shardwright.runtime.registry import Registry, WorkerEntry

if TYPE_CHECKING:
    from shardwright.runtime.session import OpenModel, Session


def registered_workers(config: MasterConfig) -> Sequence[WorkerEntry]:
    """The registry's workers. Raises `RegistryError` when it lists none."""
    entries = Registry(config.registry).load()
    if not entries:
        raise RegistryError(
            f"{config.registry} lists no worker; add one (shardwright register --ip ADDRESS --username NAME), "
            "or use this machine alone (--local-workers 2)"
        )
    return entries


async def model_and_workers(
    stack: contextlib.AsyncExitStack,
    config: MasterConfig,
    progress: StartProgress,
    *,
    local_workers: int,
    options: Sequence[str],
    with_tokenizer: bool = True,
) -> tuple[OpenModel, Sequence[WorkerEntry]]:
    """The model's files and the workers to use; `stack` takes down what was started.

    An empty registry is told at once, before torch is imported. Local workers import it while this process looks at
    the model, since both take seconds; they are ended at once where the model turns out to be wrong.
    """
    if not local_workers:
        entries = registered_workers(config)
        progress.doing(f"looking at {config.model}")
        from shardwright.runtime.session import open_model

        return await open_model(config, progress, with_tokenizer=with_tokenizer), entries
    count = "1 worker" if local_workers == 1 else f"{local_workers} workers"
    progress.doing(f"looking at {config.model} and starting {count} on this machine")
    from shardwright.runtime.launcher import LocalWorkers
    from shardwright.runtime.model_files import check_model_name
    from shardwright.runtime.session import open_model

    check_model_name(config.model)
    local = LocalWorkers(local_workers, options=options, keep=config.recover)
    stack.push_async_callback(local.stop)
    await local.start()
    model = await open_model(config, progress, with_tokenizer=with_tokenizer)
    return model, await local.listening()


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
