"""Sender and receiver together, over a pipe that can be cut, stalled and tampered with. The files are real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardwright.errors import (
    CheckpointError,
    LinkLostError,
    ProtocolError,
    StageLoadError,
    WorkerLostError,
    WorkerUnreachableError,
)
from shardwright.model.checkpoint import Checkpoint, open_checkpoint
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.tensor_hashes import hash_tensors
from shardwright.runtime.weight_receiver import ReceivedTensors, WeightReceiver
from shardwright.runtime.weight_sender import SentProgress, send_stage
from shardwright.types import FileHint, LayerRange, StageAssignment, StageLoad
from shardwright.wire.messages import (
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadProgress,
    LoadRefused,
    LoadReply,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

CHUNK = 4096
LIMIT = 1 << 30


def write_model(folder: Path, *, seed: int = 0) -> Checkpoint:
    """A folder with one safetensors file: tensors of many sizes, two of them equal, one without elements."""
    rng = np.random.default_rng(seed)
    tensors = {f"layers.{i}.weight": rng.standard_normal((50 + 13 * i, 40)).astype(np.float32) for i in range(6)}
    tensors["twin"] = tensors["layers.3.weight"].copy()
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["small"] = np.ones(3, np.float16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def stage_load(checkpoint: Checkpoint, cache_dir: Path, *, hints: tuple[FileHint, ...] = ()) -> StageLoad:
    assignment = StageAssignment(
        epoch=1,
        worker_id="w0",
        stage_index=0,
        num_stages=1,
        layers=LayerRange(0, 6),
        num_blocks=8,
        block_size=16,
        next_worker_id=None,
    )
    return StageLoad(
        assignment=assignment,
        model_config=checkpoint.config_json,
        dtype="float32",
        tensors=hash_tensors(checkpoint, checkpoint.tensors, cache_dir=cache_dir),
        file_hints=hints,
        next_address="",
    )


class PipeWorker:
    """A worker at the other end of a pipe: receives, compares with the master's bytes, and answers `LoadDone`.

    `cut_after` breaks each connection after so many chunks; `tamper` may change each chunk on its way.
    """

    def __init__(self, cache_dir: Path, checkpoint: Checkpoint, *, limit_bytes: int = LIMIT) -> None:
        self.address = "pipe:1"
        self.checkpoint = checkpoint
        self.receiver = WeightReceiver(TensorCache(cache_dir, limit_bytes=limit_bytes), cache_dir=cache_dir)
        self.chunks: list[WeightChunk] = []
        self.needed: list[WeightsNeeded] = []
        self.num_calls = 0
        self.cut_after: int | None = None
        self.tamper: Callable[[WeightChunk], WeightChunk] = lambda chunk: chunk
        self.received: ReceivedTensors | None = None

    async def initialize_worker(self, outgoing: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        self.num_calls += 1
        replies: asyncio.Queue[LoadReply | None] = asyncio.Queue()

        async def incoming() -> AsyncIterator[LoadMessage]:
            count = 0
            async for message in outgoing:
                if isinstance(message, WeightChunk):
                    if count == self.cut_after:
                        raise LinkLostError("the pipe was cut")
                    count += 1
                    self.chunks.append(message)
                    message = self.tamper(message)  # noqa: PLW2901
                yield message

        async def work() -> None:
            try:
                messages = incoming()
                begin = await anext(messages)
                assert isinstance(begin, LoadBegin)
                self.received = await self.receiver.receive(begin.load, messages, replies.put)
                for name in self.received.specs:
                    assert bytes(self.received.read(name)) == bytes(self.checkpoint.read_tensor(name))
                await replies.put(LoadDone(weight_bytes=1, kv_bytes=2, load_s=0.5))
            finally:
                await replies.put(None)

        task = asyncio.create_task(work())
        try:
            while (reply := await replies.get()) is not None:
                if isinstance(reply, WeightsNeeded):
                    self.needed.append(reply)
                yield reply
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    @property
    def received_bytes(self) -> int:
        return sum(len(chunk.data) for chunk in self.chunks)


async def send(worker: PipeWorker, load: StageLoad, **options: object) -> LoadDone:
    return await send_stage(
        worker, load, worker.checkpoint, lambda _: None, chunk_bytes=CHUNK, backoff_s=0.001, **options
    )


def content_bytes(load: StageLoad) -> int:
    return sum(size for _, size in {(spec.sha256, spec.num_bytes) for spec in load.tensors})


@pytest.fixture
def checkpoint(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def load(checkpoint, tmp_path):
    return stage_load(checkpoint, tmp_path / "master")


async def test_a_worker_with_nothing_gets_every_tensor_once_and_in_bounded_chunks(checkpoint, load, tmp_path):
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    seen = []
    done = await send_stage(worker, load, checkpoint, seen.append, chunk_bytes=CHUNK)
    assert done == LoadDone(weight_bytes=1, kv_bytes=2, load_s=0.5)
    assert worker.received_bytes == content_bytes(load)
    assert max(len(chunk.data) for chunk in worker.chunks) == CHUNK
    assert set(worker.received.specs) == set(checkpoint.tensors)
    sent = [p for p in seen if isinstance(p, SentProgress)]
    assert sent[-1] == SentProgress(worker_id="w0", sent_bytes=content_bytes(load), total_bytes=content_bytes(load))
    received = [p for p in seen if isinstance(p, LoadProgress)]
    assert received[-1].done_bytes == received[-1].total_bytes == content_bytes(load)
    assert seen[-1] == done


async def test_a_second_start_sends_nothing(checkpoint, load, tmp_path):
    await send(PipeWorker(tmp_path / "worker", checkpoint), load)
    again = PipeWorker(tmp_path / "worker", checkpoint)
    await send(again, load)
    assert again.chunks == []
    assert again.needed == [WeightsNeeded(requests=(), bytes_from_disk=0, bytes_from_cache=content_bytes(load))]


async def test_after_a_cut_in_the_middle_of_a_tensor_only_the_rest_is_sent(checkpoint, load, tmp_path):
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    worker.cut_after = 7
    await send(worker, load)
    assert worker.num_calls > 3
    assert worker.received_bytes == content_bytes(load)
    assert any(request.offset for needed in worker.needed for request in needed.requests)


async def test_what_arrived_before_the_master_gave_up_serves_the_next_master(checkpoint, load, tmp_path):
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    worker.cut_after = 5
    with pytest.raises(WorkerLostError, match="did not come back in 0 tries: the pipe was cut"):
        await send(worker, load, retries=0)
    restarted = PipeWorker(tmp_path / "worker", checkpoint)
    await send(restarted, load)
    assert restarted.received_bytes == content_bytes(load) - worker.received_bytes
    assert worker.received_bytes % CHUNK, "the cut was meant to fall into a tensor, behind the small one"


async def test_a_corrupted_chunk_is_found_named_and_costs_its_tensor_alone(checkpoint, load, tmp_path):
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    victim = next(spec for spec in load.tensors if spec.name == "layers.4.weight")

    def flip_a_bit(chunk: WeightChunk) -> WeightChunk:
        if chunk.sha256 != victim.sha256 or chunk.offset != CHUNK:
            return chunk
        return replace(chunk, data=bytes([chunk.data[0] ^ 1]) + chunk.data[1:])

    worker.tamper = flip_a_bit
    with pytest.raises(CheckpointError, match=r"tensor layers\.4\.weight: .* expected " + victim.sha256):
        await send(worker, load)
    assert not list((tmp_path / "worker").rglob(f"{victim.sha256}*"))
    order = list(dict.fromkeys(chunk.sha256 for chunk in worker.chunks))
    before = order[: order.index(victim.sha256)]
    assert before, "the victim was not meant to be the first"
    worker.tamper = lambda chunk: chunk
    await send(worker, load)
    asked = {request.sha256: request.offset for request in worker.needed[-1].requests}
    assert asked[victim.sha256] == 0
    assert not asked.keys() & set(before)


async def test_a_worker_that_stays_away_is_reported_lost_after_the_retries(checkpoint, load, tmp_path):
    class Absent(PipeWorker):
        async def initialize_worker(self, outgoing):
            self.num_calls += 1
            raise WorkerUnreachableError("nobody answers at pipe:1")
            yield

    worker = Absent(tmp_path / "worker", checkpoint)
    with pytest.raises(WorkerLostError, match=r"worker w0 at pipe:1 .* layers 0-5.*in 3 tries: nobody answers"):
        await send(worker, load, retries=3)
    assert worker.num_calls == 4


async def test_a_worker_that_stops_moving_is_lost(checkpoint, load, tmp_path):
    class Frozen(PipeWorker):
        async def initialize_worker(self, outgoing):
            self.num_calls += 1
            async for _ in outgoing:
                await asyncio.Event().wait()
            yield

    worker = Frozen(tmp_path / "worker", checkpoint)
    with pytest.raises(WorkerLostError, match=r"did not move for 0\.02 s"):
        await send(worker, load, retries=1, stall_timeout_s=0.02)
    assert worker.num_calls == 2


async def test_no_chunk_is_read_before_the_transport_takes_the_one_before_it(checkpoint, load, tmp_path):
    """So the master's memory does not depend on how slow a worker is, or how large the model."""

    class Counting:
        tensors = checkpoint.tensors
        num_reads = 0

        def read(self, name: str, offset: int, length: int) -> bytes:
            self.num_reads += 1
            return checkpoint.read(name, offset, length)

    class Slow(PipeWorker):
        async def initialize_worker(self, outgoing):
            await anext(outgoing)
            asked = tuple(WeightRequest(sha256=spec.sha256, offset=0) for spec in load.tensors if spec.name == "twin")
            yield WeightsNeeded(requests=asked, bytes_from_disk=0, bytes_from_cache=0)
            for taken in (1, 2, 3):
                await anext(outgoing)
                assert counting.num_reads == taken
            yield LoadRefused(reason="seen enough")

    counting = Counting()
    with pytest.raises(StageLoadError, match="seen enough"):
        await send_stage(Slow(tmp_path / "worker", checkpoint), load, counting, lambda _: None, chunk_bytes=100)
    assert counting.num_reads == 3


class Scripted(PipeWorker):
    """A worker that answers what it is told."""

    replies: tuple[LoadReply, ...] = ()

    async def initialize_worker(self, outgoing):
        self.num_calls += 1
        await anext(outgoing)
        for reply in self.replies:
            yield reply


async def test_a_refusal_names_worker_and_reason_and_is_not_tried_again(checkpoint, load, tmp_path):
    worker = Scripted(tmp_path / "worker", checkpoint)
    worker.replies = (LoadRefused(reason="only 3 MiB of memory left"),)
    with pytest.raises(StageLoadError, match="worker w0 can't load layers 0-5: only 3 MiB of memory left"):
        await send(worker, load)
    assert worker.num_calls == 1


@pytest.mark.parametrize(
    ("requests", "fault"),
    [
        ([("f" * 64, 0)], "which its stage has not"),
        ([(None, 0), (None, 0)], "twice"),
        ([(None, 10**9)], "from byte 1000000000 on"),
    ],
)
async def test_a_worker_that_asks_for_what_is_not_its_own_breaks_the_protocol(
    checkpoint, load, tmp_path, requests, fault
):
    worker = Scripted(tmp_path / "worker", checkpoint)
    asked = tuple(WeightRequest(sha256=sha or load.tensors[-1].sha256, offset=offset) for sha, offset in requests)
    worker.replies = (WeightsNeeded(requests=asked, bytes_from_disk=0, bytes_from_cache=0),)
    with pytest.raises(ProtocolError, match=fault):
        await send(worker, load)


async def test_a_checkpoint_that_got_shorter_is_the_masters_error_and_is_not_tried_again(checkpoint, load, tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    with pytest.raises(CheckpointError, match="early"):
        await send(worker, load)
    assert worker.num_calls == 1


async def test_two_workers_that_share_a_cache_get_the_same_tensors_at_once(checkpoint, load, tmp_path):
    workers = [PipeWorker(tmp_path / "shared", checkpoint) for _ in range(2)]
    await asyncio.gather(*(send(worker, load) for worker in workers))
    assert all(content_bytes(load) >= worker.received_bytes > 0 for worker in workers)
    entries = TensorCache(tmp_path / "shared", limit_bytes=LIMIT).entries()
    assert {entry.sha256 for entry in entries} == {spec.sha256 for spec in load.tensors if spec.num_bytes}
    assert not any(entry.is_partial for entry in entries)


async def test_a_cancelled_load_leaves_no_task_and_keeps_what_came(checkpoint, load, tmp_path):
    worker = PipeWorker(tmp_path / "worker", checkpoint)
    reached = asyncio.Event()

    def stop_here(progress: object) -> None:
        if isinstance(progress, SentProgress) and progress.sent_bytes >= 6 * CHUNK:
            reached.set()

    task = asyncio.create_task(send_stage(worker, load, checkpoint, stop_here, chunk_bytes=CHUNK))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    before = worker.received_bytes
    await send(worker, load)
    assert worker.received_bytes < content_bytes(load) + before
