"""A worker's shell: lets the network, the pure core and the compute thread meet.

Knows the order of nothing: `WorkerState` decides what happens next, this module does it. All state lives on the
event loop; only `Stage.forward`, building and disk work run on other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from shardwright.core.effects import (
    AckStep,
    ComputeStep,
    DropStep,
    ForwardStep,
    LoadStage,
    PublishTokens,
    RefuseStep,
    ReportFailure,
    UnloadStage,
    WorkerEffect,
)
from shardwright.core.events import (
    Assigned,
    LoadFailed,
    LoadFinished,
    NextLinkLost,
    Released,
    StepArrived,
    StepComputed,
    StepErrored,
    WorkerEvent,
)
from shardwright.core.worker import StagePhase, WorkerState
from shardwright.errors import (
    LinkLostError,
    ProtocolError,
    ShardwrightError,
    StaleEpochError,
)
from shardwright.runtime.held_stage import LINK_WINDOW, ComputedStep, HeldStage, NextLink
from shardwright.runtime.links import measure_link
from shardwright.runtime.measure import wait_for
from shardwright.runtime.stage_load import StageBuilder
from shardwright.runtime.step_recorder import ErrorCounter, StepRecorder, Transit
from shardwright.runtime.telemetry import StepClock
from shardwright.runtime.tensors import frame_from_tensor, tensor_from_frame
from shardwright.transport.trace_context import incoming_trace_parent
from shardwright.types import (
    Epoch,
    HeartbeatReport,
    LayerRange,
    LinkMeasures,
    MachineMeasures,
    StageLoad,
    StepId,
    StepTiming,
    StepTrace,
    WorkerDescription,
    WorkerId,
)
from shardwright.wire.messages import (
    LayerResult,
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadRefused,
    LoadReply,
    StepAck,
    StepMessage,
    StepReply,
    StepResult,
    StepTrouble,
    TensorFrame,
)

if TYPE_CHECKING:
    from shardwright.runtime.measure import Speed
    from shardwright.runtime.offload_tier import OffloadTier
    from shardwright.runtime.ranks import Ranks
    from shardwright.runtime.step_watch import StepWatch
    from shardwright.runtime.weight_receiver import ReceivedTensors
    from shardwright.transport.base import Transport

log = logging.getLogger(__name__)

MOST_WAIT_FOR_STEP_S = 0.1
"""A heartbeat waits so long for the end of the step that is computed."""

ACK_INTERVAL = LINK_WINDOW // 4
"""Steps for which one acknowledgement goes back: each would wake a process whose cores the next stage now uses."""

StepKey = tuple[Epoch, StepId]


class WeightReceiver(Protocol):
    """Finds a stage's tensors on this machine or takes them from the master."""

    async def receive(
        self,
        load: StageLoad,
        incoming: AsyncIterator[LoadMessage],
        send: Callable[[LoadReply], Awaitable[None]],
    ) -> ReceivedTensors:
        """All tensors of the stage, ready to be read one at a time."""
        ...

    @property
    def loaded_bytes(self) -> tuple[tuple[str, int], ...]:
        """Bytes of weights by where they came from, since the process began."""
        ...


class MachineProbe(Protocol):
    """Tells what the machine is and how it does."""

    def describe(self, *, stage_bytes: int) -> WorkerDescription:
        """Who this worker is and what it measured; `stage_bytes` are held by a stage that a new one would replace."""
        ...

    def report(
        self,
        *,
        epoch: Epoch,
        queue_depth: int,
        steps_done: int,
        busy_s: float,
        uptime_s: float,
        timings: tuple[StepTiming, ...],
    ) -> HeartbeatReport:
        """The machine's state now, with the stage's counters filled in."""
        ...

    def measure_speed(self, dtype: str) -> Speed:
        """Measure memory and matrix rate. Called on the compute thread."""
        ...

    def measure_disk(self) -> float | None:
        """Measure the disk of the tensor cache; None where that can't be done."""
        ...


@dataclass(slots=True)
class _ArrivedStep:
    """A step that waits for the compute thread."""

    message: StepMessage
    arrived_s: float


class WorkerShell:
    """Implements `transport.base.WorkerService` over a `WorkerState` and a `Stage`."""

    def __init__(
        self,
        *,
        device: str,
        num_threads: int,
        compute: ThreadPoolExecutor,
        probe: MachineProbe,
        receiver: WeightReceiver,
        transport: Transport,
        offload: OffloadTier | None = None,
        kernel_dir: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks | None = None,
        watch: StepWatch | None = None,
    ) -> None:
        """With `ranks`, all of them compute each stage; `device` and `num_threads` are rank 0's.

        `watch` notices a step that hangs, where ranks don't do that themselves.
        """
        self._device = device
        self._watch = watch
        self._ranks = ranks
        self._num_threads = num_threads
        self._threads_set = 0
        self._probe = probe
        self._receiver = receiver
        self._transport = transport
        self._offload_before = (0, 0.0)  # bytes read and seconds waited of the stages that were dropped
        self._now = clock
        self._state = WorkerState()
        self._held: HeldStage | None = None
        self._recorder = StepRecorder()
        self._errors = ErrorCounter()
        self._inbox: dict[StepKey, _ArrivedStep] = {}
        self._outbox: dict[StepKey, ComputedStep] = {}
        self._senders: dict[Epoch, asyncio.Queue[StepReply | None]] = {}  # the link of the epoch's steps
        self._load_starts: dict[Epoch, asyncio.Event] = {}
        self._is_duplicate = False  # the step that arrives now is still in the inbox from its first arrival
        self._lost_next: WorkerId | None = None  # the next stage's worker, once the link to it is gone
        self._loading: StageLoad | None = None  # the last load that was begun
        self._interrupted: Epoch | None = None  # a load whose call broke: the master may take it up again
        self._open_links = 0
        self._num_computing = 0  # steps on the compute thread, or waiting for it
        self._computed = asyncio.Event()  # one of them is over
        self._compute = compute
        self._builder = StageBuilder(
            device=device,
            kernel_dir=kernel_dir,
            offload=offload,
            ranks=ranks,
            compute=compute,
            prepare=lambda: self._set_threads(num_threads),
            clock=clock,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._measuring = asyncio.Lock()
        self.metrics_port = 0  # where this worker answers Prometheus; set by who put it together; 0: nowhere
        self._closed = False

    # --- service -----------------------------------------------------------------------------------

    async def describe(self) -> WorkerDescription:
        """Who this worker is and what it measured."""
        held = self._held
        stage_bytes = held.done.weight_bytes + held.done.kv_bytes if held else 0
        about = await asyncio.to_thread(self._probe.describe, stage_bytes=stage_bytes)
        return replace(
            about, last_epoch=self._state.last_epoch, in_use=self._open_links > 0, metrics_port=self.metrics_port
        )

    async def heartbeat(self, traces_since: int | None = None) -> HeartbeatReport:
        """The worker's state now; the machine is asked off the event loop, since NVML may be slow."""
        received_s = self._now()
        held = self._held
        timings: tuple[StepTiming, ...] = ()
        traces: tuple[StepTrace, ...] = ()
        next_trace = self._recorder.num_traces
        if traces_since is not None:
            timings = held.clock.take() if held is not None else ()
            traces, next_trace = self._recorder.traces(traces_since)
        await self._step_over()
        report = await asyncio.to_thread(self._report, held, timings)
        return replace(
            report, traces=traces, next_trace=next_trace, clock_received_s=received_s, clock_sent_s=self._now()
        )

    async def _step_over(self) -> None:
        """Wait until no step is computed, or for a moment only.

        Who asks the machine needs the interpreter for some milliseconds, in turns with the step: it would take longer
        by more than that.
        """
        if self._num_computing:
            self._computed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._computed.wait(), MOST_WAIT_FOR_STEP_S)

    def report(self) -> HeartbeatReport:
        """All counters now, without traces, timings and clocks; takes nothing away. Blocks while the machine is asked.

        May be called from any thread: what it reads of the event loop's is read whole, if not all at one moment.
        """
        return self._report(self._held, ())

    def _report(self, held: HeldStage | None, timings: tuple[StepTiming, ...]) -> HeartbeatReport:
        """Runs on any thread."""
        report = self._probe.report(
            epoch=held.load.assignment.epoch if held else 0,
            queue_depth=self._state.queue_depth,
            steps_done=held.clock.steps_done if held else 0,
            busy_s=held.clock.busy_s if held else 0.0,
            uptime_s=self._now() - held.loaded_at if held else 0.0,
            timings=timings,
        )
        read_bytes, wait_s = self._offload_counts(held)
        return replace(
            report,
            weight_bytes=held.done.weight_bytes if held else 0,  # the stage would count them anew, module by module
            kv_bytes=held.done.kv_bytes if held else 0,
            offloaded_bytes=held.stage.offloaded_bytes if held else 0,
            offload_read_bytes=read_bytes,
            offload_wait_s=wait_s,
            phases=self._recorder.phases(),
            link=held.link_report() if held else None,
            errors=self._errors.counts(),
            loaded_bytes=self._receiver.loaded_bytes,
        )

    def _offload_counts(self, held: HeldStage | None) -> tuple[int, float]:
        """Bytes of offloaded weights read and seconds waited for them, since the process began."""
        read_bytes, wait_s = self._offload_before
        if held is None:
            return read_bytes, wait_s
        counts = held.stage.offload_counts
        return read_bytes + counts.read_bytes, wait_s + counts.wait_s

    @property
    def layers(self) -> LayerRange | None:
        """Of the stage that is held. May be read from any thread."""
        held = self._held
        return held.load.assignment.layers if held is not None else None

    async def release(self, epoch: Epoch) -> None:
        """Drop the stage of this epoch, if it is still held."""
        if self._interrupted is not None and self._interrupted <= epoch:
            interrupted, self._interrupted = self._interrupted, None
            self._handle(LoadFailed(epoch=interrupted, reason="the master gave it up"))
        self._handle(Released(epoch=epoch))

    async def ping(self, data: bytes, reply_bytes: int) -> bytes:  # noqa: ARG002  only its way here matters
        """So many bytes, from the event loop at once."""
        return bytes(reply_bytes)

    async def measure_machine(self, dtype: str) -> MachineMeasures:
        """Memory and matrices are measured where stages compute, between two steps; the disk beside them.

        Nothing is refused while a pipeline runs: its steps wait for about a second.
        """
        async with self._measuring:  # two at once would measure each other
            loop = asyncio.get_running_loop()
            speed = await loop.run_in_executor(self._compute, self._probe.measure_speed, dtype)
            disk_bandwidth = await asyncio.to_thread(self._probe.measure_disk)
        return MachineMeasures(
            dtype=dtype,
            num_threads=self._num_threads * (self._ranks.num_ranks if self._ranks is not None else 1),
            read_bandwidth=speed.read_bandwidth,
            matrix_rate=speed.matrix_rate,
            disk_bandwidth=disk_bandwidth,
        )

    async def measure_link(self, address: str, sizes: tuple[int, ...]) -> LinkMeasures:
        """Time pings to another worker over a connection of their own, which shares the network with steps."""
        client = self._transport.connect(address)
        try:
            async with self._measuring:
                return await measure_link(client, sizes)
        finally:
            await client.close()

    async def initialize_worker(self, incoming: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        """Take a stage: collect its tensors, build it, say how it went."""
        first = await anext(incoming, None)
        if not isinstance(first, LoadBegin):
            raise ProtocolError("InitializeWorker must begin with the stage's assignment")
        replies: asyncio.Queue[LoadReply | None] = asyncio.Queue()
        task = asyncio.create_task(self._load(first.load, incoming, replies), name="load")
        try:
            while (reply := await replies.get()) is not None:
                yield reply
            await task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ShardwrightError):
                await task

    async def process_layers(self, incoming: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        """The step link from the master or the previous stage."""
        replies: asyncio.Queue[StepReply | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read_steps(incoming, replies), name="read steps")
        self._open_links += 1
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            self._open_links -= 1
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            for epoch in [epoch for epoch, queue in self._senders.items() if queue is replies]:
                del self._senders[epoch]
                self._close_next_link(epoch)

    async def process_layer(self, message: StepMessage) -> LayerResult:
        """Compute one step by hand, in turn with the pipeline's steps; nothing is forwarded."""
        held = self._held
        if held is None or held.load.assignment.epoch != message.step.epoch:
            has = f"epoch {held.load.assignment.epoch}" if held else "no stage"
            raise StaleEpochError(f"step {message.step.step} names epoch {message.step.epoch}; this worker has {has}")
        step = _ArrivedStep(message, self._now())
        computed = await asyncio.get_running_loop().run_in_executor(self._compute, self._forward, held, step)
        self._recorder.record(computed.transit, self._now())
        return LayerResult(
            tensors=computed.message.tensors, tokens=computed.tokens, prompt_scores=computed.prompt_scores
        )

    async def tokens(self, epoch: Epoch) -> AsyncIterator[StepResult]:
        """The last stage's results until the epoch ends."""
        held = self._held
        if held is None or held.load.assignment.epoch != epoch:
            raise StaleEpochError(f"no stage of epoch {epoch} here")
        if not held.load.assignment.is_last:
            raise ProtocolError(f"stage {held.load.assignment.stage_index} is not the last one: it has no tokens")
        self._open_links += 1
        try:
            while (item := await held.results.get()) is not None:
                result, transit = item
                self._recorder.record(transit, self._now())
                yield result
        finally:
            self._open_links -= 1

    async def close(self) -> None:
        """End links, compute and stage. The listener is closed before."""
        self._closed = True
        self._builder.stop()
        held, self._held = self._held, None
        if held is not None:
            await self._drop(held)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._compute.shutdown(wait=False, cancel_futures=True)  # a step may take long, and nobody wants it any more

    # --- core --------------------------------------------------------------------------------------

    def _handle(self, event: WorkerEvent) -> None:
        for effect in self._state.handle(event, self._now()):
            self._apply(effect)

    def _apply(self, effect: WorkerEffect) -> None:
        match effect:
            case LoadStage():
                self._load_starts.setdefault(effect.assignment.epoch, asyncio.Event()).set()
            case UnloadStage():
                self._unload(effect.epoch)
            case ComputeStep():
                self._start_compute((effect.epoch, effect.step))
            case AckStep():
                if effect.step % ACK_INTERVAL == 0:
                    self._reply(StepAck(epoch=effect.epoch, step=effect.step))
            case ForwardStep():
                self._forward_step((effect.epoch, effect.step))
            case PublishTokens():
                self._publish((effect.epoch, effect.step))
            case DropStep():
                self._forget((effect.epoch, effect.step))
            case RefuseStep():
                self._errors.add(ProtocolError if effect.epoch == self._state.epoch else StaleEpochError)
                self._reply(self._trouble(effect.epoch, effect.step, effect.reason))
                if not self._is_duplicate:  # a step that came twice: the first may still wait its turn
                    self._forget((effect.epoch, effect.step))
            case ReportFailure():
                self._reply(self._trouble(effect.epoch, effect.step, effect.reason))
                self._forget((effect.epoch, effect.step))
            case _:
                assert_never(effect)

    def _trouble(self, epoch: Epoch, step: StepId, reason: str) -> StepTrouble:
        assignment = self._held.load.assignment if self._held else None
        lost = self._lost_next if assignment is not None else None
        worker_id = lost or (assignment.worker_id if assignment is not None else "")
        return StepTrouble(epoch=epoch, step=step, worker_id=worker_id, reason=reason, link_lost=lost is not None)

    def _reply(self, reply: StepReply) -> None:
        """Answer on the link that the epoch's steps come from; a link that is gone needs no answer."""
        queue = self._senders.get(reply.epoch)
        if queue is not None:
            queue.put_nowait(reply)

    def _forget(self, key: StepKey) -> None:
        self._inbox.pop(key, None)
        self._outbox.pop(key, None)

    # --- loading -----------------------------------------------------------------------------------

    async def _load(
        self, load: StageLoad, incoming: AsyncIterator[LoadMessage], replies: asyncio.Queue[LoadReply | None]
    ) -> None:
        epoch = load.assignment.epoch
        began = self._now()
        try:
            held = self._held
            if held is not None and held.load == load and self._state.epoch == epoch:
                # The same master again: the connection broke before it heard that its stage was built.
                self._interrupted = None
                await replies.put(held.done)
                return
            if not await self._begin_load(load, replies):
                return
            raw = await self._receiver.receive(load, incoming, replies.put)
            stage = await self._builder.build(load, raw, replies.put_nowait)
            self._lost_next = None
            self._recorder.begin_stage()
            done = LoadDone(weight_bytes=stage.weight_bytes, kv_bytes=stage.kv_bytes, load_s=self._now() - began)
            self._held = HeldStage(
                load=load,
                done=done,
                stage=stage,
                clock=StepClock(),
                loaded_at=self._now(),
                trace_parent=incoming_trace_parent(),
            )
            self._handle(LoadFinished(epoch=epoch))
            if self._state.epoch != epoch:  # replaced or released while it was built
                await replies.put(LoadRefused(reason=f"epoch {epoch} was given up while its stage was built"))
                return
            await replies.put(done)
        except LinkLostError as exc:
            self._errors.add(type(exc))
            self._interrupted = epoch  # the master will call again, or is gone; what arrived stays in the cache
        except Exception as exc:  # the top of the load's task: whatever went wrong becomes an event
            reason = str(exc) or type(exc).__name__
            self._errors.add(type(exc))
            log.warning("stage of epoch %d could not be built: %s", epoch, reason, exc_info=exc)
            self._handle(LoadFailed(epoch=epoch, reason=reason))
            await replies.put(LoadRefused(reason=reason))
        except asyncio.CancelledError:
            self._interrupted = epoch
            raise
        finally:
            replies.put_nowait(None)

    async def _begin_load(self, load: StageLoad, replies: asyncio.Queue[LoadReply | None]) -> bool:
        """Let the core take the assignment and wait until an older stage is gone; False if it was refused."""
        epoch = load.assignment.epoch
        interrupted, self._interrupted = self._interrupted, None
        if self._loading == load:  # over a new connection
            if self._state.phase is StagePhase.LOADING:
                return True  # the receiver ends what the old one still does
            if self._state.next_epoch == epoch:
                await self._started(epoch)
                return True
        if interrupted is not None:
            self._handle(LoadFailed(epoch=interrupted, reason="the master went on to another epoch"))
        last = self._state.last_epoch
        if epoch <= last:
            reason = f"epoch {epoch} is not newer than {last}, which this worker has seen: another master uses it"
            await replies.put(LoadRefused(reason=reason))
            return False
        self._loading = load
        self._handle(Assigned(assignment=load.assignment))
        await self._started(epoch)
        return True

    async def _started(self, epoch: Epoch) -> None:
        """Wait until the stage before this epoch's is gone. Calls of several connections may wait for the same."""
        start = self._load_starts.setdefault(epoch, asyncio.Event())
        await start.wait()
        self._load_starts.pop(epoch, None)

    def _unload(self, epoch: Epoch) -> None:
        held = self._held
        if held is None or held.load.assignment.epoch != epoch:
            return
        self._offload_before = self._offload_counts(held)
        self._held = None
        self._spawn(self._drop(held))

    async def _drop(self, held: HeldStage) -> None:
        held.results.put_nowait(None)
        freed = asyncio.get_running_loop().run_in_executor(self._compute, held.stage.close)
        if held.next_link is not None:
            await held.next_link.close()
        await freed

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- steps -------------------------------------------------------------------------------------

    async def _read_steps(self, incoming: AsyncIterator[StepMessage], replies: asyncio.Queue[StepReply | None]) -> None:
        try:
            async for message in incoming:
                arrived_s = self._now()
                key = (message.step.epoch, message.step.step)
                self._is_duplicate = key in self._inbox
                self._inbox.setdefault(key, _ArrivedStep(message, arrived_s))
                self._senders[key[0]] = replies
                self._handle(StepArrived(epoch=key[0], step=key[1]))
        except LinkLostError as exc:
            self._errors.add(type(exc))
            log.info("a step link broke: %s", exc)
        except ProtocolError as exc:
            self._errors.add(type(exc))
            raise
        finally:
            replies.put_nowait(None)

    def _start_compute(self, key: StepKey) -> None:
        held = self._held
        step = self._inbox.pop(key)
        assert held is not None, "a step is computed only while a stage is held"
        loop = asyncio.get_running_loop()

        def tell(future: Future[ComputedStep]) -> None:
            """Called on the compute thread, or by `close` for a step that it never came to."""
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody wants the step any more
                loop.call_soon_threadsafe(self._on_computed, key, future)

        # Straight to the thread and straight back: a task in between would cost a turn of the loop at each end.
        self._num_computing += 1
        self._compute.submit(self._forward, held, step).add_done_callback(tell)

    def _on_computed(self, key: StepKey, future: Future[ComputedStep]) -> None:
        self._num_computing -= 1
        self._computed.set()
        if self._closed:
            return
        exc = future.exception()  # the top of the step: whatever went wrong becomes an event
        if exc is not None:
            self._errors.add(type(exc))
            known = isinstance(exc, ShardwrightError)  # it says what happened: where in the code is of no use
            log.error("step %d of epoch %d failed: %s", key[1], key[0], exc, exc_info=None if known else exc)
            self._handle(StepErrored(epoch=key[0], step=key[1], reason=f"{type(exc).__name__}: {exc}"))
            return
        self._outbox[key] = future.result()
        self._handle(StepComputed(epoch=key[0], step=key[1]))
        self._forget(key)

    def _forward(self, held: HeldStage, step: _ArrivedStep) -> ComputedStep:
        """Runs on the compute thread."""
        if self._watch is None:
            return self._compute_step(held, step)
        with self._watch.step(held.stage.progress):
            return self._compute_step(held, step)

    def _compute_step(self, held: HeldStage, step: _ArrivedStep) -> ComputedStep:
        started_s = self._now()
        message = step.message
        concurrency = min(message.step.steps_in_flight, held.load.assignment.num_sharing)
        self._set_threads(max(self._num_threads // concurrency, 1))
        preparing_s = self._now()
        tensors = {frame.name: tensor_from_frame(frame) for frame in message.tensors}
        computing_s = self._now()
        output = held.stage.forward(message.step, tensors)
        if output.tensors and self._device != "cpu":
            self._wait_for_device()  # or the copy to the CPU would wait for it, and count as serialising
        computed_s = self._now()
        frames = tuple(frame_from_tensor(name, tensor) for name, tensor in output.tensors.items())
        finished_s = self._now()
        num_sequences, num_tokens = len(message.step.slices), message.step.num_tokens
        held.clock.record(
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            seconds=finished_s - started_s,
            concurrency=concurrency,
        )
        return ComputedStep(
            message=replace(message, tensors=frames),
            transit=Transit(
                epoch=message.step.epoch,
                step=message.step.step,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                arrived_s=step.arrived_s,
                started_s=started_s,
                finished_s=finished_s,
                serialise_s=(computing_s - preparing_s) + (finished_s - computed_s),
                bytes_in=_num_bytes(message.tensors),
                bytes_out=_num_bytes(frames),
            ),
            tokens=output.tokens,
            prompt_scores=output.prompt_scores,
        )

    def _wait_for_device(self) -> None:
        import torch

        wait_for(torch.device(self._device))

    def _set_threads(self, count: int) -> None:
        """Compute with so many threads from now on. Called on the compute thread, which alone computes."""
        if count != self._threads_set:
            import torch

            torch.set_num_threads(count)
            self._threads_set = count

    def _forward_step(self, key: StepKey) -> None:
        held = self._held
        assert held is not None, "only a held stage forwards"
        if held.next_link is None:
            client = self._transport.connect(held.load.next_address)
            client.trace_parent = held.trace_parent
            held.next_link = NextLink(
                client,
                on_sent=lambda transit: self._recorder.record(transit, self._now()),
                on_reply=self._on_next_reply,
                on_lost=lambda why: self._on_next_lost(key[0], why),
            )
        held.next_link.send(self._outbox.pop(key))

    def _close_next_link(self, epoch: Epoch) -> None:
        """Who sent the epoch's steps is gone, so none comes any more: the next stage's worker is free for others."""
        held = self._held
        if held is None or held.load.assignment.epoch != epoch or held.next_link is None:
            return
        link, held.next_link = held.next_link, None
        self._spawn(link.close())

    def _on_next_reply(self, reply: StepReply) -> None:
        if isinstance(reply, StepTrouble):
            self._reply(reply)

    def _on_next_lost(self, epoch: Epoch, lost: ShardwrightError) -> None:
        self._errors.add(type(lost))
        held = self._held
        if held is None or held.load.assignment.epoch != epoch:
            return
        self._lost_next = held.load.assignment.next_worker_id
        self._handle(NextLinkLost(epoch=epoch, reason=str(lost)))

    def _publish(self, key: StepKey) -> None:
        held = self._held
        assert held is not None, "only a held stage publishes"
        computed = self._outbox.pop(key)
        result = StepResult(epoch=key[0], step=key[1], tokens=computed.tokens, prompt_scores=computed.prompt_scores)
        held.results.put_nowait((result, computed.transit))


def _num_bytes(frames: tuple[TensorFrame, ...]) -> int:
    total = 0
    for frame in frames:  # a sum over a generator takes three times as long for one frame
        total += memoryview(frame.data).nbytes
    return total
