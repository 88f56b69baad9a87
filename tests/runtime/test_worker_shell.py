"""The worker's shell around a stage that computes nothing: what reaches the stage, and what comes out of it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from unittest.mock import Mock

import pytest
import torch

from shardwright.errors import (
    ClusterError,
    FrameError,
    LinkLostError,
    ShardwrightError,
    StageLoadError,
    WorkerUnreachableError,
)
from shardwright.model import stage as stage_module
from shardwright.model.offload import OffloadCounts
from shardwright.model.stage import StageOutput
from shardwright.runtime import held_stage
from shardwright.runtime import worker as worker_module
from shardwright.runtime.measure import Speed
from shardwright.runtime.raw_source import BlobsBeside, blob_spec
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.weight_receiver import WeightReceiver
from shardwright.runtime.weight_sender import send_stage
from shardwright.runtime.worker import WorkerShell
from shardwright.transport.base import Listener, WorkerClient
from shardwright.transport.memory import MemoryTransport
from shardwright.types import (
    VOCABULARY_TENSOR,
    HeartbeatReport,
    LayerRange,
    LinkReport,
    MachineMeasures,
    PromptScores,
    SamplingParams,
    SequenceSlice,
    StageAssignment,
    StageLoad,
    StepInput,
    StepPhase,
    StepTrace,
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
    offloaded_bytes: int = 0
    offload_counts: OffloadCounts = field(default_factory=OffloadCounts)
    open_: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    steps: list[StepInput] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    fails_at: int | None = None
    closed: bool = False
    passes_on: bool = False  # gives the next stage a tensor of 32 bytes
    received: list[dict[str, torch.Tensor]] = field(default_factory=list)

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
        self.received.append(tensors)
        if self.passes_on:
            return StageOutput(tensors={"hidden": torch.full((1, 2, 4), float(step.step))}, tokens=(), prompt_scores=())
        return StageOutput(tensors={}, tokens=tokens_of(step), prompt_scores=scores_of(step))

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeProbe:
    """A machine without a GPU that takes its time when it is asked to."""

    slowness_s: float = 0.0
    threads: list[str] = field(default_factory=list)  # that measured

    def report(self, **counters: object) -> HeartbeatReport:
        time.sleep(self.slowness_s)
        return HeartbeatReport(
            timestamp=5.0, device="cpu", device_name="fake", gpu_utilization=None, gpu_memory_used_bytes=None,
            gpu_memory_total_bytes=None, cpu_utilization=1.0, memory_used_bytes=1, memory_total_bytes=2,
            process_memory_bytes=3, **counters,
        )  # fmt: skip

    def measure_speed(self, dtype: str) -> Speed:
        self.threads.append(threading.current_thread().name)
        return Speed(read_bandwidth=7.0, matrix_rate={"float32": 1.0, "bfloat16": 2.0}[dtype])

    def measure_disk(self) -> float | None:
        self.threads.append(threading.current_thread().name)
        return None


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
    transport: MemoryTransport
    probe: FakeProbe
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

    def stage_load(
        self,
        *,
        vocabulary: bytes | None = None,
        epoch: int = 1,
        next_worker: Running | None = None,
        index: int = 0,
        master_id: str = "",
    ) -> StageLoad:
        """A stage of one tensor; with a next worker it is the first of two."""
        weight = TensorSpec(
            name="weight", dtype="U8", shape=(len(WEIGHT),), num_bytes=len(WEIGHT),
            sha256=hashlib.sha256(WEIGHT).hexdigest(),
        )  # fmt: skip
        return StageLoad(
            assignment=StageAssignment(
                epoch=epoch, worker_id="w", stage_index=index, num_stages=2 if next_worker else index + 1,
                layers=LayerRange(0, 2), num_blocks=4, block_size=4, next_worker_id="w2" if next_worker else None,
            ),
            model_config="{}",
            dtype="float32",
            tensors=(weight, *(() if vocabulary is None else (blob_spec(VOCABULARY_TENSOR, vocabulary),))),
            file_hints=(),
            next_address=next_worker.listener.address if next_worker else "",
            master_id=master_id,
        )  # fmt: skip

    async def load(
        self, *, vocabulary: bytes | None = None, epoch: int = 1, next_worker: Running | None = None, index: int = 0
    ) -> WeightsNeeded:
        """Load the stage as a session does; gives what had to be sent."""
        load = self.stage_load(vocabulary=vocabulary, epoch=epoch, next_worker=next_worker, index=index)
        heard: list[object] = []
        blobs = {} if vocabulary is None else {VOCABULARY_TENSOR: vocabulary}
        await send_stage(self.client, load, BlobsBeside(self.checkpoint, blobs), heard.append)
        (needed,) = [reply for reply in heard if isinstance(reply, WeightsNeeded)]
        return needed


@pytest.fixture
def start(tmp_path, monkeypatch) -> Callable[[], Awaitable[Running]]:
    """Starts a worker whose stages are fake."""

    async def start_worker(transport: MemoryTransport | None = None) -> Running:
        stage, built, probe = FakeStage(), [], FakeProbe()

        def build_stage(*, raw, vocabulary, progress, **_):
            built.append(Built(vocabulary, dict(raw.specs), bytes(raw.read("weight"))))
            progress(len(WEIGHT))
            stage.closed = False
            return stage

        monkeypatch.setattr(stage_module, "build_stage", build_stage)
        transport = transport or MemoryTransport()
        compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        receiver = WeightReceiver(TensorCache(tmp_path, limit_bytes=1 << 30), cache_dir=tmp_path)
        shell = WorkerShell(
            device="cpu", num_threads=1, compute=compute, probe=probe, receiver=receiver, transport=transport
        )
        listener = await transport.serve("127.0.0.1:0", shell)
        client = transport.connect(listener.address)
        return Running(shell, transport, probe, receiver, listener, client, compute, stage, built, Checkpoint())

    return start_worker


@pytest.fixture
async def worker(start) -> AsyncIterator[Running]:
    running = await start()
    yield running
    await running.close()


@pytest.fixture
async def pair(start) -> AsyncIterator[tuple[Running, Running]]:
    """Two workers whose stages are loaded, the first before the second."""
    second = await start()
    await second.load(index=1)
    first = await start(second.transport)
    first.stage.passes_on = True
    await first.load(next_worker=second)
    yield first, second
    await first.close()
    await second.close()


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


async def in_a_step(worker: Running) -> tuple[Link, asyncio.Future[list[object]]]:
    """Give the worker a stage that computes its first step until `stage.open_` is set."""
    await worker.load()
    worker.stage.open_.clear()
    link = Link(worker.client)
    link.send(step(1))
    replies = asyncio.ensure_future(collect(link.replies))
    await eventually(worker.stage.began.is_set)
    return link, replies


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
        _, reading = await in_a_step(worker)
        reading.cancel()
        return worker

    worker = asyncio.run(run_and_leave())
    worker.stage.open_.set()
    worker.compute.shutdown()
    assert [done.step for done in worker.stage.steps] == [1]
    assert not caplog.records


# --- what a worker tells of itself -----------------------------------------------------------------------------


async def run_steps(worker: Running, numbers: range, *, results: Running | None = None) -> None:
    """Steps through a pipeline that begins at `worker` and whose last stage is `results`, to their end."""
    stream = (results or worker).client.tokens(1)
    link = Link(worker.client)
    link.send(*(step(number) for number in numbers), None)
    replies = asyncio.ensure_future(collect(link.replies))
    for _ in numbers:
        await asyncio.wait_for(anext(stream), T)
    await stream.aclose()
    await replies


async def collect(replies: AsyncIterator[object]) -> list[object]:
    return [reply async for reply in replies]


def in_order(trace: StepTrace) -> bool:
    return trace.arrived_s <= trace.started_s <= trace.finished_s <= trace.sent_s


async def test_a_heartbeat_tells_the_steps_since_the_last_one(worker):
    await worker.load()
    before = await worker.client.heartbeat(timeout_s=T, traces_since=0)
    assert (before.traces, before.next_trace, before.steps_done) == ((), 0, 0)
    await run_steps(worker, range(1, 4))
    report = await worker.client.heartbeat(timeout_s=T, traces_since=before.next_trace)
    assert [(trace.epoch, trace.step, trace.num_sequences, trace.num_tokens) for trace in report.traces] == [
        (1, number, 2, 2) for number in (1, 2, 3)
    ]
    assert all(in_order(trace) and trace.bytes_in == trace.bytes_out == 0 for trace in report.traces)
    assert before.clock_sent_s <= report.traces[0].arrived_s
    assert report.traces[-1].sent_s <= report.clock_received_s <= report.clock_sent_s
    assert (report.next_trace, report.steps_done) == (3, 3)
    assert {times.phase: sum(times.counts) for times in report.phases} == {
        phase: 2 if phase is StepPhase.WAIT else 3 for phase in StepPhase
    }
    again = await worker.client.heartbeat(timeout_s=T, traces_since=report.next_trace)
    assert (again.traces, again.next_trace, again.phases) == ((), 3, report.phases)


async def test_timings_are_only_for_who_asks_for_traces(worker):
    """Another process that looks on takes nothing away from the master."""
    await worker.load()
    await run_steps(worker, range(1, 3))
    looker = await worker.client.heartbeat(timeout_s=T)
    assert (looker.timings, looker.traces, looker.next_trace, looker.steps_done) == ((), (), 2, 2)
    master = await worker.client.heartbeat(timeout_s=T, traces_since=0)
    assert sum(timing.count for timing in master.timings) == 2
    assert (await worker.client.heartbeat(timeout_s=T, traces_since=2)).timings == ()


async def test_the_time_that_the_machine_takes_to_answer_lies_between_the_clocks(worker):
    worker.probe.slowness_s = 0.05
    report = await worker.client.heartbeat(timeout_s=T)
    assert report.clock_sent_s - report.clock_received_s >= 0.05


async def test_the_machine_is_asked_when_the_step_that_is_computed_is_over(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "MOST_WAIT_FOR_STEP_S", T)
    link, replies = await in_a_step(worker)
    asked = asyncio.ensure_future(worker.client.heartbeat(timeout_s=T))
    await asyncio.sleep(0.05)
    assert not asked.done()
    worker.stage.open_.set()
    assert (await asked).steps_done == 1
    link.send(None)
    await replies


async def test_a_long_step_holds_up_no_heartbeat(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "MOST_WAIT_FOR_STEP_S", 0.02)
    link, replies = await in_a_step(worker)
    for _ in range(2):
        assert (await worker.client.heartbeat(timeout_s=T)).steps_done == 0
    worker.stage.open_.set()
    link.send(None)
    await replies


async def test_what_was_read_of_offloaded_weights_is_counted_over_stages(worker):
    await worker.load()
    worker.stage.offloaded_bytes, worker.stage.offload_counts = 70, OffloadCounts(read_bytes=700, wait_s=1.5)
    report = await worker.client.heartbeat(timeout_s=T)
    assert (report.offloaded_bytes, report.offload_read_bytes, report.offload_wait_s) == (70, 700, 1.5)
    await worker.client.release(1, timeout_s=T)
    report = await worker.client.heartbeat(timeout_s=T)
    assert (report.offloaded_bytes, report.offload_read_bytes, report.offload_wait_s) == (0, 700, 1.5)
    await worker.load(epoch=2)
    assert (await worker.client.heartbeat(timeout_s=T)).offload_read_bytes == 1400


async def test_a_worker_that_may_not_offload_refuses_a_stage_that_would(worker):
    load = worker.stage_load()
    load = replace(load, assignment=replace(load.assignment, offloaded_layers=(0, 1)))
    with pytest.raises(StageLoadError, match="2 layers are to be offloaded, but this worker was started without"):
        await send_stage(worker.client, load, BlobsBeside(worker.checkpoint, {}), lambda _: None)


async def test_a_report_tells_what_the_stage_holds_and_where_its_weights_came_from(worker):
    empty = await worker.client.heartbeat(timeout_s=T)
    assert (empty.epoch, empty.weight_bytes, empty.kv_bytes, empty.link) == (0, 0, 0, None)
    assert dict(empty.loaded_bytes) == {"disk": 0, "cache": 0, "network": 0}
    assert worker.shell.layers is None
    await worker.load()
    report = await worker.client.heartbeat(timeout_s=T)
    assert (report.epoch, report.weight_bytes, report.kv_bytes, report.link) == (1, 1, 2, None)
    assert dict(report.loaded_bytes) == {"disk": 0, "cache": 0, "network": len(WEIGHT)}
    assert worker.shell.layers == LayerRange(0, 2)
    await worker.load(epoch=2)
    report = await worker.client.heartbeat(timeout_s=T)
    assert dict(report.loaded_bytes) == {"disk": 0, "cache": len(WEIGHT), "network": len(WEIGHT)}


async def test_a_stage_is_asked_once_for_its_size(worker, monkeypatch):
    asked = []

    def count(_):
        asked.append("again")
        return 5

    monkeypatch.setattr(FakeStage, "weight_bytes", property(count, lambda *_: None))
    await worker.load()
    assert (await worker.client.heartbeat(timeout_s=T)).weight_bytes == 5
    assert worker.shell.report().weight_bytes == 5
    assert len(asked) == 1, "counting walks all modules, with the interpreter that steps need"


async def test_a_link_tells_what_went_over_it_and_how_far_its_end_is(pair, monkeypatch):
    monkeypatch.setattr(held_stage, "PING_INTERVAL_S", 0.01)
    first, second = pair
    unused = LinkReport(peer="w2", bytes_sent=0, steps_sent=0, round_trip_s=None)
    assert (await first.client.heartbeat(timeout_s=T)).link == unused
    results = second.client.tokens(1)
    link = Link(first.client)
    link.send(step(1), step(2), step(3))
    replies = asyncio.ensure_future(collect(link.replies))
    for _ in range(3):
        await asyncio.wait_for(anext(results), T)
    async with asyncio.timeout(T):
        while (report := await first.client.heartbeat(timeout_s=T, traces_since=0)).link.round_trip_s is None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (report.link.peer, report.link.bytes_sent, report.link.steps_sent) == ("w2", 96, 3)
    assert 0 < report.link.round_trip_s < T
    assert [(trace.bytes_in, trace.bytes_out) for trace in report.traces] == [(0, 32)] * 3
    ahead = await second.client.heartbeat(timeout_s=T, traces_since=0)
    assert [(trace.bytes_in, trace.bytes_out) for trace in ahead.traces] == [(32, 0)] * 3
    assert ahead.link is None
    # One process has one clock: each step left the first stage before it came to the second.
    assert all(left.sent_s <= came.arrived_s for left, came in zip(report.traces, ahead.traces, strict=True))
    link.send(None)
    await replies  # the sender of the steps is gone, so the link behind is closed, and with it its pings
    await results.aclose()
    await eventually(lambda: not [task for task in asyncio.all_tasks() if task.get_name().startswith("pings")])
    assert (await first.client.heartbeat(timeout_s=T)).link == unused


async def test_a_ping_that_is_never_answered_holds_up_no_step(pair, monkeypatch):
    monkeypatch.setattr(held_stage, "PING_INTERVAL_S", 0.0)
    first, second = pair
    asked = asyncio.Event()

    async def ping(data: bytes, reply_bytes: int) -> bytes:
        del data, reply_bytes
        asked.set()
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(second.shell, "ping", ping)
    results = second.client.tokens(1)
    link = Link(first.client)
    replies = asyncio.ensure_future(collect(link.replies))
    link.send(step(1))
    assert (await asyncio.wait_for(anext(results), T)).step == 1
    await asyncio.wait_for(asked.wait(), T)
    link.send(step(2))
    assert (await asyncio.wait_for(anext(results), T)).step == 2
    assert (await first.client.heartbeat(timeout_s=T)).link.round_trip_s is None
    link.send(None)
    await replies
    await results.aclose()


@pytest.mark.parametrize(("error", "with_traceback"), [(ClusterError("a rank is gone"), False), (KeyError(), True)])
async def test_a_failed_step_is_logged_with_where_in_the_code_unless_the_error_says_what_happened(
    pair, caplog, monkeypatch, error, with_traceback
):
    first, _ = pair
    monkeypatch.setattr(first.stage, "forward", Mock(side_effect=error))
    link = Link(first.client)
    link.send(step(1))
    assert str(error) in (await asyncio.wait_for(anext(link.replies), T)).reason
    (record,) = [each for each in caplog.records if "step 1 of epoch 1 failed" in each.getMessage()]
    assert str(error) in record.getMessage()
    assert bool(record.exc_info) is with_traceback
    await link.replies.aclose()


async def test_errors_are_counted_by_kind(pair):
    first, second = pair
    stranger = Link(first.client)
    stranger.send(step(1, epoch=7))
    assert "the stage is of epoch 1" in (await asyncio.wait_for(anext(stranger.replies), T)).reason
    await stranger.replies.aclose()
    await eventually(lambda: dict(first.shell.report().errors) == {"StaleEpochError": 1, "LinkLostError": 1})
    second.stage.fails_at = 1
    link = Link(first.client)
    link.send(step(1))
    assert "no such number" in (await asyncio.wait_for(anext(link.replies), T)).reason
    await eventually(lambda: dict(second.shell.report().errors) == {"ArithmeticError": 1})
    await second.listener.close(grace_s=0)
    await eventually(lambda: dict(first.shell.report().errors) == {"StaleEpochError": 1, "LinkLostError": 2})
    await link.replies.aclose()


async def test_a_master_whose_connection_broke_as_the_stage_was_ready_is_told_so_when_it_asks_again(worker):
    load = worker.stage_load(master_id="one")
    done = await send_stage(worker.client, load, worker.checkpoint, lambda _: None)
    assert await send_stage(worker.client, load, worker.checkpoint, lambda _: None) == done
    assert len(worker.built) == 1
    with pytest.raises(StageLoadError, match="epoch 1 is not newer than 1"):
        await send_stage(worker.client, worker.stage_load(master_id="two"), worker.checkpoint, lambda _: None)
    assert await worker.client.process_layer(step(1), timeout_s=T), "the stage is held as before"


async def test_a_load_whose_connection_broke_while_it_waited_for_the_old_stages_end_goes_on_over_the_next(worker):
    _, replies = await in_a_step(worker)
    load = worker.stage_load(epoch=2, master_id="one")

    def begin() -> asyncio.Task[object]:
        return asyncio.ensure_future(send_stage(worker.client, load, worker.checkpoint, lambda _: None))

    broken = begin()
    await eventually(lambda: worker.shell._state.next_epoch == 2)
    broken.cancel()
    with pytest.raises(asyncio.CancelledError):
        await broken
    taken_up = begin()
    await asyncio.sleep(0.05)
    assert not taken_up.done(), "the old stage still computes"
    worker.stage.open_.set()
    await asyncio.wait_for(taken_up, T)
    assert await worker.client.process_layer(step(1, epoch=2), timeout_s=T)
    replies.cancel()


async def test_a_sender_that_breaks_the_protocol_counts_as_an_error(worker):
    async def incoming() -> AsyncIterator[StepMessage]:
        yield step(1)
        raise FrameError("a frame lies about its length")

    with pytest.raises(FrameError):
        await collect(worker.shell.process_layers(incoming()))
    assert dict(worker.shell.report().errors) == {"StaleEpochError": 1, "FrameError": 1}


async def test_a_stage_that_can_not_be_built_counts_as_an_error(worker, monkeypatch):
    def build_stage(**_: object) -> FakeStage:
        raise MemoryError

    monkeypatch.setattr(stage_module, "build_stage", build_stage)
    with pytest.raises(ShardwrightError, match="MemoryError"):
        await worker.load()
    assert (await worker.client.heartbeat(timeout_s=T)).errors == (("MemoryError", 1),)


async def test_a_report_takes_nothing_away(worker):
    await worker.load()
    await run_steps(worker, range(1, 3))
    seen = [await asyncio.to_thread(worker.shell.report) for _ in range(2)]
    assert [(report.steps_done, report.traces, report.timings) for report in seen] == [(2, (), ())] * 2
    assert seen[0].phases == seen[1].phases
    master = await worker.client.heartbeat(timeout_s=T, traces_since=0)
    assert (len(master.traces), sum(timing.count for timing in master.timings)) == (2, 2)


async def test_the_machine_is_measured_in_turn_with_steps(worker):
    link, replies = await in_a_step(worker)
    measuring = asyncio.ensure_future(worker.client.measure_machine("bfloat16", timeout_s=T))
    await asyncio.sleep(0.05)
    assert not measuring.done()
    assert worker.probe.threads == []
    worker.stage.open_.set()
    assert await measuring == MachineMeasures(
        dtype="bfloat16", num_threads=1, read_bandwidth=7.0, matrix_rate=2.0, disk_bandwidth=None
    )
    assert worker.probe.threads[0] == "compute_0"
    assert worker.probe.threads[1] != "compute_0"  # the disk holds up no step
    link.send(None)
    await replies


async def test_a_worker_measures_its_way_to_another_one(pair):
    first, second = pair
    measures = await first.client.measure_link(second.listener.address, (0, 100_000), timeout_s=T)
    assert [size for size, _ in measures.transfers] == [0, 100_000]
    assert all(0 < seconds < T for seconds in (measures.round_trip_s, *(took for _, took in measures.transfers)))
    with pytest.raises(WorkerUnreachableError, match=r"127\.0\.0\.1:9"):
        await first.client.measure_link("127.0.0.1:9", (1,), timeout_s=T)
