"""Runs blocking work on a thread so that cancelling its caller stops it too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

STOP_TIMEOUT_S = 1.0


class StoppedError(Exception):
    """Raised by work that was told to stop; nobody waits for its result any more."""


async def in_thread(work: Callable[[threading.Event], Result]) -> Result:
    """Give what `work(stop)` returns. When the caller is cancelled, `stop` is set.

    Then waits a moment for the work to end, so that it can take down what it started; work that never looks at `stop`
    is left behind.
    """
    stop = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        running.add_done_callback(_look_at_failure)
        await asyncio.wait((running,), timeout=STOP_TIMEOUT_S)
        raise


def _look_at_failure(running: asyncio.Future[Result]) -> None:
    """What stopped work dies of is of no interest; without a look asyncio would report it."""
    if not running.cancelled():
        running.exception()
