"""A worker's shell: lets the network, the pure core and the compute thread meet.

Knows the order of nothing: `WorkerState` decides what happens next, this module does it. All state lives on the
event loop; only `Stage.forward`, building and disk work run on other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from shardwright.runtime.links import measure_link
from shardwright.runtime.telemetry import StepClock
from shardwright.runtime.tensors import frame_from_tensor, tensor_from_frame
from shardwright.types import (
    VOCABULARY_TENSOR,
    Epoch,
    HeartbeatReport,
    LinkMeasures,
    MachineMeasures,
    PromptScores,
    StageLoad,
    StepId,
    StepTiming,
    TokenOut,
    WorkerDescription,
    WorkerId,
)
from shardwright.wire.messages import (
    LayerResult,
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadProgress,
    LoadRefused,
    LoadReply,
    StepAck,
    StepMessage,
    StepReply,
    StepResult,
    StepTrouble,
)

if TYPE_CHECKING:
    from shardwright.model.stage import Stage
    from shardwright.runtime.measure import Speed
    from shardwright.runtime.weight_receiver import ReceivedTensors
    from shardwright.transport.base import Transport, WorkerClient

log = logging.getLogger(__name__)

LINK_WINDOW = 32
"""Most steps sent to the next stage without an acknowledgement; the master keeps fewer in flight."""

ACK_INTERVAL = LINK_WINDOW // 4
"""Steps for which one acknowledgement goes back: each would wake a process whose cores the next stage now uses."""

PROGRESS_INTERVAL_S = 0.1

StepKey = tuple[Epoch, StepId]


class _BuildStopped(Exception):  # noqa: N818  not an error: nobody wants the stage any more
    """Ends the building of a stage between two tensors."""


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
class _ComputedStep:
    """What a step's computation left behind, waiting to be sent on."""

    message: StepMessage  # for the next stage: the step as it came, with this stage's tensors
    tokens: tuple[TokenOut, ...]
    prompt_scores: tuple[PromptScores, ...]


@dataclass(slots=True)
class _HeldStage:
    """One epoch's stage with everything that lives as long as it does."""

    load: StageLoad
    stage: Stage
    clock: StepClock
    loaded_at: float
    results: asyncio.Queue[StepResult | None] = field(default_factory=asyncio.Queue)
    next_link: _NextLink | None = None


class _NextLink:
    """The step link to the next stage: sends what is queued while credits last, passes replies on."""

    def __init__(
        self, client: WorkerClient, on_reply: Callable[[StepReply], None], on_lost: Callable[[str], None]
    ) -> None:
        self._client = client
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._queue: asyncio.Queue[StepMessage | None] = asyncio.Queue()
        self._credits = asyncio.Semaphore(LINK_WINDOW)
        self._acknowledged: StepId = 0
        self._closing = False
        self._task = asyncio.create_task(self._run(), name=f"link to {client.address}")

    def send(self, message: StepMessage) -> None:
        """Queue a step; the master bounds how many there can be."""
        self._queue.put_nowait(message)

    async def _outgoing(self) -> AsyncIterator[StepMessage]:
        while (message := await self._queue.get()) is not None:
            await self._credits.acquire()
            yield message

    async def _run(self) -> None:
        try:
            async for reply in self._client.process_layers(self._outgoing()):
                if isinstance(reply, StepAck):
                    self._take_credits(reply.step)
                self._on_reply(reply)
            reason = f"{self._client.address} closed the step link"
        except ShardwrightError as exc:
            reason = str(exc)
        if not self._closing:
            self._on_lost(reason)

    def _take_credits(self, step: StepId) -> None:
        """Steps are numbered from 1 without a gap: one credit for each since the last acknowledgement."""
        for _ in range(self._acknowledged, step):
            self._credits.release()
        self._acknowledged = max(self._acknowledged, step)

    async def close(self) -> None:
        """End the stream and the connection; what is still queued is void."""
        self._closing = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._client.close()


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._num_threads = num_threads
        self._threads_set = 0
        self._probe = probe
        self._receiver = receiver
        self._transport = transport
        self._now = clock
        self._state = WorkerState()
        self._held: _HeldStage | None = None
        self._inbox: dict[StepKey, StepMessage] = {}
        self._outbox: dict[StepKey, _ComputedStep] = {}
        self._senders: dict[Epoch, asyncio.Queue[StepReply | None]] = {}  # the link of the epoch's steps
        self._load_starts: dict[Epoch, asyncio.Event] = {}
        self._is_duplicate = False  # the step that arrives now is still in the inbox from its first arrival
        self._lost_next: WorkerId | None = None  # the next stage's worker, once the link to it is gone
        self._interrupted: Epoch | None = None  # a load whose call broke: the master may take it up again
        self._open_links = 0
        self._compute = compute
        self._stop_build = threading.Event()  # of the load that goes on now, if one does
        self._tasks: set[asyncio.Task[None]] = set()
        self._measuring = asyncio.Lock()
        self._closed = False

    # --- service -----------------------------------------------------------------------------------

    async def describe(self) -> WorkerDescription:
        """Who this worker is and what it measured."""
        held = self._held
        stage_bytes = held.stage.weight_bytes + held.stage.kv_bytes if held else 0
        about = await asyncio.to_thread(self._probe.describe, stage_bytes=stage_bytes)
        return replace(about, last_epoch=self._state.last_epoch, in_use=self._open_links > 0)

    async def heartbeat(self, traces_since: int | None = None) -> HeartbeatReport:
        """The worker's state now; the machine is asked off the event loop, since NVML may be slow."""
        del traces_since
        held = self._held
        counters = held.clock.take() if held else None
        return await asyncio.to_thread(
            self._probe.report,
            epoch=held.load.assignment.epoch if held else 0,
            queue_depth=self._state.queue_depth,
            steps_done=counters.steps_done if counters else 0,
            busy_s=counters.busy_s if counters else 0.0,
            uptime_s=self._now() - held.loaded_at if held else 0.0,
            timings=counters.timings if counters else (),
        )

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
            num_threads=self._num_threads,
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
        computed = await asyncio.get_running_loop().run_in_executor(self._compute, self._forward, held, message)
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
            while (result := await held.results.get()) is not None:
                yield result
        finally:
            self._open_links -= 1

    async def close(self) -> None:
        """End links, compute and stage. The listener is closed before."""
        self._closed = True
        self._stop_build.set()
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
            if not await self._begin_load(load, replies):
                return
            raw = await self._receiver.receive(load, incoming, replies.put)
            stage = await self._build(load, raw, replies)
            self._lost_next = None
            self._held = _HeldStage(load=load, stage=stage, clock=StepClock(), loaded_at=self._now())
            self._handle(LoadFinished(epoch=epoch))
            if self._state.epoch != epoch:  # replaced or released while it was built
                await replies.put(LoadRefused(reason=f"epoch {epoch} was given up while its stage was built"))
                return
            await replies.put(
                LoadDone(weight_bytes=stage.weight_bytes, kv_bytes=stage.kv_bytes, load_s=self._now() - began)
            )
        except LinkLostError:
            self._interrupted = epoch  # the master will call again, or is gone; what arrived stays in the cache
        except Exception as exc:  # the top of the load's task: whatever went wrong becomes an event
            reason = str(exc) or type(exc).__name__
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
        if self._state.phase is StagePhase.LOADING and self._state.assignment == load.assignment:
            return True  # the same load over a new connection; the receiver ends what the old one still does
        if interrupted is not None:
            self._handle(LoadFailed(epoch=interrupted, reason="the master went on to another epoch"))
        last = self._state.last_epoch
        if epoch <= last:
            reason = f"epoch {epoch} is not newer than {last}, which this worker has seen: another master uses it"
            await replies.put(LoadRefused(reason=reason))
            return False
        start = self._load_starts.setdefault(epoch, asyncio.Event())
        try:
            self._handle(Assigned(assignment=load.assignment))
            await start.wait()
        finally:
            self._load_starts.pop(epoch, None)
        return True

    async def _build(self, load: StageLoad, raw: ReceivedTensors, replies: asyncio.Queue[LoadReply | None]) -> Stage:
        loop = asyncio.get_running_loop()
        weights = raw.without(VOCABULARY_TENSOR)
        total = sum(spec.num_bytes for spec in weights.specs.values())

        told_at = -PROGRESS_INTERVAL_S
        self._stop_build = stop = threading.Event()

        def progress(done: int) -> None:
            nonlocal told_at
            if stop.is_set():
                raise _BuildStopped
            now = self._now()
            if now - told_at < PROGRESS_INTERVAL_S and done < total:
                return
            told_at = now
            message = LoadProgress(phase="build", done_bytes=min(done, total), total_bytes=total)
            loop.call_soon_threadsafe(replies.put_nowait, message)

        def build() -> Stage:
            from shardwright.model.stage import build_stage  # here: it takes seconds, and heartbeats are answered

            self._set_threads(self._num_threads)
            vocabulary = bytes(raw.read(VOCABULARY_TENSOR)) if VOCABULARY_TENSOR in raw.specs else None
            return build_stage(
                config_json=load.model_config,
                layers=load.assignment.layers,
                is_first=load.assignment.is_first,
                is_last=load.assignment.is_last,
                dtype=load.dtype,
                device=self._device,
                num_blocks=load.assignment.num_blocks,
                block_size=load.assignment.block_size,
                raw=weights,
                vocabulary=vocabulary,
                progress=progress,
            )

        try:
            return await loop.run_in_executor(self._compute, build)
        except asyncio.CancelledError:
            stop.set()  # or two stages would be in memory once the next is built
            raise

    def _unload(self, epoch: Epoch) -> None:
        held = self._held
        if held is None or held.load.assignment.epoch != epoch:
            return
        self._held = None
        self._spawn(self._drop(held))

    async def _drop(self, held: _HeldStage) -> None:
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
                key = (message.step.epoch, message.step.step)
                self._is_duplicate = key in self._inbox
                self._inbox.setdefault(key, message)
                self._senders[key[0]] = replies
                self._handle(StepArrived(epoch=key[0], step=key[1]))
        except LinkLostError as exc:
            log.info("a step link broke: %s", exc)
        finally:
            replies.put_nowait(None)

    def _start_compute(self, key: StepKey) -> None:
        held = self._held
        message = self._inbox.pop(key)
        assert held is not None, "a step is computed only while a stage is held"
        loop = asyncio.get_running_loop()

        def tell(future: Future[_ComputedStep]) -> None:
            """Called on the compute thread, or by `close` for a step that it never came to."""
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody wants the step any more
                loop.call_soon_threadsafe(self._on_computed, key, future)

        # Straight to the thread and straight back: a task in between would cost a turn of the loop at each end.
        self._compute.submit(self._forward, held, message).add_done_callback(tell)

    def _on_computed(self, key: StepKey, future: Future[_ComputedStep]) -> None:
        if self._closed:
            return
        exc = future.exception()  # the top of the step: whatever went wrong becomes an event
        if exc is not None:
            log.error("step %d of epoch %d failed", key[1], key[0], exc_info=exc)
            self._handle(StepErrored(epoch=key[0], step=key[1], reason=f"{type(exc).__name__}: {exc}"))
            return
        self._outbox[key] = future.result()
        self._handle(StepComputed(epoch=key[0], step=key[1]))
        self._forget(key)

    def _forward(self, held: _HeldStage, message: StepMessage) -> _ComputedStep:
        """Runs on the compute thread."""
        began = time.perf_counter()
        concurrency = min(message.step.steps_in_flight, held.load.assignment.num_sharing)
        self._set_threads(max(self._num_threads // concurrency, 1))
        tensors = {frame.name: tensor_from_frame(frame) for frame in message.tensors}
        output = held.stage.forward(message.step, tensors)
        frames = tuple(frame_from_tensor(name, tensor) for name, tensor in output.tensors.items())
        held.clock.record(
            num_sequences=len(message.step.slices),
            num_tokens=message.step.num_tokens,
            seconds=time.perf_counter() - began,
            concurrency=concurrency,
        )
        return _ComputedStep(
            message=replace(message, tensors=frames), tokens=output.tokens, prompt_scores=output.prompt_scores
        )

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
            held.next_link = _NextLink(client, self._on_next_reply, lambda why: self._on_next_lost(key[0], why))
        held.next_link.send(self._outbox.pop(key).message)

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

    def _on_next_lost(self, epoch: Epoch, reason: str) -> None:
        held = self._held
        if held is None or held.load.assignment.epoch != epoch:
            return
        self._lost_next = held.load.assignment.next_worker_id
        self._handle(NextLinkLost(epoch=epoch, reason=reason))

    def _publish(self, key: StepKey) -> None:
        held = self._held
        assert held is not None, "only a held stage publishes"
        computed = self._outbox.pop(key)
        held.results.put_nowait(
            StepResult(epoch=key[0], step=key[1], tokens=computed.tokens, prompt_scores=computed.prompt_scores)
        )
