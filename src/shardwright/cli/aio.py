"""Runs a command's coroutine so that Ctrl-C and SIGTERM both unwind it: every `async with` closes what it opened."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end. SIGINT or SIGTERM cancel the coroutine and become `KeyboardInterrupt` or `SystemExit(143)`."""
    terminated = False

    async def cancel_on_sigterm() -> Result:
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        # Not in the main thread (a test's, say) there are no signals to listen for.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        asyncio.get_running_loop().set_default_executor(_LeavingExecutor(thread_name_prefix="work"))
        return await main

    try:
        return asyncio.run(cancel_on_sigterm())
    except asyncio.CancelledError:
        if terminated:
            sys.exit(128 + signal.SIGTERM)
        raise


class _LeavingExecutor(ThreadPoolExecutor):
    """Does not wait for its threads at the end: some calls can't be stopped, and nobody wants their results."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002  asyncio's to give
        super().shutdown(wait=False, cancel_futures=True)


async def until_stdin_closes(serving: Coroutine[Any, Any, None]) -> None:
    """Run until standard input ends: a worker that was started by a process goes when that process is gone."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    task = asyncio.ensure_future(serving)
    closed = asyncio.ensure_future(_drain(reader))
    try:
        await asyncio.wait((task, closed), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, closed):
            each.cancel()
        await asyncio.gather(task, closed, return_exceptions=True)
        transport.close()


async def _drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(4096):
        pass
