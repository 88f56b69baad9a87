"""What the API's tests share: a server with the fake engine, and OpenAI's own client for it."""

import asyncio
from contextlib import AsyncExitStack

import openai
import pytest
from api_server import running_server

from shardwright.cli import aio


def pytest_asyncio_loop_factories(config, item):
    """The event loop that `shardwright serve` runs on; connections are tried on Python's own too."""
    factories = {"uvloop": aio.new_event_loop}
    return factories | {"asyncio": asyncio.new_event_loop} if item.path.name == "test_connections.py" else factories


@pytest.fixture
async def start():
    """Starts servers that end with the test."""
    async with AsyncExitStack() as stack:

        async def begin(engine=None, **settings):
            return await stack.enter_async_context(running_server(engine, **settings))

        yield begin


@pytest.fixture
async def client_of():
    """OpenAI's asynchronous client for a server; it never tries again by itself."""
    async with AsyncExitStack() as stack:

        async def make(server, key="none", **options):
            client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **options)
            return await stack.enter_async_context(client)

        yield make
