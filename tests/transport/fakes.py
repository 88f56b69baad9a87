"""A worker's service that answers by the book, and remembers what reached it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from shardwright.errors import LinkLostError, ShardwrightError
from shardwright.types import (
    PHASE_BUCKETS_S,
    PROTOCOL_VERSION,
    FileHint,
    HeartbeatReport,
    LayerRange,
    LinkMeasures,
    LinkReport,
    MachineMeasures,
    PhaseTimes,
    SamplingParams,
    SequenceSlice,
    StageAssignment,
    StageLoad,
    StepInput,
    StepPhase,
    StepTiming,
    StepTrace,
    TensorSpec,
    TokenOut,
    WorkerDescription,
)
from shardwright.wire.messages import (
    LayerResult,
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadProgress,
    LoadReply,
    StepAck,
    StepMessage,
    StepReply,
    StepResult,
    TensorFrame,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

DESCRIPTION = WorkerDescription(
    protocol_version=PROTOCOL_VERSION,
    package_version="0.1.0",
    torch_version="2.13.0",
    transformers_version="5.23.0",
    host_id="host-a",
    pid=4242,
    device="cpu",
    device_name="a CPU with an ü",
    memory_total_bytes=16 << 30,
    memory_available_bytes=9 << 30,
    read_bandwidth=21.5e9,
    matrix_rate=1e11,
    num_threads=2,
    metrics_port=9100,
)
REPORT = HeartbeatReport(
    timestamp=1_700_000_000.25,
    epoch=3,
    queue_depth=2,
    steps_done=71,
    busy_s=1.5,
    uptime_s=9.75,
    device="cuda:0",
    device_name="some GPU",
    gpu_utilization=0.0,
    gpu_memory_used_bytes=None,
    gpu_memory_total_bytes=80 << 30,
    cpu_utilization=12.5,
    memory_used_bytes=1 << 33,
    memory_total_bytes=1 << 34,
    process_memory_bytes=1 << 30,
    timings=(StepTiming(num_sequences=4, num_tokens=36, mean_s=0.0125, count=9),),
    gpu_temperature_c=61.0,
    gpu_power_w=None,
    clock_received_s=99.5,
    clock_sent_s=99.75,
    weight_bytes=5 << 30,
    kv_bytes=1 << 20,
    traces=tuple(
        StepTrace(
            epoch=3, step=step, num_sequences=2, num_tokens=9, arrived_s=float(step), started_s=step + 0.25,
            finished_s=step + 0.5, sent_s=step + 0.5, serialise_s=0.125, bytes_in=0, bytes_out=1 << 40,
        )
        for step in (70, 71)
    ),
    next_trace=2**40,
    phases=tuple(
        PhaseTimes(phase=phase, counts=tuple(range(len(PHASE_BUCKETS_S) + 1)), total_s=0.5) for phase in StepPhase
    ),
    link=LinkReport(peer="w2", bytes_sent=1 << 40, steps_sent=71, round_trip_s=None),
    errors=(("LinkLostError", 2), ("other", 1)),
    loaded_bytes=(("disk", 5), ("network", 2**40)),
)  # fmt: skip
MACHINE = MachineMeasures(
    dtype="float16", num_threads=2, read_bandwidth=1.5e10, matrix_rate=2.5e11, disk_bandwidth=None
)
LINK = LinkMeasures(round_trip_s=0.00025, transfers=((0, 0.0005), (1 << 20, 0.125)))


def make_spec(number: int, num_bytes: int = 4096) -> TensorSpec:
    """A tensor whose hash is its number."""
    return TensorSpec(
        name=f"model.layers.{number}.weight",
        dtype="BF16",
        shape=(2, num_bytes // 4),
        num_bytes=num_bytes,
        sha256=f"{number:064x}",
    )


def make_load(num_tensors: int = 3, num_bytes: int = 4096) -> StageLoad:
    """A middle stage with some tensors."""
    return StageLoad(
        assignment=StageAssignment(
            epoch=3,
            worker_id="w1",
            stage_index=1,
            num_stages=3,
            layers=LayerRange(4, 9),
            num_blocks=128,
            block_size=16,
            next_worker_id="w2",
        ),
        model_config='{"model_type": "llama"}',
        dtype="bfloat16",
        tensors=tuple(make_spec(number, num_bytes) for number in range(num_tensors)),
        file_hints=(FileHint(path="/models/a.gguf", num_bytes=99, hub_repo="org/a", hub_filename="a.gguf"),),
        next_address="127.0.0.1:50052",
    )


def make_step(step: int, *, epoch: int = 3, tensor_bytes: int | None = 64, tokens: int = 1) -> StepMessage:
    """A step of two sequences; its activation is `tensor_bytes` long, or there is none."""
    slices = (
        SequenceSlice(seq_id=7, start_position=5, token_ids=(11,) * tokens, block_table=(0, 3), sampling=None),
        SequenceSlice(
            seq_id=9,
            start_position=0,
            token_ids=(1, 2, 3),
            block_table=(4,),
            sampling=SamplingParams(temperature=0.5, top_k=40, top_p=0.9, seed=2**64 - 1),
        ),
    )
    tensors: tuple[TensorFrame, ...] = ()
    if tensor_bytes is not None:
        pattern = bytes(range(251))
        data = (pattern * (tensor_bytes // len(pattern) + 1))[:tensor_bytes]
        tensors = (TensorFrame(name="hidden", dtype="bfloat16", shape=(tensor_bytes // 2,), data=data),)
    return StepMessage(step=StepInput(epoch=epoch, step=step, slices=slices), tensors=tensors)


class FakeWorker:
    """Acknowledges steps, takes weights, and publishes what tests put into `results`."""

    def __init__(self) -> None:
        self.steps: list[StepMessage] = []
        self.links_lost = 0
        self.links_ended = 0
        self.loads: list[StageLoad] = []
        self.weights: dict[str, bytearray] = {}
        self.released: list[int] = []
        self.traces_since: list[int | None] = []
        self.pings: list[tuple[bytes, int]] = []
        self.measured: list[object] = []
        self.results: asyncio.Queue[StepResult | None] = asyncio.Queue()
        self.token_streams_closed = 0
        self.raises: BaseException | None = None
        self.gate = asyncio.Event()  # calls wait for it
        self.gate.set()
        self.reading = asyncio.Event()  # steps are taken only while it is set
        self.reading.set()

    async def _answer_or_raise(self) -> None:
        await self.gate.wait()
        if self.raises is not None:
            raise self.raises

    async def describe(self) -> WorkerDescription:
        await self._answer_or_raise()
        return DESCRIPTION

    async def heartbeat(self, traces_since: int | None = None) -> HeartbeatReport:
        await self._answer_or_raise()
        self.traces_since.append(traces_since)
        return REPORT

    async def ping(self, data: bytes, reply_bytes: int) -> bytes:
        await self._answer_or_raise()
        self.pings.append((data, reply_bytes))
        return bytes([reply_bytes % 251]) * reply_bytes

    async def measure_machine(self, dtype: str) -> MachineMeasures:
        await self._answer_or_raise()
        self.measured.append(dtype)
        return replace(MACHINE, dtype=dtype)

    async def measure_link(self, address: str, sizes: tuple[int, ...]) -> LinkMeasures:
        await self._answer_or_raise()
        self.measured.append((address, sizes))
        return LINK

    async def release(self, epoch: int) -> None:
        await self._answer_or_raise()
        self.released.append(epoch)

    async def process_layer(self, message: StepMessage) -> LayerResult:
        await self._answer_or_raise()
        self.steps.append(message)
        return LayerResult(tensors=message.tensors, tokens=(TokenOut(seq_id=9, token_id=5, logprob=-0.25),))

    async def process_layers(self, incoming: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        await self._answer_or_raise()
        try:
            await self.reading.wait()
            async for message in incoming:
                self.steps.append(message)
                yield StepAck(epoch=message.step.epoch, step=message.step.step)
                await self.reading.wait()
            self.links_ended += 1
        except LinkLostError:
            self.links_lost += 1
            raise

    async def initialize_worker(self, incoming: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        await self._answer_or_raise()
        begin = await anext(incoming)
        assert isinstance(begin, LoadBegin)
        self.loads.append(begin.load)
        tensors = begin.load.tensors
        yield WeightsNeeded(
            requests=tuple(WeightRequest(sha256=spec.sha256, offset=0) for spec in tensors),
            bytes_from_disk=5,
            bytes_from_cache=6,
        )
        total, done = sum(spec.num_bytes for spec in tensors), 0
        try:
            async for chunk in incoming:
                assert isinstance(chunk, WeightChunk)
                self.weights.setdefault(chunk.sha256, bytearray()).extend(chunk.data)
                done += len(chunk.data)
                yield LoadProgress(phase="receive", done_bytes=done, total_bytes=total)
        except LinkLostError:
            self.links_lost += 1
            raise
        yield LoadProgress(phase="warm-up", done_bytes=done, total_bytes=total)
        yield LoadDone(weight_bytes=done, kv_bytes=1, load_s=0.5)

    async def tokens(self, epoch: int) -> AsyncIterator[StepResult]:
        await self._answer_or_raise()
        try:
            while (result := await self.results.get()) is not None:
                yield replace(result, epoch=epoch)
        finally:
            self.token_streams_closed += 1


class AnotherRoomsError(ShardwrightError):
    """A kind that the wire does not know."""
