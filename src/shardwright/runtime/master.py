"""The master's shell: an `Engine` that carries out what `MasterState` decides.

Events come from clients, worker replies and timers; each goes into the core on the event loop and its effects are
done at once or as tasks. The shell holds no decision of its own: what it knows beyond the core is only whom to
answer and which stream is open.

Clients get what one event brought them in one piece, in the loop's next turn: the steps that follow go out first, and
a token costs no task and no queue of its own. What a client has not read waits in its mailbox, at most its
`max_new_tokens`, its prompt's scores and one end; a slow reader holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
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
from shardwright.errors import ClusterError, QueueFullError, ShardwrightError, StageLoadError
from shardwright.runtime.mailbox import Mailbox, MailReader
from shardwright.runtime.observatory import HISTORY_S, MasterObservatory
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
    WorkerDescription,
    WorkerId,
)
from shardwright.wire.messages import LoadDone, StepMessage, StepTrouble

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0

StageLoader = Callable[[StageAssignment, WorkerClient], Awaitable[LoadDone]]
"""Sends a worker its stage and weights; raises `StageLoadError` when it refuses, `ClusterError` when it is gone."""


Introducer = Callable[[WorkerId, WorkerClient], Awaitable[WorkerDescription]]
"""Asks a worker that is not there (any more) who it is; raises a `ShardwrightError` while it can't be used."""


Sink = Callable[[Sequence[RequestEvent]], None]
"""Takes the events that one moment brought a request, in order. Must not raise, and must not take long."""


class _Client:
    """Who asked for a sequence, and what it has not been told yet."""

    __slots__ = ("events", "has_all", "sink")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.has_all = False  # what it wanted, also if the sequence could have gone on
        self.events: list[RequestEvent] = []


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
        history_interval_s: float = 5.0,
        history_s: float = HISTORY_S,
        introduce: Introducer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `introduce`, workers that are lost, or were not there at `deploy`, are asked again and again."""
        self._state = state
        self._workers = dict(workers)
        self._load_stage = load_stage
        self._introduce = introduce
        self._heartbeat_interval_s = heartbeat_interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._history_interval_s = history_interval_s
        self._clock = clock
        self._last_seen = clock()
        self._held_up_s = 0.0
        self._seq_ids = itertools.count(1)
        self._clients: dict[SeqId, _Client] = {}
        self._to_tell: deque[_Client] = deque()  # clients with events that they were not told yet
        self._is_telling = False
        self._refusal: Finish | None = None  # of the request that is being submitted
        self._failure: str | None = None  # why there is no pipeline any more
        self._link: _StepLink | None = None
        self._loaded: dict[WorkerId, LoadDone] = {}
        self._assigned: dict[WorkerId, Epoch] = {}
        self._loads: dict[WorkerId, asyncio.Task[None]] = {}
        self._watched: set[WorkerId] = set()
        self._num_joins: Counter[WorkerId] = Counter()
        self._away: dict[WorkerId, str] = {}  # why a worker that was asked could not join: told once
        self._recovering_from = ""
        self._ready: asyncio.Future[tuple[StageAssignment, ...]] | None = None
        self._load_error: ShardwrightError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0  # on the core's clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._closed = False
        self._events_due: deque[MasterEvent] = deque()
        self._look_timer: asyncio.TimerHandle | None = None
        self.observatory = MasterObservatory(
            self,
            addresses={worker_id: client.address for worker_id, client in workers.items()},
            model_name=state.costs.name,
            num_layers=state.costs.num_layers,
            clock=clock,
            history_s=history_s,
        )

    # --- life --------------------------------------------------------------------------------------

    async def deploy(self, capacities: tuple[WorkerCapacity, ...]) -> tuple[StageAssignment, ...]:
        """Place the model on these workers, load every stage, and wait until the pipeline takes steps.

        Raises the error that stopped it: `StageLoadError`, `WorkerLostError` or `ClusterError` with the core's reason.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._failure = None
        if self._look_timer is None:
            self._look()
        for capacity in capacities:
            self.observatory.worker_joined(capacity)
            self._num_joins[capacity.worker_id] += 1
            self._handle(WorkerJoined(capacity=capacity))
        self._handle(Deploy())
        for index, worker_id in enumerate(self._workers):
            is_wanted = self._introduce is not None or self._state.is_there(worker_id)
            if is_wanted and worker_id not in self._watched:
                self._watched.add(worker_id)
                apart_s = self._heartbeat_interval_s * index / len(self._workers)
                self._spawn(self._watch(worker_id, apart_s=apart_s), f"heartbeat of {worker_id}")
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
        for timer in (self._timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        for seq_id in tuple(self._clients):
            self._finish(FinishEvent(seq_id=seq_id, reason=FinishReason.ABORT, message="the master is closing"))
        self._tell_clients()
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
        """Queue a prompt; its events come from the iterator, which ends after the `FinishEvent`.

        Closing the iterator (`aclose`), cancelling the task that waits for it, or dropping it aborts the request.
        Raises `QueueFullError` when too many requests wait, `ClusterError` when there is no pipeline.
        """
        mailbox: Mailbox[RequestEvent] = Mailbox()

        def tell(events: Sequence[RequestEvent]) -> None:
            for event in events:
                mailbox.put(event)
                if isinstance(event, FinishEvent):
                    mailbox.close()

        seq_id = self.start(
            prompt, sampling, stop, tell, rules=rules, num_prompt_logprobs=num_prompt_logprobs, timeout_s=timeout_s
        )
        return seq_id, MailReader(mailbox, functools.partial(self.cancel, seq_id))

    def start(
        self,
        prompt: tuple[TokenId, ...],
        sampling: SamplingParams,
        stop: StopConditions,
        sink: Sink,
        *,
        rules: TokenRules = NO_RULES,
        num_prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> SeqId:
        """Queue a prompt whose events go to `sink`, from the loop's next turn on; the last is a `FinishEvent`.

        Raises as `submit` does.
        """
        if self._closed:
            raise ClusterError("the master is closed")
        if self._crash is not None:
            raise ClusterError(f"the master failed: {self._crash}") from self._crash
        if self._failure is not None:
            raise ClusterError(self._failure)
        assert not self._events_due, "requests come from clients, not out of the core"
        seq_id = next(self._seq_ids)
        self._clients[seq_id] = _Client(sink)
        self.observatory.submitted(seq_id, len(prompt), self._clock())
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
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise QueueFullError(refusal.message, retry_after_s=refusal.retry_after_s)
        return seq_id

    async def abort(self, seq_id: SeqId) -> None:
        """Stop a request; unknown and finished ones are ignored."""
        self.cancel(seq_id)

    def cancel(self, seq_id: SeqId, *, has_all: bool = False) -> None:
        """Stop a request, at once; unknown and finished ones are ignored.

        `has_all`: its answer is complete (a stop string was found), so that it is observed as one that stopped.
        """
        client = self._clients.get(seq_id)
        if client is not None:
            client.has_all = has_all
            self._handle(Abort(seq_id=seq_id))

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        return self._state.snapshot()

    def is_ready(self) -> bool:
        """Whether a real token went through the real pipeline lately."""
        return not self._closed and self._crash is None and self._state.is_ready(self._now())

    def num_preemptions(self, seq_id: SeqId) -> int:
        """How often an open request gave its KV blocks up so far; 0 for one that is not open."""
        return self._state.num_preemptions(seq_id)

    @property
    def failure(self) -> str:
        """Why no request can be answered; empty while there is a pipeline."""
        return f"the master failed: {self._crash}" if self._crash is not None else self._failure or ""

    @property
    def loaded(self) -> Mapping[WorkerId, LoadDone]:
        """What each worker of the present pipeline said when its stage was built."""
        return self._loaded

    async def refresh(self) -> None:
        """Ask every worker for a heartbeat now, so that the next snapshot is fresh."""
        there = [worker_id for worker_id in self._workers if self._state.is_there(worker_id)]
        await asyncio.gather(*(self._beat(worker_id) for worker_id in there))

    # --- core --------------------------------------------------------------------------------------

    def _handle(self, event: MasterEvent) -> None:
        if self._crash is not None or (self._closed and not isinstance(event, Heartbeat)):
            return
        self._events_due.append(event)
        if len(self._events_due) > 1:
            return  # an effect of the event that is being handled led here: its other effects come first
        try:
            while self._events_due:
                for effect in self._state.handle(self._events_due[0], self._now()):
                    self._apply(effect)
                self._events_due.popleft()
        except Exception as exc:
            self._events_due.clear()
            self._on_crash(f"handling {type(event).__name__}", exc)
            raise
        self._note_recovery()
        self._tell_soon()
        self._set_timer()

    def _note_recovery(self) -> None:
        """Have the log tell when a recovery begins."""
        reason = self._state.recovering_from
        if reason and reason != self._recovering_from:
            log.warning("%s; the model is placed again, open requests go on when that is done", reason)
        self._recovering_from = reason

    def _now(self) -> float:
        """The core's time: the clock's, less what this event loop was held up (a stopped process, a blocked thread).

        While it is held up, the workers' answers wait unread; if that time counted, they would be called lost for the
        master's own slowness. The timer fires at least once a heartbeat interval, so a longer silence is no idleness.
        """
        clock = self._clock()
        silence = clock - self._last_seen
        self._last_seen = clock
        if silence > 2 * self._heartbeat_interval_s:
            self._held_up_s += silence - self._heartbeat_interval_s
        return clock - self._held_up_s

    def _set_timer(self) -> None:
        """Have the core's deadline kept. A timer that fires before it stays: deadlines move away with every answer."""
        if self._closed:
            return
        now = self._now()
        deadline = self._state.next_deadline()
        due = now + self._heartbeat_interval_s
        if deadline is not None:
            due = min(due, max(now, deadline))
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = asyncio.get_running_loop().call_later(due - now, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        deadline = self._state.next_deadline()
        if deadline is not None and deadline <= self._now():
            self._handle(Tick())
        else:
            self._set_timer()

    def _apply(self, effect: MasterEffect) -> None:
        match effect:
            case AssignStage():
                self._assigned[effect.assignment.worker_id] = effect.assignment.epoch
                self._stop_load(effect.assignment.worker_id)
                self._loads[effect.assignment.worker_id] = self._spawn(
                    self._load(effect.assignment), f"load {effect.assignment.worker_id}"
                )
            case ReleaseStage():
                self._stop_load(effect.worker_id)
                self._spawn(self._release(effect.worker_id, effect.epoch), f"release {effect.worker_id}")
            case OpenPipeline():
                self.observatory.pipeline_opened(effect.epoch, effect.stages)
                self._open_link(effect)
            case ClosePipeline():
                link, self._link = self._link, None
                if link is not None:
                    self._spawn(self._close_link(link), f"close epoch {effect.epoch}")
            case PipelineReady():
                log.info("pipeline of epoch %d is ready: %d stages", effect.epoch, len(effect.stages))
                self._failure = None
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(effect.stages)
            case DeployFailed():
                self._failure = effect.reason
                self._fail(effect.reason)
            case SendStep():
                assert self._link is not None, "steps are sent only on an open pipeline"
                self._link.outgoing.put_nowait(effect.step)
                self.observatory.step_sent(effect.step, self._last_seen)
            case EmitToken():
                self.observatory.token(effect.seq_id, self._last_seen)
                self._tell(
                    self._clients[effect.seq_id],
                    TokenEvent(
                        seq_id=effect.seq_id,
                        index=effect.index,
                        token_id=effect.token_id,
                        logprob=effect.logprob,
                        top=effect.top,
                    ),
                )
            case EmitPromptScores():
                self._tell(self._clients[effect.seq_id], PromptScoresEvent(seq_id=effect.seq_id, scores=effect.scores))
            case Finish(reason=FinishReason.REJECTED):
                del self._clients[effect.seq_id]
                self.observatory.rejected(effect.seq_id)
                self._refusal = effect
            case Finish():
                self._finish(
                    FinishEvent(
                        seq_id=effect.seq_id,
                        reason=effect.reason,
                        message=effect.message,
                        num_cached_tokens=effect.num_cached_tokens,
                    ),
                    num_preemptions=effect.num_preemptions,
                )
            case _:
                assert_never(effect)

    def _finish(self, event: FinishEvent, *, num_preemptions: int = 0) -> None:
        client = self._clients.pop(event.seq_id, None)
        if client is not None:
            reason = FinishReason.STOP if client.has_all and event.reason is FinishReason.ABORT else event.reason
            self.observatory.finished(event.seq_id, reason, self._last_seen, num_preemptions=num_preemptions)
            self._tell(client, event)

    def _tell(self, client: _Client, event: RequestEvent) -> None:
        if not client.events:
            self._to_tell.append(client)
        client.events.append(event)

    def _tell_soon(self) -> None:
        """In the loop's next turn, behind the link's task: the next steps go out before anybody looks at tokens."""
        if self._to_tell and not self._is_telling:
            self._is_telling = True
            asyncio.get_running_loop().call_soon(self._tell_clients)

    def _tell_clients(self) -> None:
        self._is_telling = False
        try:
            while self._to_tell:
                client = self._to_tell.popleft()
                events, client.events = client.events, []
                client.sink(events)
        finally:
            self._tell_soon()  # only after a sink raised: a bug of its own, which the loop reports; the others go on

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
        """A task that ends with an exception is a bug here."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._crash is None:
            self._on_crash(task.get_name(), error)

    def _on_crash(self, what: str, error: BaseException) -> None:
        """A bug here or in the core: every client hears of it instead of waiting for ever, and nothing goes on."""
        self._crash = error
        self.observatory.error(type(error).__name__)
        log.critical("%s crashed", what, exc_info=error)
        reason = f"internal error in {what}: {error!r}"
        self._fail(reason)
        for seq_id in tuple(self._clients):
            self._finish(FinishEvent(seq_id=seq_id, reason=FinishReason.ERROR, message=reason))
        self._tell_soon()

    # --- workers -----------------------------------------------------------------------------------

    def _stop_load(self, worker_id: WorkerId) -> None:
        """What is loaded there is of an older epoch: its end must not be taken for the new one's."""
        task = self._loads.pop(worker_id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _load(self, assignment: StageAssignment) -> None:
        worker_id, num_joins = assignment.worker_id, self._num_joins[assignment.worker_id]
        try:
            done = await self._load_stage(assignment, self._workers[worker_id])
        except StageLoadError as exc:
            self._on_load_error(exc)
            self._handle(StageLoadFailed(worker_id=worker_id, epoch=assignment.epoch, reason=str(exc)))
        except ClusterError as exc:
            self._on_load_error(exc)
            self._lose(worker_id, str(exc), num_joins)
        except ShardwrightError as exc:
            self._on_load_error(exc)
            self._handle(StageLoadFailed(worker_id=worker_id, epoch=assignment.epoch, reason=str(exc)))
        else:
            self._loaded[worker_id] = done
            self._handle(StageLoaded(worker_id=worker_id, epoch=assignment.epoch))

    def _on_load_error(self, error: ShardwrightError) -> None:
        self._load_error = error
        self.observatory.error(type(error).__name__)

    async def _release(self, worker_id: WorkerId, epoch: Epoch) -> None:
        if self._assigned.get(worker_id) == epoch and not self._closed:
            del self._assigned[worker_id]
        with contextlib.suppress(ShardwrightError):  # a worker that is gone holds nothing
            await self._workers[worker_id].release(epoch, timeout_s=RELEASE_TIMEOUT_S)

    def _lose(self, worker_id: WorkerId, reason: str, num_joins: int) -> None:
        """A call to a worker failed; no news if it has joined again since the call began."""
        if num_joins == self._num_joins[worker_id]:
            self._handle(WorkerLost(worker_id=worker_id, reason=reason))

    async def _watch(self, worker_id: WorkerId, *, apart_s: float) -> None:
        """Beat once in each interval; all but the first time so much later, since all workers' first beats are at once.

        What a heartbeat costs, here and there, would otherwise come to one and the same step.
        """
        while True:
            if self._state.is_there(worker_id):
                await self._beat(worker_id)
            elif self._introduce is not None:
                await self._take_back(worker_id, self._introduce)
            else:
                return
            await asyncio.sleep(self._heartbeat_interval_s + apart_s)
            apart_s = 0.0

    async def _take_back(self, worker_id: WorkerId, introduce: Introducer) -> None:
        """Ask a worker that is lost, or was never there, whether it can be used (again)."""
        client = self._workers[worker_id]
        try:
            description = await introduce(worker_id, client)
            held = self._assigned.get(worker_id)
            if held is not None:  # what it held, if it still does, is of an epoch that is over
                await client.release(held, timeout_s=RELEASE_TIMEOUT_S)
        except ShardwrightError as exc:
            if self._away.get(worker_id) != type(exc).__name__:
                log.info("worker %s can't be used: %s", worker_id, exc)
            self._away[worker_id] = type(exc).__name__
            return
        if self._assigned.get(worker_id) != held:
            return  # it was given a stage meanwhile
        self._assigned.pop(worker_id, None)
        self._away.pop(worker_id, None)
        self._num_joins[worker_id] += 1
        log.warning("worker %s at %s is there again", worker_id, client.address)
        capacity = description.capacity(worker_id)
        self.observatory.worker_described(worker_id, description, client.address)
        self.observatory.worker_joined(capacity)
        self._handle(WorkerJoined(capacity=capacity, last_epoch=description.last_epoch))

    async def _beat(self, worker_id: WorkerId) -> None:
        """One heartbeat. A slow answer is left to the core's deadline."""
        observatory = self.observatory
        num_joins = self._num_joins[worker_id]
        traces_since = observatory.asking(worker_id)
        sent_s = self._clock()
        try:
            report = await self._workers[worker_id].heartbeat(
                timeout_s=self._heartbeat_timeout_s, traces_since=traces_since
            )
        except ShardwrightError as exc:
            observatory.error(type(exc).__name__)
            self._lose(worker_id, str(exc), num_joins)
            return
        finally:
            observatory.asked(worker_id, traces_since)
        report = observatory.heard(
            worker_id, report, sent_s=sent_s, returned_s=self._clock(), traces_since=traces_since
        )
        self._handle(Heartbeat(worker_id=worker_id, report=report))

    def _look(self) -> None:
        """Have a point of the history noted, now and after each interval."""
        self._look_timer = asyncio.get_running_loop().call_later(self._history_interval_s, self._look)
        self.observatory.look()

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
            reason, kind = "it closed the step link", "LinkLostError"
        except ShardwrightError as exc:
            reason, kind = str(exc), type(exc).__name__
        if self._link is link:
            self.observatory.error(kind)
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
                if result.epoch == link.epoch:  # what an older pipeline left is void
                    self.observatory.step_returned(result.epoch, result.step, self._clock())
                self._handle(
                    TokensSampled(
                        epoch=result.epoch, step=result.step, tokens=result.tokens, prompt_scores=result.prompt_scores
                    )
                )
            reason, kind = "it closed the token stream", "LinkLostError"
        except ShardwrightError as exc:
            reason, kind = str(exc), type(exc).__name__
        if self._link is link:
            self.observatory.error(kind)
            self._handle(WorkerLost(worker_id=link.last, reason=reason))

    async def _close_link(self, link: _StepLink) -> None:
        link.outgoing.put_nowait(None)
        current = asyncio.current_task()
        tasks = [task for task in link.tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
