"""A real server on a free port, in this process's event loop, with the fake engine behind it."""

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from fake_text_engine import FakeTextEngine

from shardwright.api.app import create_app
from shardwright.api.server import listen, serve
from shardwright.cli import aio
from shardwright.config import ServeConfig


@dataclass
class Running:
    """What a test knows of its server."""

    engine: FakeTextEngine
    app: object
    config: ServeConfig
    url: str
    port: int
    stop: asyncio.Event
    task: asyncio.Task
    writers: list = field(default_factory=list)

    async def raw(self):
        """A connection of one's own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def running_server(engine=None, **settings):
    """Serve until the block ends; the server must then end by itself."""
    engine = engine or FakeTextEngine()
    config = ServeConfig(**{"port": 0, "shutdown_timeout_s": 0.2} | settings)
    app = create_app(engine, config)
    listener = listen(config)
    port = listener.getsockname()[1]
    stop, listening = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(serve(app, config, stop=stop, listener=listener, on_listening=lambda _: listening.set()))
    waiting = asyncio.create_task(listening.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        task.result()
    running = Running(engine, app, config, f"http://127.0.0.1:{port}", port, stop, task)
    try:
        yield running
    finally:
        for writer in running.writers:
            writer.transport.abort()
        stop.set()
        await asyncio.wait({task}, timeout=10)
        assert task.done(), "the server did not end"
        if not task.cancelled():
            task.result()


@contextmanager
def server_in_thread(engine=None, **settings):
    """The same in a thread and event loop of its own, for tests of what blocks; gives the `Running`."""
    listening, done, found = threading.Event(), threading.Event(), []

    async def run():
        try:
            async with running_server(engine, **settings) as server:
                found.append(server)
                listening.set()
                await asyncio.to_thread(done.wait)
        finally:
            listening.set()

    thread = threading.Thread(target=lambda: aio.run(run()))
    thread.start()
    try:
        assert listening.wait(10), "the server did not begin"
        yield found[0]
    finally:
        done.set()
        thread.join(15)
