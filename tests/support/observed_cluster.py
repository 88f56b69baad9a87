"""A real master over a memory transport; its workers compute nothing but keep time, each on a clock of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from fake_pipeline import COSTS, REPORT, FakePipeline

from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.runtime.master import MasterEngine
from shardwright.transport.memory import MemoryTransport
from shardwright.types import (
    HeartbeatReport,
    LinkReport,
    StageAssignment,
    StepInput,
    StepTrace,
    WorkerCapacity,
)
from shardwright.wire.messages import LoadDone, StepAck, StepResult

BYTES_OUT = 256  # of a step's activation


class TimedStage:
    """A worker's service: each step takes `compute_s`, then as long as the link to the next one does."""

    def __init__(self, name: str, pipeline: FakePipeline, *, skew_s: float) -> None:
        self.name = name
        self.skew_s = skew_s
        self.compute_s = 0.004
        self.link_s = 0.002
        self.errors: tuple[tuple[str, int], ...] = ()
        self.assignment: StageAssignment | None = None
        self.traces: list[StepTrace] = []
        self.asked: list[int | None] = []  # where each heartbeat wanted its traces from
        self.next_stage: TimedStage | None = None
        self._pipeline = pipeline
        self._steps: asyncio.Queue[tuple[StepInput, float]] = asyncio.Queue()
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()
        self._busy_s = 0.0
        self._num_sent = 0

    def now(self) -> float:
        """What the worker's clock shows."""
        return time.monotonic() + self.skew_s

    def take(self, assignment: StageAssignment, next_stage: TimedStage | None) -> None:
        """Hold a stage; steps of an older one are forgotten."""
        self.assignment = assignment
        self.next_stage = next_stage
        self._steps, self._results = asyncio.Queue(), asyncio.Queue()
        self._busy_s, self._num_sent = 0.0, 0

    def arrive(self, step: StepInput) -> None:
        """A step is here."""
        self._steps.put_nowait((step, self.now()))

    async def run(self) -> None:
        """Compute what comes, for ever."""
        while True:
            steps = self._steps
            try:
                async with asyncio.timeout(0.05):  # look for a new queue now and then
                    step, arrived = await steps.get()
            except TimeoutError:
                continue
            started = self.now()
            await asyncio.sleep(self.compute_s)
            finished = self.now()
            following = self.next_stage
            sent = self.now()
            if following is None:
                self._results.put_nowait(self._pipeline._compute(step))
            else:
                asyncio.get_running_loop().call_later(self.link_s, following.arrive, step)
                self._num_sent += 1
            self._busy_s += finished - started
            self.traces.append(
                StepTrace(
                    epoch=step.epoch,
                    step=step.step,
                    num_sequences=len(step.slices),
                    num_tokens=step.num_tokens,
                    arrived_s=arrived,
                    started_s=started,
                    finished_s=finished,
                    sent_s=sent,
                    serialise_s=0.0,
                    bytes_in=0 if step.epoch and self.assignment.is_first else BYTES_OUT,
                    bytes_out=0 if following is None else BYTES_OUT,
                )
            )

    # --- the service -------------------------------------------------------------------------------

    async def process_layers(self, incoming) -> AsyncIterator[StepAck]:
        async for message in incoming:
            self.arrive(message.step)
            yield StepAck(epoch=message.step.epoch, step=message.step.step)

    async def tokens(self, epoch) -> AsyncIterator[StepResult]:
        results = self._results
        while True:
            yield await results.get()

    async def heartbeat(self, traces_since=None) -> HeartbeatReport:
        received = self.now()
        self.asked.append(traces_since)
        link = None
        if self.next_stage is not None:
            link = LinkReport(
                peer=self.next_stage.name,
                bytes_sent=BYTES_OUT * self._num_sent,
                steps_sent=self._num_sent,
                round_trip_s=2 * self.link_s,
            )
        return replace(
            REPORT,
            epoch=0 if self.assignment is None else self.assignment.epoch,
            busy_s=self._busy_s,
            steps_done=self._num_sent,
            weight_bytes=1000,
            kv_bytes=500,
            clock_received_s=received,
            clock_sent_s=self.now(),
            traces=() if traces_since is None else tuple(self.traces[traces_since:]),
            next_trace=len(self.traces),
            link=link,
            errors=self.errors,
        )

    async def release(self, epoch) -> None:
        if self.assignment is not None and self.assignment.epoch == epoch:
            self.assignment = None


class ObservedCluster:
    """The workers by name, their network, and the master over them."""

    def __init__(self, skews: dict[str, float]) -> None:
        self.pipeline = FakePipeline()
        self.transport = MemoryTransport()
        self.stages = {name: TimedStage(name, self.pipeline, skew_s=skew_s) for name, skew_s in skews.items()}
        self.addresses: dict[str, str] = {}
        self.engine: MasterEngine | None = None

    @property
    def observatory(self):
        return self.engine.observatory

    async def load(self, assignment, client) -> LoadDone:
        following = assignment.next_worker_id
        stage = self.stages[assignment.worker_id]
        stage.take(assignment, None if following is None else self.stages[following])
        return LoadDone(weight_bytes=7, kv_bytes=8, load_s=0.0)

    def lose(self, name: str) -> None:
        """The worker's network is cut."""
        self.transport.cut(self.addresses[name])


@contextlib.asynccontextmanager
async def observed_cluster(
    skews: dict[str, float] | None = None, *, history_interval_s: float = 60.0, **settings
) -> AsyncIterator[ObservedCluster]:
    """A deployed master over timed stages; `skews` are their clocks' leads over the master's: 0 or more seconds."""
    cluster = ObservedCluster(skews or {"a": 1000.0, "b": 0.5})
    values = {"block_size": 4, "token_budget": 64, "max_kv_tokens": 1024, "min_kv_tokens": 4, "workspace_bytes": 0}
    values |= {"probe_interval_s": None} | settings
    async with contextlib.AsyncExitStack() as stack:
        for name, stage in cluster.stages.items():
            listener = await cluster.transport.serve("127.0.0.1:0", stage)
            stack.push_async_callback(listener.close, grace_s=0)
            cluster.addresses[name] = listener.address
            task = asyncio.create_task(stage.run(), name=f"compute of {name}")
            stack.push_async_callback(_cancel, task)
        capacities = tuple(
            WorkerCapacity(
                worker_id=name,
                host_id=f"host-{name}",
                device="cpu",
                memory_bytes=4500,  # two stages hold the model, one does not
                read_bandwidth=1e9,
                matrix_rate=1e9,
            )
            for name in cluster.stages
        )
        clients = {name: cluster.transport.connect(address) for name, address in cluster.addresses.items()}
        engine = cluster.engine = MasterEngine(
            MasterState(CoreSettings(**values), COSTS),
            clients,
            cluster.load,
            heartbeat_interval_s=0.02,
            heartbeat_timeout_s=5.0,
            history_interval_s=history_interval_s,
        )
        async with engine:
            await engine.deploy(capacities)
            yield cluster


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
