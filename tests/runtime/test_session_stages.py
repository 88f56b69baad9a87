"""What a session sends to the workers that it loads: each stage's tensors, and the vocabulary for the last one."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from live_sessions import Silence
from tiny_models import save_whole

from shardwright.config import MasterConfig
from shardwright.runtime.session import _StageSender, open_model
from shardwright.types import VOCABULARY_TENSOR, LayerRange, StageAssignment, StageLoad, TensorSpec
from shardwright.wire.messages import LoadBegin, LoadDone, LoadMessage, LoadReply, WeightRequest, WeightsNeeded

VOCABULARY = bytes(range(256)) * 12_000  # three chunks


class FakeTokenizer:
    """Knows a blob, and how often it was asked for it."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self.times_asked = 0

    def vocabulary(self) -> bytes:
        self.times_asked += 1
        return self._blob


class FakeWorker:
    """Asks for every tensor, and keeps what it gets."""

    address = "fake:1"

    def __init__(self) -> None:
        self.load: StageLoad | None = None
        self.received: dict[str, bytes] = {}

    async def initialize_worker(self, outgoing: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        begin = await anext(outgoing)
        assert isinstance(begin, LoadBegin)
        self.load = begin.load
        requests = tuple(WeightRequest(sha256=spec.sha256, offset=0) for spec in self.load.tensors)
        yield WeightsNeeded(requests=requests, bytes_from_disk=0, bytes_from_cache=0)
        async for chunk in outgoing:
            self.received[chunk.sha256] = self.received.get(chunk.sha256, b"") + chunk.data
        yield LoadDone(weight_bytes=1, kv_bytes=1, load_s=0.0)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.load.tensors}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_whole("llama", tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture
def make_sender(tiny, tmp_path):
    async def make(tokenizer: FakeTokenizer | None) -> _StageSender:
        config = MasterConfig(model=str(tiny), cache_dir=tmp_path)
        addresses = {name: f"{name}:1" for name in ("a", "b")}
        model = replace(await open_model(config, Silence()), tokenizer=tokenizer)
        return _StageSender(model, addresses, tmp_path, Silence())

    return make


async def send(sender: _StageSender, index: int, *, epoch: int = 1) -> FakeWorker:
    """Load one of two stages."""
    worker = FakeWorker()
    assignment = StageAssignment(
        epoch=epoch, worker_id="ab"[index], stage_index=index, num_stages=2, num_blocks=4, block_size=4,
        layers=LayerRange(3 * index, 3 + 2 * index), next_worker_id=None if index else "b",
    )  # fmt: skip
    await sender(assignment, worker)
    for spec in worker.specs.values():
        assert hashlib.sha256(worker.received[spec.sha256]).hexdigest() == spec.sha256
    return worker


async def test_the_last_stage_gets_the_vocabulary_beside_its_tensors_and_the_first_does_not(make_sender):
    sender = await make_sender(FakeTokenizer(VOCABULARY))
    first, last = await send(sender, 0), await send(sender, 1)
    assert VOCABULARY_TENSOR not in first.specs
    spec = last.specs[VOCABULARY_TENSOR]
    assert (spec.dtype, spec.shape, spec.num_bytes) == ("U8", (len(VOCABULARY),), len(VOCABULARY))
    assert last.received[spec.sha256] == VOCABULARY
    assert len(last.specs) > 1
    assert (first.load.next_address, last.load.next_address) == ("b:1", "")


async def test_every_new_pipelines_last_stage_gets_the_same_vocabulary_which_is_made_once(make_sender):
    tokenizer = FakeTokenizer(VOCABULARY)
    sender = await make_sender(tokenizer)
    loads = [(await send(sender, 1, epoch=epoch)).specs[VOCABULARY_TENSOR] for epoch in (1, 2)]
    assert loads[0] == loads[1]
    assert tokenizer.times_asked == 1


@pytest.mark.parametrize("tokenizer", [None, FakeTokenizer(b"")])
async def test_without_a_vocabulary_the_last_stage_gets_its_tensors_alone(make_sender, tokenizer):
    """A model without a tokenizer, and one whose tokens' bytes are not known."""
    last = await send(await make_sender(tokenizer), 1)
    assert VOCABULARY_TENSOR not in last.specs
