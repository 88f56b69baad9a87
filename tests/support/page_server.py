"""The API's server with the fake engine, in a thread of its own, for tests whose browser wants theirs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from api_server import Running, running_server


@contextlib.contextmanager
def server_in_thread(make_engine: Callable[[], Any], **settings: Any) -> Iterator[Running]:
    """A running server until the block ends; its engine is made in its own event loop.

    Change the engine or its observatory with `call(function)` of what is yielded: both are used by the server's thread.
    """
    is_up = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        found["loop"], found["over"] = asyncio.get_running_loop(), asyncio.Event()
        async with running_server(make_engine(), **settings) as running:
            found["server"] = running
            is_up.set()
            await found["over"].wait()

    def call(function: Callable[[], Any]) -> Any:
        """What the function gives, called between two steps of the server's loop."""

        async def within() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(within(), found["loop"]).result(20)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001  raised again in the test's thread
            found["error"] = exc
        finally:
            is_up.set()

    thread = threading.Thread(target=run, name="page server")
    thread.start()
    try:
        assert is_up.wait(20), "the server did not start"
        if "error" in found:
            raise found["error"]
        found["server"].call = call
        yield found["server"]
    finally:
        if "over" in found and thread.is_alive():
            found["loop"].call_soon_threadsafe(found["over"].set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
