"""The master's whole state: events and time in, effects out. Composes cluster, placement, scheduler and pacing.

Order of the effects that one event gives: what ends (ClosePipeline, ReleaseStage, DeployFailed), then what begins
(AssignStage, OpenPipeline, PipelineReady), then EmitPromptScores, EmitToken and Finish (a request's scores and tokens
before its end), then SendStep with rising numbers. A shell that carries them out in order does nothing out of date.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from typing import assert_never

from shardwright.core.cluster import Cluster, WorkerStatus
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
from shardwright.core.gathering import Gathering
from shardwright.core.liveness import Liveness
from shardwright.core.pacing import Pacing
from shardwright.core.placement import Placement, PlacementSettings, place
from shardwright.core.request_times import Deadlines, Departures
from shardwright.core.scheduler import Ended, Scheduler
from shardwright.core.sequence import Sequence
from shardwright.core.settings import CoreSettings
from shardwright.core.step_budget import ContextCost
from shardwright.errors import PlacementError
from shardwright.types import (
    GREEDY,
    BlockId,
    ClusterSnapshot,
    Epoch,
    FinishReason,
    ModelCosts,
    SeqId,
    SequenceSlice,
    StageAssignment,
    StepId,
    StepInput,
    WorkerId,
    WorkerSnapshot,
)

_MOST_DOUBLINGS = 4
"""Of the time after which a pipeline that was given up is tried again."""


class PipelinePhase(enum.Enum):
    """How far the current epoch's pipeline is."""

    NONE = "none"  # nothing was deployed yet: requests wait
    LOADING = "loading"  # stages are being built
    OPENING = "opening"  # the shell opens the links
    PROBING = "probing"  # the first token is on its way through all stages
    READY = "ready"  # takes steps
    FAILED = "failed"  # no pipeline; requests end at once with the reason


class MasterState:
    """All decisions of one master. The same events in the same order give the same effects."""

    def __init__(self, settings: CoreSettings, costs: ModelCosts) -> None:
        self._settings = settings
        self.costs = costs
        # Probes that run beside requests have a block of their own, on top of what was asked for.
        self._num_probe_blocks = 0 if settings.probe_interval_s is None else 1
        probe_tokens = self._num_probe_blocks * settings.block_size
        self._placement_settings = PlacementSettings(
            block_size=settings.block_size,
            max_kv_tokens=settings.max_kv_tokens + probe_tokens,
            min_kv_tokens=min(settings.min_kv_tokens, settings.max_kv_tokens) + probe_tokens,
            workspace_bytes=settings.workspace_bytes,
            prompt_tokens=settings.typical_prompt_tokens,
            new_tokens=settings.typical_new_tokens,
            num_sequences=settings.typical_num_sequences,
        )
        self._cluster = Cluster(heartbeat_timeout_s=settings.heartbeat_timeout_s)
        self._scheduler = Scheduler(settings, max_context=costs.max_context)
        self._open: dict[SeqId, Sequence] = {}
        self._deadlines = Deadlines(self._open)
        self._departures = Departures()
        self._liveness = Liveness(settings.probe_interval_s)
        self._gathering = Gathering(settings.gather_s)
        self._now = 0.0  # the time of the event that is being handled
        self._phase = PipelinePhase.NONE
        self._epoch = settings.first_epoch - 1
        self._stages: tuple[StageAssignment, ...] = ()
        self._pacing: Pacing | None = None  # of the newest pipeline
        self._last_step: StepId = 0
        self._load_deadline: float | None = None
        self._failure = ""  # why the phase is FAILED
        self._redeploys = 0  # recoveries since a step last finished
        self._cause = ""  # what the last recovery began with
        self._broken_since: float | None = None  # a recovery is under way, or none was possible yet
        self._was_ready = False  # a pipeline was there once: only then is one tried again and again
        self._retry_at: float | None = None
        self._num_retries = 0  # since a step last finished
        self._newest_seen: Epoch = 0  # by any worker
        self._num_recoveries = 0
        self._recovery_s = 0.0
        self._num_recomputed_tokens = 0
        self._finished: Counter[FinishReason] = Counter()
        self._total_output_tokens = 0
        self.placement: Placement | None = None  # the last one made, for people to read

    # --- events ------------------------------------------------------------------------------------

    def handle(self, event: MasterEvent, now: float) -> list[MasterEffect]:
        """Take one event and say what to do, in order. `now` is in seconds on any clock that never goes back."""
        self._now = now
        effects = self._on_event(event, now)
        effects += self._expire(now)
        effects += self._send_steps(now)
        return effects

    def _on_event(self, event: MasterEvent, now: float) -> list[MasterEffect]:
        match event:
            case Submit():
                return self._on_submit(event, now)
            case Abort():
                return self._on_abort(event)
            case WorkerJoined():
                return self._on_joined(event, now)
            case Deploy():
                self._redeploys = 0
                return self._deploy(now, after="")
            case StageLoaded():
                return self._on_loaded(event)
            case StageLoadFailed():
                return self._on_load_failed(event)
            case PipelineOpened():
                return self._on_opened(event)
            case Heartbeat():
                return self._on_heartbeat(event, now)
            case WorkerLost():
                return self._on_worker_lost(event.worker_id, event.reason, now)
            case TokensSampled():
                return self._on_tokens(event, now)
            case StepFailed():
                return self._on_step_failed(event, now)
            case Tick():
                return []
            case _:
                assert_never(event)

    def next_deadline(self) -> float | None:
        """When `handle` must be called again, with a Tick if nothing else happens; None: no need to."""
        deadlines = [
            self._cluster.next_deadline(),
            self._load_deadline,
            self._deadlines.next(),
            self._liveness.next_probe if self._gathering.until is None else self._gathering.until,
            self._retry_at,
        ]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _expire(self, now: float) -> list[MasterEffect]:
        effects: list[MasterEffect] = []
        reason = f"no heartbeat for {self._settings.heartbeat_timeout_s:g} s"
        # All at once: a new pipeline must not be built on a worker that is silent too.
        silent = [worker_id for worker_id in self._cluster.silent(now) if self._cluster.lose(worker_id, reason)]
        if silent:
            effects += self._recover_or_fail(_lost(silent, reason), now)
        if self._load_deadline is not None and self._load_deadline <= now:
            late = [w for w, worker in self._cluster.workers.items() if worker.status is WorkerStatus.LOADING]
            what = f"still loading: {', '.join(late)}" if late else "no token came through the pipeline"
            effects += self._fail(f"the model was not ready after {self._settings.load_timeout_s:g} s ({what})")
        if self._retry_at is not None and self._retry_at <= now:
            effects += self._try_again(now)
        for seq_id in self._deadlines.take_expired(now):
            sequence = self._open[seq_id]
            message = f"the request's {sequence.timeout_s:g} s were over {_reached(sequence)}"
            self._scheduler.end(sequence)
            effects.append(self._finish(sequence, FinishReason.DEADLINE, message))
        return effects

    # --- requests ----------------------------------------------------------------------------------

    def _on_submit(self, event: Submit, now: float) -> list[MasterEffect]:
        assert event.seq_id not in self._open, f"sequence {event.seq_id} was submitted twice"
        sequence = Sequence(
            seq_id=event.seq_id,
            tokens=list(event.prompt),
            num_prompt_tokens=len(event.prompt),
            sampling=event.sampling,
            stop=event.stop,
            rules=event.rules,
            num_prompt_logprobs=event.num_prompt_logprobs,
            timeout_s=event.timeout_s,
        )
        if self._phase is PipelinePhase.FAILED:
            return [self._finish(sequence, FinishReason.ERROR, self._failure)]
        ended = self._scheduler.add(sequence)
        if ended is not None:
            return self._end([ended])
        self._open[sequence.seq_id] = sequence
        if event.timeout_s is not None:
            self._deadlines.add(sequence.seq_id, now + event.timeout_s)
        if self._phase is PipelinePhase.READY and not self._scheduler.running and not self._scheduler.in_flight:
            self._gathering.add(now)
        return []

    def _on_abort(self, event: Abort) -> list[MasterEffect]:
        sequence = self._open.get(event.seq_id)
        if sequence is None:
            return []
        self._scheduler.end(sequence)
        return [self._finish(sequence, FinishReason.ABORT)]

    def _end(self, ended: list[Ended]) -> list[MasterEffect]:
        return [self._finish(verdict.sequence, verdict.reason, verdict.message) for verdict in ended]

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> Finish:
        if self._open.pop(sequence.seq_id, None) is not None:
            self._departures.note(self._now)
        self._finished[reason] += 1
        return Finish(
            seq_id=sequence.seq_id,
            reason=reason,
            message=message,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            retry_after_s=self._departures.turn_away(self._now) if reason is FinishReason.REJECTED else 0.0,
            num_preemptions=sequence.num_preemptions,
        )

    # --- workers -----------------------------------------------------------------------------------

    def _on_joined(self, event: WorkerJoined, now: float) -> list[MasterEffect]:
        worker_id = event.capacity.worker_id
        effects: list[MasterEffect] = []
        if self._cluster.is_holder(worker_id):
            # A worker that introduces itself again has begun anew: the stage that it held is gone.
            effects = self._on_worker_lost(worker_id, "it was started again", now)
        self._cluster.join(event.capacity)
        self._newest_seen = max(self._newest_seen, event.last_epoch)
        if self._phase is PipelinePhase.FAILED and self._heals:
            effects += self._try_again(now)
        return effects

    def _on_heartbeat(self, event: Heartbeat, now: float) -> list[MasterEffect]:
        known = self._cluster.hear(event.worker_id, event.report, now)
        if known and self._pacing is not None and event.report.epoch == self._epoch and event.report.timings:
            self._pacing.heard(event.worker_id, event.report.timings)
        return []

    def _on_worker_lost(self, worker_id: WorkerId, reason: str, now: float) -> list[MasterEffect]:
        if not self._cluster.lose(worker_id, reason):
            return []
        return self._recover_or_fail(_lost([worker_id], reason), now)

    # --- pipelines ---------------------------------------------------------------------------------

    def _deploy(self, now: float, *, after: str) -> list[MasterEffect]:
        """Place the model and begin a new epoch; `after` is what made it necessary, for the message of a failure."""
        try:
            placement = place(self.costs, self._cluster.usable(), self._placement_settings)
        except PlacementError as exc:
            return self._fail(f"{after}{exc}", may_pass=False)
        self.placement = placement
        effects = self._close()
        self._epoch = max(self._epoch, self._newest_seen) + 1
        planned = placement.stages
        devices = [self._device_of(stage.worker_id) for stage in planned]
        self._stages = tuple(
            StageAssignment(
                epoch=self._epoch,
                worker_id=stage.worker_id,
                stage_index=index,
                num_stages=len(planned),
                layers=stage.layers,
                num_blocks=placement.num_blocks,
                block_size=self._settings.block_size,
                next_worker_id=planned[index + 1].worker_id if index + 1 < len(planned) else None,
                num_sharing=devices.count(devices[index]),
                offloaded_layers=stage.offloaded_layers,
            )
            for index, stage in enumerate(planned)
        )
        placed = [stage.worker_id for stage in self._stages]
        # Who has a stage again keeps it until the new assignment arrives: it may keep its weights.
        effects += self._release(worker_id for worker_id in self._cluster.holders() if worker_id not in placed)
        for stage in self._stages:
            self._cluster.assign(stage)
            effects.append(AssignStage(assignment=stage))
        self._phase = PipelinePhase.LOADING
        self._failure = ""
        self._load_deadline = now + self._settings.load_timeout_s
        self._pacing = Pacing(
            self._stages,
            context=ContextCost(self.costs.context_costs),
            token_budget=self._settings.token_budget,
            max_gap_ratio=self._settings.max_gap_ratio,
        )
        self._num_recomputed_tokens += sum(sequence.num_computed_tokens for sequence in self._scheduler.running)
        effects += self._end(self._scheduler.restart(placement.num_blocks - self._num_probe_blocks))
        return effects

    def _close(self) -> list[MasterEffect]:
        """End the current epoch, if it is alive; nothing more is sent under it."""
        alive = self._phase not in {PipelinePhase.NONE, PipelinePhase.FAILED}
        self._phase = PipelinePhase.NONE
        self._stages = ()
        self._load_deadline = None
        self._retry_at = None
        self._last_step = 0
        self._liveness.begin()
        self._gathering.end()
        return [ClosePipeline(epoch=self._epoch)] if alive else []

    def _release(self, worker_ids: Iterable[WorkerId]) -> list[MasterEffect]:
        effects: list[MasterEffect] = []
        for worker_id in worker_ids:
            held = self._cluster.workers[worker_id].assignment
            assert held is not None, f"worker {worker_id} holds nothing"
            self._cluster.release(worker_id)
            effects.append(ReleaseStage(worker_id=worker_id, epoch=held.epoch))
        return effects

    def _fail(self, reason: str, *, may_pass: bool = True) -> list[MasterEffect]:
        """Give up: no pipeline, every open request ends with the reason, and so do new ones until the next Deploy.

        With `recover`, a model that was ready once is placed again when a worker joins, and when some time is over
        (`may_pass`: what stopped it may be gone then, though no worker joins).
        """
        effects = self._close()
        effects += self._release(self._cluster.holders())
        self._phase = PipelinePhase.FAILED
        self._failure = reason
        if may_pass and self._heals:
            wait_s = self._settings.retry_after_s * 2 ** min(self._num_retries, _MOST_DOUBLINGS)
            self._num_retries += 1
            self._retry_at = self._now + wait_s
        effects.append(DeployFailed(reason=reason))
        self._scheduler.restart(0)
        for sequence in list(self._open.values()):
            self._scheduler.end(sequence)
            effects.append(self._finish(sequence, FinishReason.ERROR, reason))
        return effects

    def _recover_or_fail(self, reason: str, now: float) -> list[MasterEffect]:
        if self._broken_since is None:
            self._broken_since = now
        self._cause = reason
        if not self._settings.recover:
            return self._fail(reason)
        if self._redeploys >= self._settings.max_redeploys:
            return self._fail(f"{reason}; gave up after {self._redeploys} recoveries without one finished step")
        self._redeploys += 1
        return self._deploy(now, after=f"{reason}; the model can't be placed again: ")

    @property
    def _heals(self) -> bool:
        return self._settings.recover and self._was_ready

    def _try_again(self, now: float) -> list[MasterEffect]:
        """Place what was given up: a worker has joined since, or some time is over."""
        self._redeploys = 0
        return self._deploy(now, after=f"{self._cause}; the model can't be placed again: " if self._cause else "")

    def _on_loaded(self, event: StageLoaded) -> list[MasterEffect]:
        worker = self._cluster.workers.get(event.worker_id)
        if event.epoch != self._epoch or worker is None or worker.status is not WorkerStatus.LOADING:
            return []
        self._cluster.loaded(event.worker_id)
        if not self._cluster.all_loaded():
            return []
        self._phase = PipelinePhase.OPENING
        return [OpenPipeline(epoch=self._epoch, stages=self._stages)]

    def _on_load_failed(self, event: StageLoadFailed) -> list[MasterEffect]:
        worker = self._cluster.workers.get(event.worker_id)
        if event.epoch != self._epoch or worker is None or worker.status is not WorkerStatus.LOADING:
            return []
        self._cluster.release(event.worker_id)  # it holds no stage: nothing to release on its side
        return self._fail(f"worker {event.worker_id} could not load its stage: {event.reason}")

    def _on_opened(self, event: PipelineOpened) -> list[MasterEffect]:
        if event.epoch == self._epoch and self._phase is PipelinePhase.OPENING:
            self._phase = PipelinePhase.PROBING
        return []

    # --- steps -------------------------------------------------------------------------------------

    def _probe(self, now: float) -> SendStep:
        """One token of the master's own through every stage. Nothing else is on its way."""
        self._last_step += 1
        self._liveness.probe = self._last_step
        probe = SequenceSlice(
            seq_id=0, start_position=0, token_ids=(0,), block_table=(self._probe_block(),), sampling=GREEDY
        )
        dropped = self._scheduler.take_dropped()
        return self._send(StepInput(epoch=self._epoch, step=self._last_step, slices=(probe,), dropped=dropped), now)

    def _probe_block(self) -> BlockId:
        """The last block, which the scheduler's pool does not know.

        Without probes beside requests that is block 0: nobody's yet when a pipeline's first step is sent, and written
        anew before anybody reads it.
        """
        return self._scheduler.pool.num_blocks if self._num_probe_blocks else 0

    def _send(self, step: StepInput, now: float) -> SendStep:
        assert self._pacing is not None, "a pipeline has its pace"
        self._liveness.sent(now)
        self._pacing.sent(step, now)
        return SendStep(worker_id=self._stages[0].worker_id, step=step)

    def _back(self, step: StepId, now: float) -> None:
        assert self._pacing is not None, "a pipeline has its pace"
        self._liveness.back(now)
        self._pacing.back(step, now)

    def _on_tokens(self, event: TokensSampled, now: float) -> list[MasterEffect]:
        if event.epoch != self._epoch or self._phase not in {PipelinePhase.PROBING, PipelinePhase.READY}:
            return []
        if self._liveness.probe is not None:
            return self._on_probe(event, now)
        mismatch = self._scheduler.mismatch(event.step, event.tokens, event.prompt_scores)
        if mismatch is not None:
            return self._recover_or_fail(f"worker {self._stages[-1].worker_id} broke the protocol: {mismatch}", now)
        self._redeploys = 0
        self._num_retries = 0
        self._back(event.step, now)
        effects: list[MasterEffect] = []
        for advance in self._scheduler.complete(event.step, event.tokens, event.prompt_scores):
            sequence, token = advance.sequence, advance.token
            if advance.scores:
                effects.append(EmitPromptScores(seq_id=sequence.seq_id, scores=advance.scores))
            if token is None:
                continue
            self._total_output_tokens += 1
            effects.append(
                EmitToken(
                    seq_id=sequence.seq_id,
                    index=sequence.num_output_tokens - 1,
                    token_id=token.token_id,
                    logprob=token.logprob,
                    top=token.top,
                )
            )
            if advance.finish is not None:
                effects.append(self._finish(sequence, advance.finish))
        return effects

    def _on_probe(self, event: TokensSampled, now: float) -> list[MasterEffect]:
        probe = self._liveness.probe
        if event.step != probe or len(event.tokens) != 1 or event.prompt_scores:
            last = self._stages[-1].worker_id
            what = f"step {event.step} came back with {len(event.tokens)} tokens, expected step {probe} with one"
            return self._recover_or_fail(f"worker {last} broke the protocol: {what}", now)
        self._liveness.probe = None
        self._back(event.step, now)
        if self._phase is PipelinePhase.READY:
            return []
        self._phase = PipelinePhase.READY
        self._load_deadline = None
        self._was_ready = True
        if self._broken_since is not None:
            self._num_recoveries += 1
            self._recovery_s += now - self._broken_since
            self._broken_since = None
        return [PipelineReady(epoch=self._epoch, stages=self._stages)]

    def _on_step_failed(self, event: StepFailed, now: float) -> list[MasterEffect]:
        if event.epoch != self._epoch or self._phase not in {PipelinePhase.PROBING, PipelinePhase.READY}:
            return []
        return self._recover_or_fail(f"worker {event.worker_id} failed at step {event.step}: {event.reason}", now)

    def _send_steps(self, now: float) -> list[MasterEffect]:
        if self._phase is PipelinePhase.PROBING and self._liveness.probe is None:
            return [self._probe(now)]
        if self._phase is not PipelinePhase.READY:
            return []
        assert self._cluster.all_loaded(), "a pipeline takes steps over workers that are not ready"
        assert self._pacing is not None, "a pipeline has its pace"
        if self._gathers(now):
            return []
        effects: list[MasterEffect] = []
        num_groups = self._max_steps_in_flight()
        while len(self._scheduler.in_flight) < num_groups:
            step = self._scheduler.schedule(
                epoch=self._epoch,
                step=self._last_step + 1,
                num_groups=num_groups,
                prompt_budget=self._pacing.prompt_budget,
            )
            if step is None:
                break
            self._last_step = step.step
            effects.append(self._send(step, now))
        probe_at = self._liveness.next_probe
        if probe_at is not None and probe_at <= now:
            effects.append(self._probe(now))
        return effects

    def _gathers(self, now: float) -> bool:
        """Whether the first step of an idle pipeline waits for requests that may come with those that are here."""
        if self._gathering.until is None:
            return False
        waiting = self._scheduler.waiting
        num_tokens = sum(len(sequence.tokens) for sequence in waiting)
        is_enough = num_tokens >= self._settings.token_budget or len(waiting) >= self._settings.max_running
        if not waiting or is_enough:
            self._gathering.end()
        return self._gathering.goes_on(now)

    def _max_steps_in_flight(self) -> int:
        if self._settings.max_steps_in_flight is not None:
            return self._settings.max_steps_in_flight
        return 1 if self._pacing is None else self._pacing.steps_in_flight(self._scheduler.mix())

    def _device_of(self, worker_id: WorkerId) -> tuple[str, str]:
        capacity = self._cluster.workers[worker_id].capacity
        return capacity.host_id, capacity.device

    # --- to look at --------------------------------------------------------------------------------

    def is_ready(self, now: float) -> bool:
        """Whether the pipeline takes steps and a real token came through it lately; false when a step is overdue."""
        return self._phase is PipelinePhase.READY and self._liveness.is_live(now)

    def is_there(self, worker_id: WorkerId) -> bool:
        """Whether a worker has joined and is not lost."""
        return self._cluster.is_there(worker_id)

    @property
    def recovering_from(self) -> str:
        """What a recovery that is under way began with; empty while none is."""
        is_under_way = self._broken_since is not None and self._phase is not PipelinePhase.FAILED
        return self._cause if is_under_way else ""

    def num_preemptions(self, seq_id: SeqId) -> int:
        """How often an open request gave its KV blocks up so far; 0 for one that is not open."""
        sequence = self._open.get(seq_id)
        return 0 if sequence is None else sequence.num_preemptions

    def snapshot(self) -> ClusterSnapshot:
        """Everything that people and metrics may see, frozen."""
        scheduler = self._scheduler
        return ClusterSnapshot(
            epoch=self._epoch,
            ready=self._phase is PipelinePhase.READY,
            stages=self._stages,
            workers=tuple(
                WorkerSnapshot(
                    worker_id=worker_id,
                    status=worker.status.value,
                    layers=worker.assignment.layers if worker.assignment is not None else None,
                    last_heard_s=worker.last_heard_s,
                    report=worker.report,
                    reason=worker.lost_reason,
                )
                for worker_id, worker in self._cluster.workers.items()
            ),
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_steps_in_flight=self._liveness.num_in_flight,
            max_steps_in_flight=self._max_steps_in_flight(),
            total_prompt_tokens=scheduler.total_prompt_tokens,
            total_cached_tokens=scheduler.total_cached_tokens,
            total_output_tokens=self._total_output_tokens,
            total_preemptions=scheduler.total_preemptions,
            max_waiting=self._settings.max_waiting or 0,
            num_cached_blocks=scheduler.pool.num_cached,
            recovering_from=self.recovering_from,
            total_recoveries=self._num_recoveries,
            total_recovery_s=self._recovery_s,
            total_recomputed_tokens=self._num_recomputed_tokens,
            finished=tuple((reason, self._finished[reason]) for reason in FinishReason if self._finished[reason]),
        )

    def check(self) -> None:
        """Assert every invariant of the design; tests call it after each event."""
        self._cluster.check()
        self._scheduler.check(self._open.values())
        queued = [s.seq_id for s in self._scheduler.waiting] + [s.seq_id for s in self._scheduler.running]
        assert sorted(queued) == sorted(self._open), f"open {sorted(self._open)}, queued {sorted(queued)}"
        holders = sorted(self._cluster.holders())
        assert holders == sorted(stage.worker_id for stage in self._stages), f"{holders} hold stages"
        assert self._retry_at is None or self._phase is PipelinePhase.FAILED, "tries again what goes on"
        if self._phase in {PipelinePhase.NONE, PipelinePhase.FAILED}:
            assert not self._stages
            assert not self._open or self._phase is PipelinePhase.NONE
        if self._phase in {PipelinePhase.OPENING, PipelinePhase.PROBING, PipelinePhase.READY}:
            assert self._cluster.all_loaded(), "a pipeline is open over workers that are not ready"
        if self._phase is not PipelinePhase.READY:
            assert not self._scheduler.in_flight, "steps are in flight without a pipeline"
            assert not self._scheduler.running, "sequences run without a pipeline"
        steps = list(self._scheduler.in_flight)
        assert steps == sorted(steps)
        assert not steps or steps[-1] <= self._last_step
        probe = self._liveness.probe
        assert self._liveness.num_in_flight == len(steps) + (probe is not None), f"steps {steps}, probe {probe}"
        assert probe is None or not steps or probe < steps[0], f"steps {steps} overtook probe {probe}"


def _lost(worker_ids: list[WorkerId], reason: str) -> str:
    if len(worker_ids) == 1:
        return f"worker {worker_ids[0]} was lost: {reason}"
    return f"workers {', '.join(worker_ids)} were lost: {reason}"


def _reached(sequence: Sequence) -> str:
    """How far a sequence came, for its client."""
    if sequence.num_output_tokens:
        return f"after {sequence.num_output_tokens} of at most {sequence.stop.max_new_tokens} new tokens"
    if not sequence.has_run:
        return "while it waited in the queue"
    return f"after {sequence.num_computed_tokens} of its prompt's {sequence.num_prompt_tokens} tokens"
