"""Has the stages of a fresh session compute a few steps by hand, timed on the workers' own clocks.

They tell what a layer costs beside reading and arithmetic, what of the matrix rate this model's products reach, what
handing a step over takes, and how stages of one device slow each other down.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from shardwright.core.calibration import StageProbe, TimedStep
from shardwright.core.prediction import Cluster, StepLoad, Workload, decode_load, prompt_loads, stage_on
from shardwright.errors import ClusterError
from shardwright.runtime.session import Session
from shardwright.runtime.short_load import Listener, TokenIds
from shardwright.transport.base import WorkerClient
from shardwright.types import GREEDY, SequenceSlice, StageAssignment, StepId, StepInput, WorkerId
from shardwright.wire.messages import StepMessage, TensorFrame

CALL_TIMEOUT_S: Final = 60.0
STEP_TIMEOUT_S: Final = 120.0

_FIRST_STEP: Final = 1 << 40
"""By-hand steps have numbers that no pipeline reaches, so that nobody takes them for its own."""

_TIMED_ROUNDS: Final = 15
_LEAST_ROUNDS: Final = 2
_SHAPE_LIMIT_S: Final = 3.0


@dataclass(slots=True)
class _ProbedStage:
    """One stage while it is probed."""

    assignment: StageAssignment
    client: WorkerClient
    next_trace: int = 0
    walls: dict[StepId, tuple[float, int, int]] = field(default_factory=dict)  # seconds, tensor bytes there and back

    @property
    def worker_id(self) -> WorkerId:
        return self.assignment.worker_id

    async def compute(self, step: StepInput, tensors: tuple[TensorFrame, ...]) -> tuple[TensorFrame, ...]:
        """One step by hand; gives what the next stage takes."""
        begin = time.perf_counter()
        result = await self.client.process_layer(StepMessage(step=step, tensors=tensors), timeout_s=STEP_TIMEOUT_S)
        self.walls[step.step] = (time.perf_counter() - begin, _num_bytes(tensors), _num_bytes(result.tensors))
        return result.tensors

    async def times(self) -> dict[StepId, float]:
        """Seconds of the compute thread of each step that was computed by hand since the last call."""
        found: dict[StepId, float] = {}
        while True:
            report = await self.client.heartbeat(timeout_s=CALL_TIMEOUT_S, traces_since=self.next_trace)
            self.next_trace = report.next_trace
            found |= {trace.step: trace.finished_s - trace.started_s for trace in report.traces}
            if not report.traces:
                return {step: seconds for step, seconds in found.items() if step >= _FIRST_STEP}


class StageProber:
    """Has the stages of a fresh session compute a few steps by hand. No request may run meanwhile, nor have run.

    The steps write into KV blocks of the pool, which hold nothing yet.
    """

    def __init__(self, session: Session, workload: Workload, *, vocab_size: int) -> None:
        snapshot = session.engine.snapshot()
        clients = {worker.worker_id: worker.client for worker in session.workers}
        self._stages = [_ProbedStage(stage, clients[stage.worker_id]) for stage in snapshot.stages]
        self._devices = {
            worker.worker_id: (worker.description.host_id, worker.description.device) for worker in session.workers
        }
        self._costs = session.model.costs
        self._block_size = snapshot.stages[0].block_size
        self._num_blocks = snapshot.num_blocks
        self._workload = workload
        self._ids = TokenIds(vocab_size, first=0)
        self._next_step = _FIRST_STEP

    async def probe(self, chunk: StepLoad | None, listener: Listener) -> tuple[StageProbe, ...]:
        """All stages, one after the other as in a step. `chunk` is a prompt's first one; None: prompts aren't probed.

        Raises what the workers' clients raise.
        """
        sharing = self._sharing()
        sizes = {1, 2, 4, self._workload.num_sequences}
        sizes |= {max(self._workload.num_sequences // len(group), 1) for group in sharing}
        decodes: dict[WorkerId, list[TimedStep]] = {stage.worker_id: [] for stage in self._stages}
        hand_overs: dict[WorkerId, float] = {}
        for stage in self._stages:
            await stage.times()  # what was before is not wanted
        for size in sorted(size for size in sizes if size <= self._workload.num_sequences):
            listener.doing(f"probing the stages: steps of {size} {'sequences' if size > 1 else 'sequence'}")
            context = self._context(size)
            slices = self._decodes(size, context)
            timed = await self._time(slices, decode_load(size, context=context))
            for worker_id, step in timed.items():
                decodes[worker_id].append(step)
            if size == 1:
                hand_overs = await self._hand_overs()
        prompts: dict[WorkerId, TimedStep] = {}
        if chunk is not None:
            listener.doing(f"probing the stages: {chunk.num_tokens} tokens of a prompt")
            prompts = await self._time((self._prompt(chunk.num_tokens),), chunk)
        slowdowns: dict[WorkerId, float] = {}
        for group in sharing:
            listener.doing(f"probing {len(group)} stages of one device at once")
            slowdowns |= await self._slowdowns(group, decodes)
        return tuple(
            StageProbe(
                stage=stage_on(stage.assignment, self._costs),
                decodes=tuple(decodes[stage.worker_id]),
                prompt=prompts.get(stage.worker_id),
                hand_over_s=hand_overs[stage.worker_id],
                slowdown=slowdowns.get(stage.worker_id, 0.0),
            )
            for stage in self._stages
        )

    def _sharing(self) -> list[list[_ProbedStage]]:
        """Stages of one device, where they are several."""
        groups: dict[tuple[str, str], list[_ProbedStage]] = {}
        for stage in self._stages:
            groups.setdefault(self._devices[stage.worker_id], []).append(stage)
        return [group for group in groups.values() if len(group) > 1]

    # --- steps -------------------------------------------------------------------------------------

    def _step(self, slices: tuple[SequenceSlice, ...], *, steps_in_flight: int = 1) -> StepInput:
        step = StepInput(
            epoch=self._stages[0].assignment.epoch, step=self._next_step, slices=slices, steps_in_flight=steps_in_flight
        )
        self._next_step += 1
        return step

    def _context(self, num_sequences: int) -> int:
        """As the workload has it, or as much as there are blocks for."""
        return max(min(self._workload.context, self._num_blocks // num_sequences * self._block_size - 1), 1)

    def _decodes(self, num_sequences: int, context: int) -> tuple[SequenceSlice, ...]:
        """One new token of each sequence, behind so many positions.

        The blocks lie as they do after some time: those of a prompt follow each other, those that came with new tokens
        lie between other sequences'.
        """
        count = -(-context // self._block_size)
        grown = min(self._workload.new_tokens // 2 // self._block_size, count)
        first = count - grown
        slices = []
        for index in range(num_sequences):
            own = range(index * first, (index + 1) * first)
            later = range(num_sequences * first + index, num_sequences * count, num_sequences)
            slices.append(
                SequenceSlice(
                    seq_id=index + 1,
                    start_position=context - 1,
                    token_ids=self._ids.take(1),
                    block_table=(*own, *later),
                    sampling=GREEDY,
                )
            )
        return tuple(slices)

    def _prompt(self, num_tokens: int) -> SequenceSlice:
        blocks = tuple(range(-(-num_tokens // self._block_size)))
        return SequenceSlice(
            seq_id=1, start_position=0, token_ids=self._ids.take(num_tokens), block_table=blocks, sampling=None
        )

    # --- times -------------------------------------------------------------------------------------

    async def _time(self, slices: tuple[SequenceSlice, ...], load: StepLoad) -> dict[WorkerId, TimedStep]:
        """Means of a few trips through all stages; the last one computes each step also without the head."""
        bare = tuple(replace(part, sampling=None) for part in slices)
        steps: list[StepId] = []
        bare_steps: list[StepId] = []
        begin = time.perf_counter()
        while len(steps) <= _TIMED_ROUNDS:
            if len(steps) > _LEAST_ROUNDS and time.perf_counter() - begin > _SHAPE_LIMIT_S:
                break
            step = self._step(slices)
            tensors: tuple[TensorFrame, ...] = ()
            for stage in self._stages:
                if stage is self._stages[-1]:
                    without = self._step(bare)
                    await stage.compute(without, tensors)
                    bare_steps.append(without.step)
                if stage is not self._stages[-1] or slices != bare:
                    tensors = await stage.compute(step, tensors)
            steps.append(step.step)
        self._last_steps = steps[1:]
        self._last_bare = bare_steps[1:]
        found = {}
        self._times: dict[WorkerId, dict[StepId, float]] = {}
        for stage in self._stages:
            times = self._times[stage.worker_id] = await stage.times()
            if stage is not self._stages[-1]:
                found[stage.worker_id] = TimedStep(load=load, seconds=_mean(times, self._last_steps, stage))
                continue
            sampled_s = _mean(times, self._last_steps, stage) if slices != bare else None
            seconds = _mean(times, self._last_bare, stage)
            found[stage.worker_id] = TimedStep(load=load, seconds=seconds, sampled_s=sampled_s)
        return found

    async def _hand_overs(self) -> dict[WorkerId, float]:
        """What the steps that were just timed took beside computing and a ping of their size."""
        found = {}
        for stage in self._stages:
            rests = []
            for step in self._last_steps:
                wall_s, there, back = stage.walls[step]
                begin = time.perf_counter()
                await stage.client.ping(bytes(there), reply_bytes=back, timeout_s=CALL_TIMEOUT_S)
                ping_s = time.perf_counter() - begin
                rests.append(wall_s - self._times[stage.worker_id][step] - ping_s)
            found[stage.worker_id] = max(statistics.median(rests), 0.0)
        return found

    async def _slowdowns(
        self, group: Sequence[_ProbedStage], decodes: Mapping[WorkerId, Sequence[TimedStep]]
    ) -> dict[WorkerId, float]:
        """How much longer steps take for each further stage of the device that computes at the same time."""
        size = max(self._workload.num_sequences // len(group), 1)
        slices = self._decodes(size, self._context(size))
        inputs: dict[WorkerId, tuple[TensorFrame, ...]] = {}
        tensors: tuple[TensorFrame, ...] = ()
        first = self._step(slices)
        for stage in self._stages:
            inputs[stage.worker_id] = tensors
            tensors = await stage.compute(first, tensors)
        steps = []
        for _ in range(_TIMED_ROUNDS + 1):
            step = self._step(slices, steps_in_flight=len(group))
            await asyncio.gather(*(stage.compute(step, inputs[stage.worker_id]) for stage in group))
            steps.append(step.step)
        found = {}
        for stage in group:
            together_s = _mean(await stage.times(), steps[1:], stage)
            alone = next(step for step in decodes[stage.worker_id] if step.load.num_sequences == size)
            factor = together_s / (alone.seconds if alone.sampled_s is None else alone.sampled_s)
            found[stage.worker_id] = max((factor - 1) / (len(group) - 1), 0.0)
        return found


def _mean(times: Mapping[StepId, float], steps: Sequence[StepId], stage: _ProbedStage) -> float:
    """The mean, not the median: a rate is made of all steps, those that something disturbs included."""
    known = [times[step] for step in steps if step in times]
    if not known:
        raise ClusterError(f"worker {stage.worker_id} told no times of the steps that it was given to measure")
    return statistics.fmean(known)


def _num_bytes(frames: Sequence[TensorFrame]) -> int:
    return sum(memoryview(frame.data).nbytes for frame in frames)


async def probe_stages(
    session: Session, cluster: Cluster, workload: Workload, listener: Listener
) -> tuple[StageProbe, ...]:
    """What each stage of a fresh session takes for a few steps; see `StageProber`."""
    capacity = session.engine.snapshot().num_blocks * session.engine.snapshot().stages[0].block_size
    fitting = min(workload.prompt_tokens, capacity)
    chunk = prompt_loads(cluster, fitting)[0]
    prober = StageProber(session, workload, vocab_size=session.vocab_size)
    return await prober.probe(replace(chunk, num_sampled=0), listener)
