"""Weights over the real transports: in chunks of 1 MiB, to several workers at once, through a worker's restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardwright.errors import CheckpointError, StageLoadError, WorkerLostError
from shardwright.model.checkpoint import open_checkpoint
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.tensor_hashes import hash_tensors
from shardwright.runtime.weight_receiver import WeightReceiver
from shardwright.runtime.weight_sender import SentProgress, send_stage
from shardwright.transport.grpc import GrpcTransport
from shardwright.transport.memory import MemoryTransport
from shardwright.types import LayerRange, StageAssignment, StageLoad
from shardwright.wire.messages import LoadDone, LoadMessage, LoadRefused, LoadReply, WeightsNeeded

MIB = 1024 * 1024


class LoadingWorker:
    """As much of a worker as loading needs: receives, reads everything once, and says what it asked for."""

    def __init__(self, cache_dir: Path) -> None:
        self.receiver = WeightReceiver(TensorCache(cache_dir, limit_bytes=1 << 30), cache_dir=cache_dir)
        self.asked: list[int] = []
        self.contents: dict[str, bytes] = {}

    async def initialize_worker(self, incoming: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        begin = await anext(incoming)
        replies: asyncio.Queue[LoadReply | None] = asyncio.Queue()

        async def work() -> None:
            try:
                received = await self.receiver.receive(begin.load, incoming, replies.put)
                self.contents = {name: bytes(received.read(name)) for name in received.specs}
                await replies.put(LoadDone(weight_bytes=1, kv_bytes=1, load_s=0.1))
            except CheckpointError as exc:
                await replies.put(LoadRefused(reason=str(exc)))
            finally:
                await replies.put(None)

        task = asyncio.create_task(work())
        try:
            while (reply := await replies.get()) is not None:
                if isinstance(reply, WeightsNeeded):
                    sizes = {spec.sha256: spec.num_bytes for spec in begin.load.tensors}
                    self.asked.append(sum(sizes[r.sha256] - r.offset for r in reply.requests))
                yield reply
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture(params=[MemoryTransport, GrpcTransport])
def transport(request):
    return request.param()


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rng = np.random.default_rng(0)
    save_file({f"layers.{i}": rng.standard_normal((5 * MIB // 8 + i,)) for i in range(4)}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture
def load(checkpoint, tmp_path):
    assignment = StageAssignment(
        epoch=1,
        worker_id="w0",
        stage_index=0,
        num_stages=1,
        layers=LayerRange(0, 4),
        num_blocks=8,
        block_size=16,
        next_worker_id=None,
    )
    return StageLoad(
        assignment=assignment,
        model_config=checkpoint.config_json,
        dtype="float32",
        tensors=hash_tensors(checkpoint, checkpoint.tensors, cache_dir=tmp_path / "master"),
        file_hints=(),
        next_address="",
    )


def after(num_bytes: int, act: Callable[[], None]) -> Callable[[object], None]:
    """Do something once when so many bytes are on their way."""
    pending = [act]

    def progress(message: object) -> None:
        if isinstance(message, SentProgress) and message.sent_bytes >= num_bytes and pending:
            pending.pop()()

    return progress


async def test_several_workers_are_fed_at_once_and_none_twice(transport, checkpoint, load, tmp_path):
    workers = [LoadingWorker(tmp_path / str(i)) for i in range(3)]
    listeners = [await transport.serve("127.0.0.1:0", worker) for worker in workers]
    clients = [transport.connect(listener.address) for listener in listeners]
    for _ in range(2):
        await asyncio.gather(*(send_stage(client, load, checkpoint, lambda _: None) for client in clients))
    for worker in workers:
        assert worker.asked == [checkpoint.num_bytes, 0]
        assert worker.contents == {name: bytes(checkpoint.read_tensor(name)) for name in checkpoint.tensors}
    await asyncio.gather(*(client.close() for client in clients))
    await asyncio.gather(*(listener.close(grace_s=1) for listener in listeners))


async def test_a_worker_that_restarts_in_the_middle_gets_only_the_rest(transport, checkpoint, load, tmp_path):
    worker = LoadingWorker(tmp_path / "worker")
    listener = await transport.serve("127.0.0.1:0", worker)
    client = transport.connect(listener.address)
    restarted = LoadingWorker(tmp_path / "worker")

    async def restart() -> object:
        await listener.close(grace_s=0)
        await asyncio.sleep(0.05)
        return await transport.serve(listener.address, restarted)

    tasks: list[asyncio.Task] = []
    progress = after(12 * MIB, lambda: tasks.append(asyncio.create_task(restart())))
    await send_stage(client, load, checkpoint, progress, retries=8, backoff_s=0.05)
    assert worker.asked == [checkpoint.num_bytes]
    assert len(restarted.asked) == 1
    assert restarted.asked[0] < checkpoint.num_bytes - MIB
    assert restarted.contents == {name: bytes(checkpoint.read_tensor(name)) for name in checkpoint.tensors}
    await client.close()
    await (await tasks[0]).close(grace_s=1)


async def test_a_worker_that_dies_while_it_loads_is_reported_lost(transport, checkpoint, load, tmp_path):
    listener = await transport.serve("127.0.0.1:0", LoadingWorker(tmp_path / "worker"))
    client = transport.connect(listener.address)
    tasks: list[asyncio.Task] = []
    progress = after(3 * MIB, lambda: tasks.append(asyncio.create_task(listener.close(grace_s=0))))
    with pytest.raises(WorkerLostError, match=r"worker w0 at 127.* was lost while it loaded layers 0-3"):
        await send_stage(client, load, checkpoint, progress, retries=2, backoff_s=0.01)
    await tasks[0]
    await client.close()


async def test_weights_that_changed_under_the_master_are_refused_by_their_hash(transport, checkpoint, load, tmp_path):
    with (tmp_path / "model" / "model.safetensors").open("r+b") as stream:
        stream.seek(checkpoint.tensors["layers.2"].offset + 100)
        stream.write(b"\xff\xff")
    worker = LoadingWorker(tmp_path / "worker")
    listener = await transport.serve("127.0.0.1:0", worker)
    client = transport.connect(listener.address)
    with pytest.raises(StageLoadError, match=r"worker w0 can't load layers 0-3: tensor layers\.2: .* SHA-256"):
        await send_stage(client, load, checkpoint, lambda _: None)
    await client.close()
    await listener.close(grace_s=1)
