"""Where a worker finds its tensors: in its own files, in its cache, at the master; and what it does not believe."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardwright.errors import CheckpointError, LinkLostError, ProtocolError
from shardwright.model.checkpoint import Checkpoint, open_weight_file
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.tensor_hashes import hash_tensors
from shardwright.runtime.weight_receiver import ReceivedTensors, WeightReceiver
from shardwright.types import FileHint, LayerRange, StageAssignment, StageLoad, TensorSpec
from shardwright.wire.messages import (
    LoadBegin,
    LoadMessage,
    LoadProgress,
    LoadReply,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

LIMIT = 1 << 30


class Worker:
    """A receiver and all that it said."""

    def __init__(self, cache_dir: Path, *, limit_bytes: int = LIMIT) -> None:
        self.cache = TensorCache(cache_dir, limit_bytes=limit_bytes)
        self.receiver = WeightReceiver(self.cache, cache_dir=cache_dir, num_threads=2)
        self.replies: list[LoadReply] = []

    async def receive(self, load: StageLoad, messages: Iterable[LoadMessage] = ()) -> ReceivedTensors:
        async def incoming() -> AsyncIterator[LoadMessage]:
            for message in messages:
                yield message

        return await self.receive_from(load, incoming())

    async def receive_from(self, load: StageLoad, incoming: AsyncIterator[LoadMessage]) -> ReceivedTensors:
        async def send(reply: LoadReply) -> None:
            self.replies.append(reply)

        return await self.receiver.receive(load, incoming, send)

    @property
    def needed(self) -> WeightsNeeded:
        (needed,) = [reply for reply in self.replies if isinstance(reply, WeightsNeeded)]
        return needed


def write_file(path: Path, *, seed: int = 0) -> Checkpoint:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"layers.{i}": rng.standard_normal((30, 10 + i)).astype(np.float32) for i in range(4)}, path)
    return open_weight_file(path)


def load_of(tensors: Iterable[TensorSpec], hints: tuple[FileHint, ...] = ()) -> StageLoad:
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
        model_config="{}",
        dtype="float32",
        tensors=tuple(tensors),
        file_hints=hints,
        next_address="",
    )


def specs_of(checkpoint: Checkpoint, tmp_path: Path) -> tuple[TensorSpec, ...]:
    return hash_tensors(checkpoint, checkpoint.tensors, cache_dir=tmp_path / "master")


def hint_at(path: Path, **hub: str) -> FileHint:
    return FileHint(path=str(path), num_bytes=path.stat().st_size, **hub)


def chunks_of(checkpoint: Checkpoint, specs: Iterable[TensorSpec], size: int = 500) -> list[LoadMessage]:
    return [
        WeightChunk(
            sha256=spec.sha256,
            offset=offset,
            data=checkpoint.read(spec.name, offset, min(size, spec.num_bytes - offset)),
        )
        for spec in specs
        for offset in range(0, spec.num_bytes, size)
    ]


def assert_all_right(received: ReceivedTensors, checkpoint: Checkpoint) -> None:
    assert set(received.specs) == set(checkpoint.tensors)
    for name in received.specs:
        assert bytes(received.read(name)) == bytes(checkpoint.read_tensor(name))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "here" / "model.safetensors"


@pytest.fixture
def checkpoint(path):
    return write_file(path)


@pytest.fixture
def specs(checkpoint, tmp_path):
    return specs_of(checkpoint, tmp_path)


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path / "worker")


def total(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs)


async def test_a_file_of_its_own_serves_the_worker_and_nothing_is_copied(worker, checkpoint, specs, path, tmp_path):
    received = await worker.receive(load_of(specs, (hint_at(path),)))
    assert worker.needed == WeightsNeeded(requests=(), bytes_from_disk=total(specs), bytes_from_cache=0)
    assert_all_right(received, checkpoint)
    assert not (tmp_path / "worker" / "tensors").exists()


async def test_a_file_without_a_suffix_is_known_by_its_content_as_in_the_hubs_cache(
    worker, checkpoint, specs, path, tmp_path
):
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    shutil.copy(path, blob)
    assert_all_right(await worker.receive(load_of(specs, (hint_at(blob),))), checkpoint)
    assert worker.needed.bytes_from_disk == total(specs)


async def test_a_file_in_the_workers_hub_cache_serves_it(worker, specs, path, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    snapshot = hub / "models--owner--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(path, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub))
    hint = FileHint(
        path=str(tmp_path / "only" / "the" / "master" / "has" / "it"),
        num_bytes=path.stat().st_size,
        hub_repo="owner/name",
        hub_revision="c" * 40,
        hub_filename="model.safetensors",
    )
    assert_all_right(await worker.receive(load_of(specs, (hint,))), open_weight_file(path))
    assert worker.needed.bytes_from_disk == total(specs)


async def test_a_file_with_other_content_at_the_same_place_is_not_believed(worker, specs, path, checkpoint, tmp_path):
    kept = tmp_path / "kept.safetensors"
    shutil.copy(path, kept)
    write_file(path, seed=1)
    assert path.stat().st_size == kept.stat().st_size
    received = await worker.receive(load_of(specs, (hint_at(path),)), chunks_of(open_weight_file(kept), specs))
    assert worker.needed.bytes_from_disk == 0
    assert len(worker.needed.requests) == 4
    assert_all_right(received, open_weight_file(kept))


async def test_only_the_tensors_that_differ_are_asked_for(worker, checkpoint, specs, path, tmp_path):
    kept = tmp_path / "kept.safetensors"
    shutil.copy(path, kept)
    with path.open("r+b") as stream:
        stream.seek(checkpoint.tensors["layers.2"].offset)
        stream.write(b"\xff")
    (changed,) = [spec for spec in specs if spec.name == "layers.2"]
    received = await worker.receive(load_of(specs, (hint_at(path),)), chunks_of(open_weight_file(kept), [changed]))
    assert worker.needed.requests == (WeightRequest(sha256=changed.sha256, offset=0),)
    assert worker.needed.bytes_from_disk == total(specs) - changed.num_bytes
    assert_all_right(received, open_weight_file(kept))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}"])
async def test_a_file_that_is_no_checkpoint_is_passed_over(worker, checkpoint, specs, tmp_path, content):
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(content)
    hints = (hint_at(rubbish), FileHint(path="relative/path", num_bytes=1), FileHint(path=str(tmp_path), num_bytes=1))
    assert_all_right(await worker.receive(load_of(specs, hints), chunks_of(checkpoint, specs)), checkpoint)


async def test_a_file_changed_after_it_was_verified_is_an_error_not_wrong_weights(worker, specs, path, checkpoint):
    received = await worker.receive(load_of(specs, (hint_at(path),)))
    write_file(path, seed=2)
    with pytest.raises(CheckpointError, match=r"was changed after tensor layers\.1 in it was verified"):
        received.read("layers.1")


async def test_a_cached_tensor_that_rotted_is_asked_for_again(worker, checkpoint, specs):
    await worker.receive(load_of(specs), chunks_of(checkpoint, specs))
    rotten = worker.cache.path(specs[1].sha256)
    status = rotten.stat()
    rotten.write_bytes(bytes(status.st_size))
    os.utime(rotten, ns=(status.st_atime_ns, status.st_mtime_ns))
    worker.replies.clear()
    received = await worker.receive(load_of(specs), chunks_of(checkpoint, [specs[1]]))
    assert worker.needed == WeightsNeeded(
        requests=(WeightRequest(sha256=specs[1].sha256, offset=0),),
        bytes_from_disk=0,
        bytes_from_cache=total(specs) - specs[1].num_bytes,
    )
    assert_all_right(received, checkpoint)


async def test_the_stream_may_end_in_the_middle_and_the_next_call_asks_for_the_rest(worker, checkpoint, specs):
    chunks = chunks_of(checkpoint, specs)
    with pytest.raises(LinkLostError, match=rf"stopped sending weights: 1700 of {total(specs)} bytes are here"):
        await worker.receive(load_of(specs), chunks[:4])
    worker.replies.clear()
    received = await worker.receive(load_of(specs), chunks[4:])
    assert worker.needed.requests[0] == WeightRequest(sha256=specs[1].sha256, offset=chunks[4].offset)
    assert_all_right(received, checkpoint)


async def test_a_tensor_that_was_whole_when_the_worker_died_is_not_asked_for(worker, checkpoint, specs):
    first = worker.cache.begin(specs[0])
    first.write(0, checkpoint.read_tensor(specs[0].name))
    first.close()
    received = await worker.receive(load_of(specs), chunks_of(checkpoint, specs[1:]))
    assert specs[0].sha256 not in {request.sha256 for request in worker.needed.requests}
    assert_all_right(received, checkpoint)


async def test_tensors_may_come_interleaved(worker, checkpoint, specs):
    chunks = chunks_of(checkpoint, specs)
    mixed = sorted(chunks, key=lambda chunk: (chunk.offset, chunk.sha256))
    assert_all_right(await worker.receive(load_of(specs), mixed), checkpoint)


def lying(chunks: list[LoadMessage], fault: str) -> list[LoadMessage]:
    """The right chunks with one thing wrong in the second tensor's second chunk, or an unasked one."""
    second = next(i for i, chunk in enumerate(chunks) if chunk.sha256 != chunks[0].sha256) + 1
    chunk = chunks[second]
    match fault:
        case "gap":
            del chunks[second]
        case "repeat":
            chunks.insert(second, chunks[second - 1])
        case "too long":
            chunks[second] = WeightChunk(sha256=chunk.sha256, offset=chunk.offset, data=bytes(100_000))
        case "unasked":
            chunks[second] = WeightChunk(sha256="f" * 64, offset=0, data=b"x")
        case "again":
            chunks[second] = chunks[0]
        case "not a hash":
            chunks[second] = WeightChunk(sha256="../" * 30, offset=0, data=b"x")
        case "late start":
            chunks[second] = next(
                c for c in chunks if c.offset == 500 and c.sha256 not in {chunk.sha256, chunks[0].sha256}
            )
        case "second begin":
            chunks[second] = LoadBegin(load=load_of(()))
    return chunks


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gap", r"tensor layers\.\d: a chunk at offset 1000, expected 500"),
        ("repeat", r"tensor layers\.\d: a chunk at offset 0, expected 500"),
        ("too long", r"tensor layers\.\d: a chunk up to byte 100500, but it has \d+"),
        ("unasked", "never asked for"),
        ("again", "more of it than it has"),
        ("not a hash", "never asked for"),
        ("late start", r"tensor layers\.\d: a chunk at offset 500, expected 0"),
        ("second begin", "a second LoadBegin"),
    ],
)
async def test_a_master_that_sends_what_it_may_not_is_told_and_what_was_right_is_kept(
    worker, checkpoint, specs, fault, message
):
    with pytest.raises(ProtocolError, match=message):
        await worker.receive(load_of(specs), lying(chunks_of(checkpoint, specs), fault))
    assert worker.cache.path(specs[0].sha256).read_bytes() == bytes(checkpoint.read_tensor(specs[0].name))
    worker.replies.clear()
    with pytest.raises(LinkLostError):
        await worker.receive(load_of(specs))
    assert specs[0].sha256 not in {request.sha256 for request in worker.needed.requests}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "../../x"}, "is not a SHA-256"),
        ({"num_bytes": 0}, "0 bytes can't have the SHA-256"),
        ({"num_bytes": -4}, "-4 bytes can't have the SHA-256"),
        ({"sha256": hashlib.sha256().hexdigest()}, "1200 bytes can't have the SHA-256"),
        ({"name": "layers.1"}, "tensor layers.1 is listed twice"),
    ],
)
async def test_a_list_of_tensors_that_cannot_be_is_refused_before_the_disk_is_touched(
    worker, specs, tmp_path, changes, message
):
    values = {"name": "layers.0", "dtype": "F32", "shape": (30, 10), "num_bytes": 1200, "sha256": "a" * 64}
    other = TensorSpec(name="layers.1", dtype="F32", shape=(30, 11), num_bytes=1320, sha256="b" * 64)
    with pytest.raises(ProtocolError, match=message):
        await worker.receive(load_of([other, TensorSpec(**(values | changes))]))
    assert not (tmp_path / "worker").exists()


async def test_one_hash_with_two_sizes_is_refused(worker, specs):
    twin = TensorSpec(name="twin", dtype="U8", shape=(5,), num_bytes=5, sha256=specs[0].sha256)
    with pytest.raises(ProtocolError, match=r"tensors layers\.\d and twin have one SHA-256, but \d+ and 5 bytes"):
        await worker.receive(load_of([specs[0], twin]))


async def test_a_new_load_takes_the_place_of_one_whose_connection_hangs(worker, checkpoint, specs):
    """A half-open connection is noticed by nobody; the master's next call must not wait for it, nor start anew."""
    chunks = chunks_of(checkpoint, specs)
    stuck = asyncio.Event()

    async def hanging() -> AsyncIterator[LoadMessage]:
        for chunk in chunks[:4]:
            yield chunk
        stuck.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(worker.receive_from(load_of(specs), hanging()))
    await stuck.wait()
    worker.replies.clear()
    received = await worker.receive(load_of(specs), chunks[4:])
    with pytest.raises(LinkLostError, match="began the load anew"):
        await first
    assert_all_right(received, checkpoint)


async def test_the_present_stage_stays_in_a_cache_without_room_until_the_next_one(tmp_path, checkpoint, specs):
    worker = Worker(tmp_path / "worker", limit_bytes=0)
    received = await worker.receive(load_of(specs), chunks_of(checkpoint, specs))
    TensorCache(tmp_path / "worker", limit_bytes=0).make_room(0)
    assert_all_right(received, checkpoint)
    await worker.receive(load_of(specs[:1]))
    assert [entry.sha256 for entry in worker.cache.entries()] == [specs[0].sha256]
    await worker.receiver.close()
    assert worker.cache.entries() == []


async def test_a_stage_larger_than_the_caches_limit_still_resumes(tmp_path, checkpoint, specs):
    worker = Worker(tmp_path / "worker", limit_bytes=0)
    chunks = chunks_of(checkpoint, specs)
    with pytest.raises(LinkLostError):
        await worker.receive(load_of(specs), chunks[:4])
    assert_all_right(await worker.receive(load_of(specs), chunks[4:]), checkpoint)


async def test_a_tensor_without_elements_needs_no_source(worker):
    empty = TensorSpec(name="none", dtype="F32", shape=(0, 4), num_bytes=0, sha256=hashlib.sha256().hexdigest())
    received = await worker.receive(load_of([empty]))
    assert worker.needed.requests == ()
    assert bytes(received.read("none")) == b""


async def test_progress_ends_at_the_whole_stage(worker, checkpoint, specs):
    await worker.receive(load_of(specs), chunks_of(checkpoint, specs))
    assert worker.replies[-1] == LoadProgress(phase="receive", done_bytes=total(specs), total_bytes=total(specs))
