"""The trace that a pipeline's calls belong to reaches the worker, on every transport, and nothing else does."""

import asyncio

import pytest
from transport_fakes import make_load

from shardwright.transport.trace_context import incoming_trace_parent
from shardwright.wire.messages import LoadBegin

T = 5.0
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def heard(net, monkeypatch):
    """What the worker finds beside each call, by method."""
    found = {}

    def listen(name):
        method = getattr(net.worker, name)

        async def stream(*args):
            found[name] = incoming_trace_parent()
            async for each in method(*args):
                yield each

        async def unary(*args):
            found[name] = incoming_trace_parent()
            return await method(*args)

        monkeypatch.setattr(net.worker, name, unary if name in {"describe", "heartbeat"} else stream)

    for name in ("initialize_worker", "process_layers", "tokens", "describe", "heartbeat"):
        listen(name)
    return found


async def nothing():
    return
    yield


async def call_all(net):
    client = net.client

    async def load():
        yield LoadBegin(load=make_load(num_tensors=0))

    async with asyncio.timeout(T):
        net.worker.results.put_nowait(None)
        for stream in (client.initialize_worker(load()), client.process_layers(nothing()), client.tokens(3)):
            async for _ in stream:
                pass
    await client.describe(timeout_s=T)
    await client.heartbeat(timeout_s=T)


STREAMS = ("initialize_worker", "process_layers", "tokens")


async def test_a_clients_trace_parent_goes_with_the_calls_of_a_pipeline_alone(net, heard):
    net.client.trace_parent = PARENT
    await call_all(net)
    assert heard == dict.fromkeys(STREAMS, PARENT) | {"describe": "", "heartbeat": ""}


async def test_without_a_trace_no_call_names_one(net, heard):
    await call_all(net)
    assert heard == dict.fromkeys((*STREAMS, "describe", "heartbeat"), "")


@pytest.mark.parametrize("wrong", ["x", PARENT + "-more", PARENT.upper(), "00-" + "0" * 31 + "-b7ad6b7169203331-01"])
async def test_what_is_no_traceparent_is_dropped(net, heard, wrong):
    net.client.trace_parent = wrong
    await call_all(net)
    assert set(heard.values()) == {""}
