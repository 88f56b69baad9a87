"""Each transport with a fake worker that listens."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardwright.transport.base import Listener, Transport, WorkerClient
from shardwright.transport.grpc import GrpcTransport
from shardwright.transport.memory import MemoryTransport

# importlib mode puts no test folder on the path; the fakes are a module all the same
_spec = importlib.util.spec_from_file_location("transport_fakes", Path(__file__).with_name("fakes.py"))
fakes = importlib.util.module_from_spec(_spec)
sys.modules["transport_fakes"] = fakes
_spec.loader.exec_module(fakes)

MAX_FRAME_BYTES = 64 << 20


@dataclass
class Net:
    """A transport, a fake worker that listens on it, and a client of that worker."""

    transport: Transport
    worker: object
    listener: Listener
    client: WorkerClient


async def _make_net(make_transport: Callable[[], Transport]) -> AsyncIterator[Net]:
    transport = make_transport()
    worker = fakes.FakeWorker()
    listener = await transport.serve("127.0.0.1:0", worker)
    client = transport.connect(listener.address)
    yield Net(transport, worker, listener, client)
    await client.close()
    await listener.close(grace_s=0)
    await asyncio.sleep(0.01)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks left behind: {left}"


@pytest.fixture(params=[GrpcTransport, MemoryTransport], ids=["grpc", "memory"])
async def net(request):
    """Both transports."""
    async for made in _make_net(lambda: request.param(max_frame_bytes=MAX_FRAME_BYTES)):
        yield made


@pytest.fixture
async def grpc_net():
    """What only sockets have."""
    async for made in _make_net(lambda: GrpcTransport(max_frame_bytes=MAX_FRAME_BYTES)):
        yield made


@pytest.fixture
async def memory_net():
    """What only the memory transport can be told to do."""
    async for made in _make_net(lambda: MemoryTransport(max_frame_bytes=MAX_FRAME_BYTES)):
        yield made


@pytest.fixture
def eventually():
    """Wait for a condition, at most two seconds."""

    async def wait(condition: Callable[[], bool], limit_s: float = 2.0) -> None:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110  what is waited for sets no event
                await asyncio.sleep(0.005)

    return wait
