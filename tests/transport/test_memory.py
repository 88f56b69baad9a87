"""The bad networks that the memory transport can play."""

from __future__ import annotations

import asyncio

import pytest
from transport_fakes import DESCRIPTION, FakeWorker, make_step

from shardwright.errors import LinkLostError, WorkerUnreachableError
from shardwright.transport.memory import MemoryTransport
from shardwright.wire.messages import StepAck

T = 5.0


class Clock:
    """How long something took on the loop's clock."""

    def __enter__(self):
        self._start = asyncio.get_running_loop().time()
        return self

    def __exit__(self, *exc):
        self.elapsed_s = asyncio.get_running_loop().time() - self._start


async def open_link(client):
    """A step link that has passed one step, and stays open."""

    async def steps():
        yield make_step(1)
        await asyncio.Event().wait()

    link = client.process_layers(steps())
    assert await anext(link) == StepAck(epoch=3, step=1)
    return link


async def test_a_cut_breaks_open_links_and_lets_nobody_in_until_it_is_mended(memory_net):
    address = memory_net.listener.address
    link = await open_link(memory_net.client)
    memory_net.transport.cut(address)
    with pytest.raises(LinkLostError, match="the network was cut"):
        await anext(link)
    with pytest.raises(WorkerUnreachableError, match="the network is cut"):
        await memory_net.client.describe(timeout_s=T)
    memory_net.transport.mend(address)
    assert await memory_net.client.describe(timeout_s=T) == DESCRIPTION
    assert memory_net.worker.links_lost == 1


async def test_a_cut_leaves_other_addresses_alone(memory_net):
    other = await memory_net.transport.serve("127.0.0.1:0", FakeWorker())
    client = memory_net.transport.connect(other.address)
    memory_net.transport.cut(memory_net.listener.address)
    assert await client.describe(timeout_s=T) == DESCRIPTION
    await client.close()
    await other.close(grace_s=0)


async def test_a_stall_is_silent_until_it_is_over(memory_net):
    address = memory_net.listener.address
    link = await open_link(memory_net.client)
    stream = asyncio.create_task(anext(link))
    memory_net.transport.stall(address)
    with pytest.raises(WorkerUnreachableError, match=r"within 0\.1 s"):
        await memory_net.client.heartbeat(timeout_s=0.1)
    assert not stream.done()
    waiting = asyncio.create_task(memory_net.client.describe(timeout_s=T))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    memory_net.transport.resume(address)
    assert await waiting == DESCRIPTION
    stream.cancel()
    await asyncio.wait((stream,))


async def test_a_delay_is_each_ways_and_holds_up_no_one_else(memory_net):
    """Ten steps under way at once take one round trip, not ten."""
    memory_net.transport.delay_s = 0.1
    with Clock() as one:
        await memory_net.client.describe(timeout_s=T)
    assert one.elapsed_s >= 0.2

    async def steps():
        for number in range(6):
            yield make_step(number)

    with Clock() as many:
        acks = [reply async for reply in memory_net.client.process_layers(steps())]
    assert [ack.step for ack in acks] == list(range(6))
    assert 0.2 <= many.elapsed_s < 0.6


async def test_networks_do_not_know_each_other(memory_net):
    client = MemoryTransport().connect(memory_net.listener.address)
    with pytest.raises(WorkerUnreachableError, match="nobody listens"):
        await client.describe(timeout_s=T)
    await client.close()
