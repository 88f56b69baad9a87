"""The master's shell: an `Engine` that carries out what `MasterState` decides.

Events come from clients, worker replies and timers; each goes into the core on the event loop and its effects are
done at once or as tasks. The shell holds no decision of its own: what it knows beyond the core is only whom to
answer and which stream is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Self, assert_never

from shardwright.core.effects import (
    AssignStage,
    ClosePipeline,
    DeployFailed,
    EmitPromptScores,
    EmitToken,
    Finish,
    MasterEffect,
    OpenPipeline,
    PipelineReady,
    ReleaseStage,
    SendStep,
)
from shardwright.core.events import (
    Abort,
    Deploy,
    Heartbeat,
    MasterEvent,
    PipelineOpened,
    StageLoaded,
    StageLoadFailed,
    StepFailed,
    Submit,
    Tick,
    TokensSampled,
    WorkerJoined,
    WorkerLost,
)
from shardwright.core.master import MasterState
from shardwright.engine import FinishEvent, PromptScoresEvent, RequestEvent, TokenEvent
from shardwright.errors import ClusterError, ShardwrightError, StageLoadError
from shardwright.transport.base import WorkerClient
from shardwright.types import (
    NO_RULES,
    ClusterSnapshot,
    Epoch,
    FinishReason,
    SamplingParams,
    SeqId,
    StageAssignment,
    StepInput,
    StopConditions,
    TokenId,
    TokenRules,
    WorkerCapacity,
    WorkerId,
)
from shardwright.wire.messages import LoadDone, StepMessage, StepTrouble

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0

StageLoader = Callable[[StageAssignment, WorkerClient], Awaitable[LoadDone]]
"""Sends a worker its stage and weights; raises `StageLoadError` when it refuses, `ClusterError` when it is gone."""


class _StepLink:
    """The streams of one epoch's pipeline: steps to the first stage, tokens from the last."""

    def __init__(self, epoch: Epoch, first: WorkerId, last: WorkerId) -> None:
        self.epoch = epoch
        self.first = first
        self.last = last
        self.outgoing: asyncio.Queue[StepInput | None] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []

    async def messages(self) -> AsyncIterator[StepMessage]:
        """What goes to the first stage, until the link is closed."""
        while (step := await self.outgoing.get()) is not None:
            yield StepMessage(step=step)


class MasterEngine:
    """Implements `engine.Engine` over a set of connected workers. Use as `async with`; closes what it opened."""

    def __init__(
        self,
        state: MasterState,
        workers: Mapping[WorkerId, WorkerClient],
        load_stage: StageLoader,
        *,
        heartbeat_interval_s: float,
        heartbeat_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._workers = dict(workers)
        self._load_stage = load_stage
        self._heartbeat_interval_s = heartbeat_interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._now = clock
        self._seq_ids = itertools.count(1)
        self._clients: dict[SeqId, asyncio.Queue[RequestEvent]] = {}
        self._link: _StepLink | None = None
        self._loaded: dict[WorkerId, LoadDone] = {}
        self._assigned: dict[WorkerId, Epoch] = {}
        self._ready: asyncio.Future[tuple[StageAssignment, ...]] | None = None
        self._load_error: ShardwrightError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._closed = False
        self._events_due: deque[MasterEvent] = deque()

    # --- life --------------------------------------------------------------------------------------

    async def deploy(self, capacities: tuple[WorkerCapacity, ...]) -> tuple[StageAssignment, ...]:
        """Place the model on these workers, load every stage, and wait until the pipeline takes steps.

        Raises the error that stopped it: `StageLoadError`, `WorkerLostError` or `ClusterError` with the core's reason.
        """
        self._ready = asyncio.get_running_loop().create_future()
        for capacity in capacities:
            self._handle(WorkerJoined(capacity=capacity))
            self._spawn(self._watch(capacity.worker_id), f"heartbeat of {capacity.worker_id}")
        self._handle(Deploy())
        return await self._ready

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Release the workers, end every open request with ABORT, and stop all tasks. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for seq_id in tuple(self._clients):
            self._finish(FinishEvent(seq_id=seq_id, reason=FinishReason.ABORT, message="the master is closing"))
        link, self._link = self._link, None
        if link is not None:
            await self._close_link(link)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._release(worker, epoch) for worker, epoch in self._assigned.items()))

    # --- Engine ------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: tuple[TokenId, ...],
        sampling: SamplingParams,
        stop: StopConditions,
        *,
        rules: TokenRules = NO_RULES,
        num_prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[SeqId, AsyncIterator[RequestEvent]]:
        """Queue a prompt; its events come from the iterator, which ends after the `FinishEvent`."""
        if self._closed:
            raise ClusterError("the master is closed")
        if self._crash is not None:
            raise ClusterError(f"the master failed: {self._crash}") from self._crash
        seq_id = next(self._seq_ids)
        events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._clients[seq_id] = events
        self._handle(
            Submit(
                seq_id=seq_id,
                prompt=prompt,
                sampling=sampling,
                stop=stop,
                rules=rules,
                num_prompt_logprobs=num_prompt_logprobs,
                timeout_s=timeout_s,
            )
        )
        return seq_id, self._events(seq_id, events)

    async def abort(self, seq_id: SeqId) -> None:
        """Stop a request; unknown and finished ones are ignored."""
        if not self._closed:
            self._handle(Abort(seq_id=seq_id))

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        return self._state.snapshot()

    @property
    def loaded(self) -> Mapping[WorkerId, LoadDone]:
        """What each worker of the present pipeline said when its stage was built."""
        return self._loaded

    async def refresh(self) -> None:
        """Ask every worker for a heartbeat now, so that the next snapshot is fresh."""
        await asyncio.gather(*(self._beat(worker_id) for worker_id in self._workers))

    async def _events(self, seq_id: SeqId, events: asyncio.Queue[RequestEvent]) -> AsyncIterator[RequestEvent]:
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = isinstance(event, FinishEvent)
                yield event
        finally:
            if not finished:  # the reader gave up: so does the request
                await self.abort(seq_id)

    # --- core --------------------------------------------------------------------------------------

    def _handle(self, event: MasterEvent) -> None:
        if self._closed and not isinstance(event, Heartbeat):
            return
        self._events_due.append(event)
        if len(self._events_due) > 1:
            return  # an effect of the event that is being handled led here: its other effects come first
        while self._events_due:
            for effect in self._state.handle(self._events_due[0], self._now()):
                self._apply(effect)
            self._events_due.popleft()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._state.next_deadline()
        if deadline is not None and not self._closed:
            delay = max(0.0, deadline - self._now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer, deadline)

    def _on_timer(self, deadline: float) -> None:
        """The core's deadline is here. If this process itself was held up, workers' answers may wait unread: first
        give the event loop time to read them, or they would be called lost for the master's own slowness.
        """
        if self._now() - deadline > self._heartbeat_interval_s:
            again = self._now() + 2 * self._heartbeat_interval_s
            self._timer = asyncio.get_running_loop().call_at(
                asyncio.get_running_loop().time() + 2 * self._heartbeat_interval_s, self._on_timer, again
            )
            return
        self._handle(Tick())

    def _apply(self, effect: MasterEffect) -> None:
        match effect:
            case AssignStage():
                self._assigned[effect.assignment.worker_id] = effect.assignment.epoch
                self._spawn(self._load(effect.assignment), f"load {effect.assignment.worker_id}")
            case ReleaseStage():
                self._spawn(self._release(effect.worker_id, effect.epoch), f"release {effect.worker_id}")
            case OpenPipeline():
                self._open_link(effect)
            case ClosePipeline():
                link, self._link = self._link, None
                if link is not None:
                    self._spawn(self._close_link(link), f"close epoch {effect.epoch}")
            case PipelineReady():
                log.info("pipeline of epoch %d is ready: %d stages", effect.epoch, len(effect.stages))
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(effect.stages)
            case DeployFailed():
                self._fail(effect.reason)
            case SendStep():
                assert self._link is not None, "steps are sent only on an open pipeline"
                self._link.outgoing.put_nowait(effect.step)
            case EmitToken():
                event = TokenEvent(
                    seq_id=effect.seq_id,
                    index=effect.index,
                    token_id=effect.token_id,
                    logprob=effect.logprob,
                    top=effect.top,
                )
                self._clients[effect.seq_id].put_nowait(event)
            case EmitPromptScores():
                self._clients[effect.seq_id].put_nowait(PromptScoresEvent(seq_id=effect.seq_id, scores=effect.scores))
            case Finish():
                self._finish(
                    FinishEvent(
                        seq_id=effect.seq_id,
                        reason=effect.reason,
                        message=effect.message,
                        num_cached_tokens=effect.num_cached_tokens,
                    )
                )
            case _:
                assert_never(effect)

    def _finish(self, event: FinishEvent) -> None:
        queue = self._clients.pop(event.seq_id, None)
        if queue is not None:
            queue.put_nowait(event)

    def _fail(self, reason: str) -> None:
        log.error("the pipeline failed: %s", reason)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(self._load_error or ClusterError(reason))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """A task that ends with an exception is a bug here; every client hears of it instead of waiting for ever."""
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        self._crash = task.exception()
        log.critical("%s crashed", task.get_name(), exc_info=self._crash)
        reason = f"internal error in {task.get_name()}: {self._crash!r}"
        self._fail(reason)
        for seq_id in tuple(self._clients):
            self._finish(FinishEvent(seq_id=seq_id, reason=FinishReason.ERROR, message=reason))

    # --- workers -----------------------------------------------------------------------------------

    async def _load(self, assignment: StageAssignment) -> None:
        worker_id = assignment.worker_id
        try:
            done = await self._load_stage(assignment, self._workers[worker_id])
        except StageLoadError as exc:
            self._load_error = exc
            self._handle(StageLoadFailed(worker_id=worker_id, epoch=assignment.epoch, reason=str(exc)))
        except ClusterError as exc:
            self._load_error = exc
            self._handle(WorkerLost(worker_id=worker_id, reason=str(exc)))
        except ShardwrightError as exc:
            self._load_error = exc
            self._handle(StageLoadFailed(worker_id=worker_id, epoch=assignment.epoch, reason=str(exc)))
        else:
            self._loaded[worker_id] = done
            self._handle(StageLoaded(worker_id=worker_id, epoch=assignment.epoch))

    async def _release(self, worker_id: WorkerId, epoch: Epoch) -> None:
        if self._assigned.get(worker_id) == epoch and not self._closed:
            del self._assigned[worker_id]
        with contextlib.suppress(ShardwrightError):  # a worker that is gone holds nothing
            await self._workers[worker_id].release(epoch, timeout_s=RELEASE_TIMEOUT_S)

    async def _watch(self, worker_id: WorkerId) -> None:
        alive = True
        while alive:
            alive = await self._beat(worker_id)
            await asyncio.sleep(self._heartbeat_interval_s)

    async def _beat(self, worker_id: WorkerId) -> bool:
        """One heartbeat; False when the worker is known to be gone. A slow answer is left to the core's deadline."""
        try:
            report = await self._workers[worker_id].heartbeat(timeout_s=self._heartbeat_timeout_s)
        except ShardwrightError as exc:
            self._handle(WorkerLost(worker_id=worker_id, reason=str(exc)))
            return False
        self._handle(Heartbeat(worker_id=worker_id, report=report))
        return True

    # --- pipeline ----------------------------------------------------------------------------------

    def _open_link(self, effect: OpenPipeline) -> None:
        link = _StepLink(effect.epoch, effect.stages[0].worker_id, effect.stages[-1].worker_id)
        self._link = link
        link.tasks = [
            self._spawn(self._run_steps(link), f"steps of epoch {link.epoch}"),
            self._spawn(self._run_tokens(link), f"tokens of epoch {link.epoch}"),
        ]
        self._handle(PipelineOpened(epoch=effect.epoch))

    async def _run_steps(self, link: _StepLink) -> None:
        try:
            async for reply in self._workers[link.first].process_layers(link.messages()):
                if isinstance(reply, StepTrouble):
                    self._on_trouble(reply)
            reason = "it closed the step link"
        except ShardwrightError as exc:
            reason = str(exc)
        if self._link is link:
            self._handle(WorkerLost(worker_id=link.first, reason=reason))

    def _on_trouble(self, trouble: StepTrouble) -> None:
        if trouble.link_lost:
            self._handle(WorkerLost(worker_id=trouble.worker_id, reason=trouble.reason))
            return
        self._handle(
            StepFailed(epoch=trouble.epoch, step=trouble.step, worker_id=trouble.worker_id, reason=trouble.reason)
        )

    async def _run_tokens(self, link: _StepLink) -> None:
        try:
            async for result in self._workers[link.last].tokens(link.epoch):
                self._handle(TokensSampled(epoch=result.epoch, step=result.step, tokens=result.tokens))
            reason = "it closed the token stream"
        except ShardwrightError as exc:
            reason = str(exc)
        if self._link is link:
            self._handle(WorkerLost(worker_id=link.last, reason=reason))

    async def _close_link(self, link: _StepLink) -> None:
        link.outgoing.put_nowait(None)
        current = asyncio.current_task()
        tasks = [task for task in link.tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
