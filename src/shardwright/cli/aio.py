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
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(cancel_on_sigterm())
    except asyncio.CancelledError:
        if terminated:
            sys.exit(128 + signal.SIGTERM)
        raise


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop of the kind that the commands run on: uvloop's, where there is one, which is not on Windows.

    A step wakes the loops of all its workers and the master's; docs/decisions/0022 has what that is worth.
    """
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


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
