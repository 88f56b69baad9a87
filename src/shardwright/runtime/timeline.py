"""The last steps and their way through the stages, on one clock.

The master knows when it sent a step and when it had the step's tokens back; each worker tells, a heartbeat later and on
its own clock, when the step came and went. `ClockSync` translates, to within half of a heartbeat's round trip. What
no translation can get wrong are durations: those of the stages, and that of the whole trip. So what all links took
together is known exactly, and where the clocks would have a step arrive before it was sent, the links' times are put
right without changing their sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from shardwright.observation import Histogram, StagePassage, StepPassage
from shardwright.runtime.clock_sync import ClockSync
from shardwright.runtime.tally import Tally
from shardwright.types import PHASE_BUCKETS_S, Epoch, StepId, StepInput, StepTrace, WorkerId

STEPS_KEPT: Final = 4096
PIPELINES_KEPT: Final = 64
"""Pipelines whose steps can still be told of."""

_LINK_STEPS: Final = 64
"""A link's mean time is that of so many steps."""


class _Visit:
    """A step at one stage, on the master's clock as far as that is known."""

    __slots__ = ("arrived", "bytes_in", "bytes_out", "finished", "sent", "serialise_s", "started")

    def __init__(self, trace: StepTrace, offset_s: float) -> None:
        self.arrived = trace.arrived_s + offset_s
        self.started = max(trace.started_s + offset_s, self.arrived)
        self.finished = max(trace.finished_s + offset_s, self.started)
        self.sent = max(trace.sent_s + offset_s, self.finished)
        self.serialise_s = trace.serialise_s
        self.bytes_in = trace.bytes_in
        self.bytes_out = trace.bytes_out


class TrackedStep:
    """One step; what was told of it so far."""

    __slots__ = (
        "epoch",
        "num_prompt_tokens",
        "num_sequences",
        "num_tokens",
        "number",
        "returned_at",
        "revision",
        "sent_at",
        "shown",
        "shown_as",
        "step",
        "visits",
    )

    def __init__(self, number: int, step: StepInput, now: float) -> None:
        self.number = number
        self.epoch = step.epoch
        self.step = step.step
        self.num_sequences = len(step.slices)
        self.num_tokens = step.num_tokens
        self.num_prompt_tokens = 0
        self.sent_at = now
        self.returned_at: float | None = None
        self.visits: list[_Visit | None] | None = None  # by stage; None before the first was told
        self.revision = 0
        self.shown: StepPassage | None = None
        self.shown_as: tuple[int, float] | None = None  # what `shown` was made of


class Timeline:
    """A bounded record of steps. Writing costs a microsecond or two; reading makes what is asked for, once."""

    def __init__(self, *, kept: int = STEPS_KEPT) -> None:
        self._kept = kept
        self._steps: dict[tuple[Epoch, StepId], TrackedStep] = {}  # in the order in which they were sent
        self._pipelines: dict[Epoch, tuple[WorkerId, ...]] = {}
        self._num_sent = 0
        self._revision = 0
        self._wires: dict[WorkerId, Tally] = {}
        self._link_times: list[deque[float]] = []  # of the newest pipeline: to each stage in turn, then back

    # --- written as things happen ------------------------------------------------------------------

    def opened(self, epoch: Epoch, workers: Sequence[WorkerId]) -> None:
        """A pipeline begins, over these in order."""
        self._pipelines[epoch] = tuple(workers)
        if len(self._pipelines) > PIPELINES_KEPT:
            del self._pipelines[next(iter(self._pipelines))]
        self._link_times = [deque(maxlen=_LINK_STEPS) for _ in range(len(workers) + 1)]

    def sent(self, step: StepInput, now: float) -> TrackedStep:
        """A step leaves for the first stage."""
        self._num_sent += 1
        self._revision += 1
        tracked = TrackedStep(self._num_sent, step, now)
        tracked.revision = self._revision
        self._steps[step.epoch, step.step] = tracked
        if len(self._steps) > self._kept:
            del self._steps[next(iter(self._steps))]
        return tracked

    def returned(self, epoch: Epoch, step: StepId, now: float) -> TrackedStep | None:
        """Its tokens are here. None for a step that is not known, or that was back before."""
        tracked = self._steps.get((epoch, step))
        if tracked is None or tracked.returned_at is not None:
            return None
        tracked.returned_at = now
        self._revision += 1
        tracked.revision = self._revision
        if tracked.visits is not None:  # the stages' reports overtook the answer
            self._count_wires(tracked)
        return tracked

    def merge(self, worker_id: WorkerId, traces: Iterable[StepTrace], clock: ClockSync) -> None:
        """A worker tells of steps. Those that are not known (any more) are ignored, and so is what was told before."""
        offset_s = clock.offset_s
        if offset_s is None:
            return
        for trace in traces:
            tracked = self._steps.get((trace.epoch, trace.step))
            workers = self._pipelines.get(trace.epoch, ())
            if tracked is None or worker_id not in workers:
                continue
            if tracked.visits is None:
                tracked.visits = [None] * len(workers)
            index = workers.index(worker_id)
            if tracked.visits[index] is not None:
                continue
            tracked.visits[index] = _Visit(trace, offset_s)
            self._revision += 1
            tracked.revision = self._revision
            self._count_wires(tracked)

    def _count_wires(self, tracked: TrackedStep) -> None:
        """Add the links' times of a step as soon as everything is known of it: from then on nothing changes."""
        visits = _all_of(tracked)
        if visits is None or tracked.returned_at is None:
            return
        gaps, _ = put_right(tracked.sent_at, tracked.returned_at, [(v.arrived, v.sent) for v in visits])
        for worker_id, gap_s in zip(self._pipelines.get(tracked.epoch, ()), gaps, strict=False):
            tally = self._wires.get(worker_id)
            if tally is None:
                tally = self._wires[worker_id] = Tally(PHASE_BUCKETS_S)
            tally.add(gap_s)
        if tracked.epoch == next(reversed(self._pipelines)):
            for times, gap_s in zip(self._link_times, gaps, strict=True):
                times.append(gap_s)

    # --- read by people ----------------------------------------------------------------------------

    def wire(self, worker_id: WorkerId) -> Histogram | None:
        """How long steps took from their senders to this worker; None before one is known."""
        tally = self._wires.get(worker_id)
        return None if tally is None else tally.histogram()

    def link_wire_s(self, index: int) -> float | None:
        """The mean of the last steps on one link of the newest pipeline: to stage `index`, or back behind the last."""
        times = self._link_times[index] if index < len(self._link_times) else ()
        return sum(times) / len(times) if times else None

    def steps(self, since: int, wall_offset: float) -> tuple[StepPassage, ...]:
        """Those with a number above `since`, oldest first, in times of day."""
        num_new = self._num_sent - since
        if num_new <= 0:
            return ()
        newest = list(islice(reversed(self._steps.values()), num_new))
        return tuple(self._shown(tracked, wall_offset) for tracked in reversed(newest))

    def steps_changed(
        self, since: int, wall_offset: float, *, limit: int | None = None
    ) -> tuple[int, tuple[StepPassage, ...]]:
        """The present revision, and the newest steps of which more is known than at revision `since`, oldest first."""
        if since == self._revision:
            return since, ()
        if since > self._revision:
            since = 0  # a cursor of another master, before this one began
        changed = [tracked for tracked in self._steps.values() if tracked.revision > since]
        if limit is not None:
            changed = changed[max(len(changed) - limit, 0) :]
        return self._revision, tuple(self._shown(tracked, wall_offset) for tracked in changed)

    def _shown(self, tracked: TrackedStep, wall_offset: float) -> StepPassage:
        made_of = tracked.revision, wall_offset
        if tracked.shown is None or tracked.shown_as != made_of:
            tracked.shown = _passage(tracked, self._pipelines.get(tracked.epoch, ()), wall_offset)
            tracked.shown_as = made_of
        return tracked.shown


def put_right(sent_at: float, returned_at: float, visits: Sequence[tuple[float, float]]) -> tuple[list[float], float]:
    """What each link took, to the stages in turn and back, and by what the stages' durations are to be multiplied.

    `visits` are the times of arrival and departure at all stages. The factor is 1 unless the stages together took
    longer than the whole trip: a departure is noted a moment after it happened. The sum of all is the trip's.
    """
    gaps = []
    before = sent_at
    for arrived, left in visits:
        gaps.append(arrived - before)
        before = left
    gaps.append(returned_at - before)
    if min(gaps) >= 0.0:
        return gaps, 1.0
    total = sum(gaps)
    if total > 0.0:
        positive = sum(gap for gap in gaps if gap > 0.0)
        return [max(gap, 0.0) * total / positive for gap in gaps], 1.0
    inside = sum(left - arrived for arrived, left in visits)
    return [0.0] * len(gaps), max(returned_at - sent_at, 0.0) / inside if inside > 0.0 else 1.0


def _all_of(tracked: TrackedStep) -> list[_Visit] | None:
    """Its visits to all stages, if every worker has told."""
    known = [visit for visit in tracked.visits or () if visit is not None]
    return known if tracked.visits is not None and len(known) == len(tracked.visits) else None


def _passage(tracked: TrackedStep, workers: tuple[WorkerId, ...], wall_offset: float) -> StepPassage:
    returned_at = tracked.returned_at
    stages: list[StagePassage] = []
    visits = _all_of(tracked)
    gaps: list[float] | None = None
    factor = 1.0
    if visits is not None and returned_at is not None:
        gaps, factor = put_right(tracked.sent_at, returned_at, [(v.arrived, v.sent) for v in visits])
    before = tracked.sent_at
    told = -1  # the last stage that has told
    for index, visit in enumerate(tracked.visits or ()):
        if visit is None:
            continue
        gap_s = gaps[index] if gaps is not None else max(visit.arrived - before, 0.0)
        arrived = before + gap_s
        before = arrived + factor * (visit.sent - visit.arrived)
        begin = arrived + wall_offset
        stages.append(
            StagePassage(
                worker_id=workers[index],
                stage_index=index,
                arrived_at=begin,
                started_at=begin + factor * (visit.started - visit.arrived),
                finished_at=begin + factor * (visit.finished - visit.arrived),
                sent_at=before + wall_offset,
                serialise_s=factor * visit.serialise_s,
                wire_s=gap_s if told == index - 1 else None,
                bytes_in=visit.bytes_in,
                bytes_out=visit.bytes_out,
            )
        )
        told = index
    return StepPassage(
        number=tracked.number,
        epoch=tracked.epoch,
        step=tracked.step,
        num_sequences=tracked.num_sequences,
        num_tokens=tracked.num_tokens,
        sent_at=tracked.sent_at + wall_offset,
        returned_at=None if returned_at is None else returned_at + wall_offset,
        stages=tuple(stages),
        num_stages=len(workers),
    )
