"""Measures a hop: one decode step's activation from one process to another over the real transport, on loopback.

The other process acknowledges each step as a worker does. The time of the round trip is an upper bound of the hop.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator

from shardwright.cli import aio
from shardwright.runtime.worker import WorkerShell
from shardwright.transport.grpc import GrpcTransport
from shardwright.types import SamplingParams, SequenceSlice, StepInput
from shardwright.wire.messages import StepAck, StepMessage, StepReply, TensorFrame

STEPS = 2000
WARM_UP = 200


class Acknowledger(WorkerShell):
    """A worker that only takes steps off the link."""

    def __init__(self) -> None:
        """Nothing of a worker is needed but the link."""

    async def process_layers(self, incoming: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        """Acknowledge each step as it arrives."""
        async for message in incoming:
            yield StepAck(epoch=message.step.epoch, step=message.step.step)


async def serve() -> None:
    """The child: listen, say where, go on until the input ends."""
    listener = await GrpcTransport().serve("127.0.0.1:0", Acknowledger())
    print(listener.address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await listener.close(grace_s=0)


def decode_step(number: int, hidden: int) -> StepMessage:
    """One sequence's decode step with a bfloat16 activation."""
    part = SequenceSlice(
        seq_id=1, start_position=512, token_ids=(7,), block_table=tuple(range(33)), sampling=SamplingParams()
    )
    frame = TensorFrame(name="hidden", dtype="bfloat16", shape=(1, hidden), data=bytes(2 * hidden))
    return StepMessage(step=StepInput(epoch=1, step=number, slices=(part,)), tensors=(frame,))


async def measure_hop(hidden: int) -> float:
    """Median seconds from handing a step to the transport to its acknowledgement."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        address = (await child.stdout.readline()).decode().strip()
        client = GrpcTransport().connect(address)
        queue: asyncio.Queue[StepMessage | None] = asyncio.Queue()

        async def outgoing() -> AsyncIterator[StepMessage]:
            while (message := await queue.get()) is not None:
                yield message

        replies = client.process_layers(outgoing())
        times = []
        for number in range(1, STEPS + 1):
            message = decode_step(number, hidden)
            began = time.perf_counter()
            queue.put_nowait(message)
            await anext(replies)
            times.append(time.perf_counter() - began)
        queue.put_nowait(None)
        with contextlib.suppress(StopAsyncIteration):
            await anext(replies)
        await client.close()
        return statistics.median(times[WARM_UP:])
    finally:
        child.stdin.close()
        await child.wait()


if __name__ == "__main__":
    aio.run(serve())
