"""The master's observatory: hears what its engine does, and tells people what is going on.

The engine calls the methods of the first part as things happen; they cost a microsecond or two for each step and less
than one for each token. Those of the second part make copies of what is known, for whoever asks. Everything runs on the
event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Protocol

from shardwright.observation import ClusterView, HistoryPoint, LinkView, RequestTrace, StepPassage, WorkerView
from shardwright.runtime.history import History
from shardwright.runtime.metrics import metrics_rows
from shardwright.runtime.request_log import RequestLog
from shardwright.runtime.timeline import Timeline
from shardwright.runtime.tracing import RequestTracer
from shardwright.runtime.worker_watch import ErrorCounts, WorkerWatch
from shardwright.types import (
    ClusterSnapshot,
    Epoch,
    FinishReason,
    HeartbeatReport,
    SeqId,
    StageAssignment,
    StepId,
    StepInput,
    WorkerCapacity,
    WorkerDescription,
    WorkerId,
    WorkerSnapshot,
)
from shardwright.wire.messages import LoadDone

HISTORY_S: Final = 3600.0

_CLOCK_WAS_SET_S: Final = 0.5
"""A system clock that is this far from where it should be was set; smaller steps are left to the next larger one."""


class Observed(Protocol):
    """What the observatory may ask of the engine that it belongs to."""

    def snapshot(self) -> ClusterSnapshot:
        """The core's state."""
        ...

    def is_ready(self) -> bool:
        """Whether a real token went through the pipeline lately."""
        ...

    @property
    def failure(self) -> str:
        """Why no request can be answered."""
        ...

    @property
    def loaded(self) -> Mapping[WorkerId, LoadDone]:
        """What workers said when their stages were built."""
        ...

    def num_preemptions(self, seq_id: SeqId) -> int:
        """How often an open request gave its KV blocks up."""
        ...


class _Finished(Protocol):
    def __call__(self, seq_id: SeqId, reason: FinishReason, now: float, *, num_preemptions: int = 0) -> None: ...


class _WallClock:
    """Turns the master's own clock into times of day that stay in order until somebody sets the system's clock."""

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._offset = wall_clock() - clock()

    def offset(self) -> float:
        """What to add to the master's own time to get seconds since 1970."""
        offset = self._wall_clock() - self._clock()
        if abs(offset - self._offset) > _CLOCK_WAS_SET_S:
            self._offset = offset
        return self._offset


class MasterObservatory:
    """Implements `observation.Observatory` for one `MasterEngine`."""

    def __init__(
        self,
        engine: Observed,
        *,
        addresses: Mapping[WorkerId, str],
        model_name: str,
        num_layers: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] | None = None,
        history_s: float = HISTORY_S,
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._num_layers = num_layers
        self._clock = clock
        self._wall = _WallClock(clock, wall_clock or _wall_clock)
        self._started_at = clock() + self._wall.offset()
        self._timeline = Timeline()
        self._requests = RequestLog()
        self._history = History(kept_s=history_s)
        self._watches = {worker_id: WorkerWatch(address) for worker_id, address in addresses.items()}
        self._errors = ErrorCounts()
        self._lost: set[WorkerId] = set()
        self._num_prompt_tokens = 0  # computed: in steps that came back
        # The engine's hottest calls go to the log directly.
        self.token = self._requests.token
        self.rejected: Callable[[SeqId], None] = self._requests.rejected
        self.submitted: Callable[[SeqId, int, float], None] = self._requests.submitted
        self.finished: _Finished = self._requests.finished

    def trace_with(self, tracer: RequestTracer) -> None:
        """Have every sequence traced that comes from now on."""
        log = self._requests

        def submitted(seq_id: SeqId, num_prompt_tokens: int, now: float) -> None:
            log.submitted(seq_id, num_prompt_tokens, now)
            log.traced(seq_id, tracer.begin(seq_id, now + self._wall.offset()))

        def rejected(seq_id: SeqId) -> None:
            log.rejected(seq_id)
            tracer.refuse(seq_id, self.now())

        def finished(seq_id: SeqId, reason: FinishReason, now: float, *, num_preemptions: int = 0) -> None:
            log.finished(seq_id, reason, now, num_preemptions=num_preemptions)
            tracer.end(seq_id, now + self._wall.offset())

        self.submitted, self.rejected, self.finished = submitted, rejected, finished

    def now(self) -> float:
        """The time of day, by the clock that everything here is told by."""
        return self._clock() + self._wall.offset()

    # --- heard from the engine; `now` is on its clock ----------------------------------------------

    def step_sent(self, step: StepInput, now: float) -> None:
        """A step leaves for the first stage."""
        tracked = self._timeline.sent(step, now)
        tracked.num_prompt_tokens = self._requests.step_sent(tracked.number, step.slices, now)

    def step_returned(self, epoch: Epoch, step: StepId, now: float) -> None:
        """Its tokens are here."""
        tracked = self._timeline.returned(epoch, step, now)
        if tracked is not None:
            self._num_prompt_tokens += tracked.num_prompt_tokens

    def pipeline_opened(self, epoch: Epoch, stages: Iterable[StageAssignment]) -> None:
        """Steps of this epoch go over these stages."""
        self._timeline.opened(epoch, [stage.worker_id for stage in stages])

    def worker_joined(self, capacity: WorkerCapacity) -> None:
        """A worker is there, for the first time or again."""
        self._watches[capacity.worker_id].introduce(capacity)

    def worker_described(self, worker_id: WorkerId, description: WorkerDescription, address: str) -> None:
        """Who a worker is, and where it was registered; may be told before or after it joined."""
        watch = self._watches[worker_id]
        watch.address = address
        watch.description = description

    def device(self, worker_id: WorkerId) -> str:
        """What a worker that has joined computes on."""
        capacity = self._watches[worker_id].capacity
        return capacity.device if capacity is not None else ""

    def asking(self, worker_id: WorkerId) -> int | None:
        """A heartbeat is to be asked for: from which step on its traces are wanted; None: another brings them."""
        watch = self._watches[worker_id]
        if watch.is_asking:
            return None
        watch.is_asking = True
        return watch.next_trace

    def asked(self, worker_id: WorkerId, traces_since: int | None) -> None:
        """That heartbeat is over, answered or not."""
        if traces_since is not None:
            self._watches[worker_id].is_asking = False

    def heard(
        self,
        worker_id: WorkerId,
        report: HeartbeatReport,
        *,
        sent_s: float,
        returned_s: float,
        traces_since: int | None = None,
    ) -> HeartbeatReport:
        """It was answered. Gives the report without its traces, as it is to be kept."""
        watch = self._watches[worker_id]
        kept = replace(report, traces=())
        watch.heard(kept, sent_s=sent_s, returned_s=returned_s, asked_since=traces_since, errors=self._errors)
        self._timeline.merge(worker_id, report.traces, watch.clock)
        return kept

    def error(self, kind: str) -> None:
        """Something went wrong in the master or on one of its links."""
        self._errors.add(kind)

    def look(self) -> None:
        """Note a point of the history. Called once for each interval of it."""
        view = self.view()
        self._history.look(view, now=self._clock(), prompt_tokens=self._num_prompt_tokens, rows=metrics_rows(view))

    def remember(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Go on with rows that an earlier master noted."""
        self._history.remember(rows)

    # --- asked by people ---------------------------------------------------------------------------

    def view(self) -> ClusterView:
        """Everything but steps, requests and the past."""
        snapshot = self._engine.snapshot()
        self._note_losses(snapshot)
        now = self._clock()
        stages = {stage.worker_id: stage for stage in snapshot.stages}
        order = {worker_id: index for index, worker_id in enumerate(stages)}
        workers = sorted(snapshot.workers, key=lambda worker: order.get(worker.worker_id, len(order)))
        return ClusterView(
            at=now + self._wall.offset(),
            started_at=self._started_at,
            model_name=self._model_name,
            num_layers=self._num_layers,
            snapshot=snapshot,
            is_ready=self._engine.is_ready(),
            failure=self._engine.failure,
            workers=tuple(self._worker(worker, stages.get(worker.worker_id), now) for worker in workers),
            links=self._links(tuple(stages)),
            time_to_first_token=self._requests.time_to_first_token,
            inter_token_latency=self._requests.inter_token_latency,
            num_errors=self._errors.items(),
        )

    def steps(self, since: int = 0) -> tuple[StepPassage, ...]:
        """The last steps whose number is above `since`, oldest first."""
        return self._timeline.steps(since, self._wall.offset())

    def steps_changed(self, since: int = 0, *, limit: int | None = None) -> tuple[int, tuple[StepPassage, ...]]:
        """A cursor, and the steps that are new or more complete since the cursor `since`, oldest first."""
        return self._timeline.steps_changed(since, self._wall.offset(), limit=limit)

    def requests(self) -> tuple[RequestTrace, ...]:
        """Those that run or wait, and the last ones that ended, newest first, without their steps."""
        for seq_id in self._requests.open_ids():
            self._requests.preempted(seq_id, self._engine.num_preemptions(seq_id))
        return self._requests.requests(self._wall.offset())

    def request(self, seq_id: SeqId) -> RequestTrace | None:
        """One of them, with its steps; None when it is not known (any more)."""
        self._requests.preempted(seq_id, self._engine.num_preemptions(seq_id))
        return self._requests.request(seq_id, self._wall.offset())

    def history(self) -> tuple[HistoryPoint, ...]:
        """The last hour, oldest first."""
        return self._history.points()

    def metrics_rows(self, *, since: float = 0.0) -> list[dict[str, object]]:
        """The last hour as flat rows with a timestamp above `since`, oldest first."""
        return self._history.rows(since)

    # --- parts of the view -------------------------------------------------------------------------

    def _note_losses(self, snapshot: ClusterSnapshot) -> None:
        """Count each worker that has been lost since the last look, for whatever reason the core had."""
        lost = {worker.worker_id for worker in snapshot.workers if worker.status == "lost"}
        for _ in lost - self._lost:
            self._errors.add("WorkerLostError")
        self._lost = lost

    def _worker(self, worker: WorkerSnapshot, stage: StageAssignment | None, now: float) -> WorkerView:
        watch = self._watches[worker.worker_id]
        capacity, description, report = watch.capacity, watch.description, worker.report
        done = self._engine.loaded.get(worker.worker_id) if stage is not None else None
        is_told = report is not None and stage is not None and report.epoch == stage.epoch
        layers = None if stage is None else stage.layers
        device_name = report.device_name if report is not None else ""
        return WorkerView(
            worker_id=worker.worker_id,
            address=watch.address,
            host_id=capacity.host_id if capacity is not None else "",
            device=capacity.device if capacity is not None else "",
            device_name=device_name or (description.device_name if description is not None else ""),
            status=worker.status,
            reason=worker.reason,
            stage_index=None if stage is None else stage.stage_index,
            first_layer=None if layers is None else layers.start,
            end_layer=None if layers is None else layers.end,
            memory_limit_bytes=capacity.memory_bytes if capacity is not None else 0,
            weight_bytes=(report.weight_bytes if is_told and report else 0) or (done.weight_bytes if done else 0),
            kv_bytes=(report.kv_bytes if is_told and report else 0) or (done.kv_bytes if done else 0),
            busy_ratio=watch.busy_ratio if stage is not None else None,
            report=report,
            report_age_s=None if report is None or watch.heard_at is None else max(now - watch.heard_at, 0.0),
            master_round_trip_s=watch.clock.round_trip_s,
            wire=self._timeline.wire(worker.worker_id),
            metrics_target=watch.metrics_target,
            num_ranks=description.num_ranks if description is not None else 1,
            ranks=report.all_ranks if report is not None else (),
        )

    def _links(self, workers: tuple[WorkerId, ...]) -> tuple[LinkView, ...]:
        """From the master through these in order, and back."""
        if not workers:
            return ()
        links = []
        for index, (sender, receiver) in enumerate(zip(("", *workers), (*workers, ""), strict=True)):
            round_trip_s, bytes_per_s = None, None
            if sender and receiver:
                report = self._watches[sender].last_report
                round_trip_s = report.link.round_trip_s if report is not None and report.link is not None else None
                bytes_per_s = self._watches[sender].link_bytes_per_s
            else:
                round_trip_s = self._watches[sender or receiver].clock.round_trip_s
            links.append(
                LinkView(
                    sender=sender,
                    receiver=receiver,
                    round_trip_s=round_trip_s,
                    bytes_per_s=bytes_per_s,
                    wire_s=self._timeline.link_wire_s(index),
                )
            )
        return tuple(links)


def _wall_clock() -> float:
    """Seconds since 1970."""
    return datetime.now(tz=UTC).timestamp()
