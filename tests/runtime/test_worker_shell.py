"""The worker's shell around a stage that computes nothing: what reaches the stage, and what comes out of it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from shardwright.errors import LinkLostError, ShardwrightError
from shardwright.model import stage as stage_module
from shardwright.model.stage import StageOutput
from shardwright.runtime.raw_source import BlobsBeside, blob_spec
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.weight_receiver import WeightReceiver
from shardwright.runtime.weight_sender import send_stage
from shardwright.runtime.worker import WorkerShell
from shardwright.transport.base import Listener, WorkerClient
from shardwright.transport.memory import MemoryTransport
from shardwright.types import (
    VOCABULARY_TENSOR,
    LayerRange,
    PromptScores,
    SamplingParams,
    SequenceSlice,
    StageAssignment,
    StageLoad,
    StepInput,
    TensorSpec,
    TokenOut,
    TokenScore,
)
from shardwright.wire.messages import LayerResult, StepAck, StepMessage, StepResult, StepTrouble, WeightsNeeded

WEIGHT = bytes(range(256)) * 64
T = 5.0


class Checkpoint:
    """One tensor on the master's side."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads.append(name)
        assert name == "weight"
        return WEIGHT[offset : offset + length]


@dataclass
class FakeStage:
    """Gives each sampling slice the token after its last, and scores the others; may be held up or fail."""

    weight_bytes: int = 1
    kv_bytes: int = 2
    open_: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    steps: list[StepInput] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    fails_at: int | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.open_.set()

    def forward(self, step: StepInput, tensors: dict[str, torch.Tensor]) -> StageOutput:
        assert not self.closed, "computed after its end"
        self.threads.add(threading.current_thread().name)
        self.began.set()
        assert self.open_.wait(T), "nobody let the stage go on"
        self.steps.append(step)
        if step.step == self.fails_at:
            raise ArithmeticError("no such number")
        return StageOutput(tensors={}, tokens=tokens_of(step), prompt_scores=scores_of(step))

    def close(self) -> None:
        self.closed = True


def tokens_of(step: StepInput) -> tuple[TokenOut, ...]:
    top = ((3, -1.0), (4, -2.0))
    return tuple(
        TokenOut(seq_id=s.seq_id, token_id=s.token_ids[-1] + 1, logprob=-0.5, top=top)
        for s in step.slices
        if s.sampling
    )


def scores_of(step: StepInput) -> tuple[PromptScores, ...]:
    return tuple(
        PromptScores(
            seq_id=s.seq_id,
            first_position=s.start_position + 1,
            scores=(TokenScore(token_id=s.next_token_id, logprob=-3.0, top=((9, -0.25),)),),
        )
        for s in step.slices
        if s.num_prompt_logprobs is not None
    )


def step(number: int, *, epoch: int = 1) -> StepMessage:
    sampling = SequenceSlice(
        seq_id=1, start_position=4, token_ids=(number,), block_table=(0,), sampling=SamplingParams(num_top_logprobs=2)
    )
    scored = SequenceSlice(
        seq_id=2, start_position=0, token_ids=(7,), block_table=(1,), sampling=None, num_prompt_logprobs=1,
        next_token_id=0,
    )  # fmt: skip
    return StepMessage(step=StepInput(epoch=epoch, step=number, slices=(sampling, scored), dropped=(5,)))


@dataclass
class Built:
    """What `build_stage` was called with."""

    vocabulary: bytes | None
    specs: dict[str, TensorSpec]
    weight: bytes


@dataclass
class Running:
    """A worker that listens, and what a master has of it."""

    shell: WorkerShell
    receiver: WeightReceiver
    listener: Listener
    client: WorkerClient
    compute: ThreadPoolExecutor
    stage: FakeStage
    built: list[Built]
    checkpoint: Checkpoint

    async def close(self) -> None:
        self.stage.open_.set()
        await self.client.close()
        await self.listener.close(grace_s=0)
        await self.shell.close()
        await self.receiver.close()

    async def load(self, *, vocabulary: bytes | None = None, epoch: int = 1) -> WeightsNeeded:
        """Load the stage as a session does; gives what had to be sent."""
        weight = TensorSpec(
            name="weight", dtype="U8", shape=(len(WEIGHT),), num_bytes=len(WEIGHT),
            sha256=hashlib.sha256(WEIGHT).hexdigest(),
        )  # fmt: skip
        blobs = {} if vocabulary is None else {VOCABULARY_TENSOR: vocabulary}
        load = StageLoad(
            assignment=StageAssignment(
                epoch=epoch, worker_id="w", stage_index=0, num_stages=1, layers=LayerRange(0, 2),
                num_blocks=4, block_size=4, next_worker_id=None,
            ),
            model_config="{}",
            dtype="float32",
            tensors=(weight, *(blob_spec(name, blob) for name, blob in blobs.items())),
            file_hints=(),
            next_address="",
        )  # fmt: skip
        heard: list[object] = []
        await send_stage(self.client, load, BlobsBeside(self.checkpoint, blobs), heard.append)
        (needed,) = [reply for reply in heard if isinstance(reply, WeightsNeeded)]
        return needed


@pytest.fixture
def start(tmp_path, monkeypatch) -> Callable[[], Awaitable[Running]]:
    """Starts a worker whose stages are fake."""

    async def start_worker() -> Running:
        stage, built = FakeStage(), []

        def build_stage(*, raw, vocabulary, progress, **_):
            built.append(Built(vocabulary, dict(raw.specs), bytes(raw.read("weight"))))
            progress(len(WEIGHT))
            stage.closed = False
            return stage

        monkeypatch.setattr(stage_module, "build_stage", build_stage)
        transport = MemoryTransport()
        compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        receiver = WeightReceiver(TensorCache(tmp_path, limit_bytes=1 << 30), cache_dir=tmp_path)
        shell = WorkerShell(
            device="cpu", num_threads=1, compute=compute, probe=None, receiver=receiver, transport=transport
        )
        listener = await transport.serve("127.0.0.1:0", shell)
        client = transport.connect(listener.address)
        return Running(shell, receiver, listener, client, compute, stage, built, Checkpoint())

    return start_worker


@pytest.fixture
async def worker(start) -> AsyncIterator[Running]:
    running = await start()
    yield running
    await running.close()


class Link:
    """A step link that a test feeds."""

    def __init__(self, client: WorkerClient) -> None:
        self._queue: asyncio.Queue[StepMessage | None] = asyncio.Queue()
        self.replies = client.process_layers(self._outgoing())

    def send(self, *messages: StepMessage | None) -> None:
        for message in messages:
            self._queue.put_nowait(message)

    async def _outgoing(self) -> AsyncIterator[StepMessage]:
        while (message := await self._queue.get()) is not None:
            yield message


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(T):
        while not condition():  # noqa: ASYNC110  what is waited for knows no event loop
            await asyncio.sleep(0.005)


# --- the vocabulary ------------------------------------------------------------------------------------------


async def test_the_vocabulary_travels_as_a_tensor_and_is_no_weight(worker):
    vocabulary = b"bytes of tokens" * 200_000  # several chunks
    needed = await worker.load(vocabulary=vocabulary)
    (built,) = worker.built
    assert built == Built(vocabulary, {"weight": built.specs["weight"]}, WEIGHT)
    assert worker.checkpoint.reads == ["weight"]
    assert [request.sha256 for request in needed.requests] == [
        hashlib.sha256(content).hexdigest() for content in (WEIGHT, vocabulary)
    ]


async def test_a_vocabulary_that_came_once_is_found_in_the_workers_cache(worker):
    vocabulary = bytes(range(256)) * 100
    await worker.load(vocabulary=vocabulary)
    needed = await worker.load(vocabulary=vocabulary, epoch=2)
    assert (needed.requests, needed.bytes_from_cache) == ((), len(WEIGHT) + len(vocabulary))
    assert [built.vocabulary for built in worker.built] == [vocabulary] * 2


async def test_a_model_without_a_tokenizer_sends_no_vocabulary(worker):
    await worker.load()
    assert [built.vocabulary for built in worker.built] == [None]


# --- steps ---------------------------------------------------------------------------------------------------


async def test_tokens_and_prompt_scores_of_each_step_come_in_order(worker):
    await worker.load()
    results = worker.client.tokens(1)
    link = Link(worker.client)
    link.send(*(step(number) for number in range(1, 21)))
    assert [await anext(link.replies), await anext(link.replies)] == [StepAck(epoch=1, step=n) for n in (8, 16)]
    for number in range(1, 21):
        message = step(number)
        assert await anext(results) == StepResult(
            epoch=1, step=number, tokens=tokens_of(message.step), prompt_scores=scores_of(message.step)
        )
    assert worker.stage.steps == [step(number).step for number in range(1, 21)]
    assert worker.stage.threads == {"compute_0"}
    await results.aclose()
    await link.replies.aclose()


async def test_a_step_by_hand_gives_tokens_and_prompt_scores(worker):
    await worker.load()
    message = step(1)
    assert await worker.client.process_layer(message, timeout_s=T) == LayerResult(
        tokens=tokens_of(message.step), prompt_scores=scores_of(message.step)
    )


async def test_a_step_that_fails_and_those_behind_it_are_reported_and_the_worker_lives(worker):
    await worker.load()
    worker.stage.fails_at = 2
    worker.stage.open_.clear()
    link = Link(worker.client)
    link.send(step(1), step(2), step(3))
    replies = asyncio.ensure_future(anext(link.replies))
    await eventually(worker.stage.began.is_set)
    worker.stage.open_.set()
    trouble = [await replies, await anext(link.replies)]
    reason = "ArithmeticError: no such number"
    assert trouble == [StepTrouble(epoch=1, step=n, worker_id="w", reason=reason) for n in (2, 3)]
    await link.replies.aclose()
    worker.stage.fails_at = None
    await worker.load(epoch=2)
    assert (await worker.client.process_layer(step(1, epoch=2), timeout_s=T)).tokens == tokens_of(step(1).step)


async def test_closing_waits_for_the_step_that_computes_and_starts_no_other(worker):
    await worker.load()
    worker.stage.open_.clear()
    link = Link(worker.client)
    link.send(step(1), step(2), step(3))
    replies = asyncio.ensure_future(anext(link.replies))
    await eventually(worker.stage.began.is_set)
    closing = asyncio.ensure_future(worker.shell.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    worker.stage.open_.set()
    await asyncio.wait_for(closing, T)
    assert [done.step for done in worker.stage.steps] == [1]
    assert worker.stage.closed
    await worker.client.close()
    with pytest.raises((LinkLostError, StopAsyncIteration, ShardwrightError)):
        await replies


async def test_a_release_while_a_step_computes_drops_its_result_and_frees_the_stage(worker):
    await worker.load()
    worker.stage.open_.clear()
    results = asyncio.ensure_future(anext(worker.client.tokens(1), None))
    link = Link(worker.client)
    link.send(step(1))
    replies = asyncio.ensure_future(anext(link.replies, None))
    await eventually(worker.stage.began.is_set)
    await worker.client.release(1, timeout_s=T)
    worker.stage.open_.set()
    assert await asyncio.wait_for(results, T) is None
    await eventually(lambda: worker.stage.closed)
    replies.cancel()


def test_a_step_that_is_done_after_the_event_loop_has_ended_disturbs_nobody(start, caplog):
    """A worker that is interrupted instead of closed: the compute thread has nobody left to tell."""

    async def run_and_leave() -> Running:
        worker = await start()
        await worker.load()
        worker.stage.open_.clear()
        link = Link(worker.client)
        link.send(step(1))
        reading = asyncio.ensure_future(anext(link.replies))
        await eventually(worker.stage.began.is_set)
        reading.cancel()
        return worker

    worker = asyncio.run(run_and_leave())
    worker.stage.open_.set()
    worker.compute.shutdown()
    assert [done.step for done in worker.stage.steps] == [1]
    assert not caplog.records
