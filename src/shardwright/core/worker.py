"""A worker's whole state: which stage it holds, which steps wait, which one computes. No tensors, no clock.

Steps of one epoch are numbered from 1 without a gap, arrive in that order, are computed one at a time in that order,
and leave in that order. A stage is taken down only when nothing of it loads or computes: what comes meanwhile is
remembered and done then.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import assert_never

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
from shardwright.types import Epoch, StageAssignment, StepId


class StagePhase(enum.Enum):
    """What the worker does with its stage."""

    EMPTY = "empty"  # holds none
    LOADING = "loading"  # builds it
    READY = "ready"  # takes steps
    FAILED = "failed"  # a step failed or the next stage is gone: every later step is reported back
    ENDING = "ending"  # given up while it loads or computes; taken down as soon as that is over


class WorkerState:
    """All decisions of one worker."""

    def __init__(self) -> None:
        self._phase = StagePhase.EMPTY
        self._assignment: StageAssignment | None = None  # held, being built, or being taken down
        self._next: StageAssignment | None = None  # comes after the one that is ending
        self._loading = False
        self._computing: StepId | None = None
        self._queue: deque[StepId] = deque()
        self._last_arrived: StepId = 0
        self._last_epoch: Epoch = 0  # nothing of this epoch or older may begin any more
        self._failure = ""

    @property
    def phase(self) -> StagePhase:
        """What the worker does with its stage now."""
        return self._phase

    @property
    def assignment(self) -> StageAssignment | None:
        """The stage that is held, being built or being taken down."""
        return self._assignment

    @property
    def epoch(self) -> Epoch:
        """Epoch of the stage that takes steps, is being built or has failed; 0 without one."""
        if self._assignment is None or self._phase is StagePhase.ENDING:
            return 0
        return self._assignment.epoch

    @property
    def last_epoch(self) -> Epoch:
        """The newest epoch that the worker has heard of; an assignment must be newer."""
        return self._last_epoch

    @property
    def next_epoch(self) -> Epoch:
        """Epoch of the stage that is built once the present one has ended; 0 where none waits for that."""
        return 0 if self._next is None else self._next.epoch

    @property
    def queue_depth(self) -> int:
        """Steps that wait for the compute thread; the one that computes is not among them."""
        return len(self._queue)

    def handle(self, event: WorkerEvent, now: float) -> list[WorkerEffect]:  # noqa: ARG002  same shape as the master's
        """Take one event and say what to do, in order. An event that is out of date gives nothing."""
        match event:
            case Assigned():
                return self._on_assigned(event.assignment)
            case LoadFinished():
                return self._on_load_finished(event)
            case LoadFailed():
                return self._on_load_failed(event)
            case StepArrived():
                return self._on_step_arrived(event)
            case StepComputed():
                return self._on_step_computed(event)
            case StepErrored():
                return self._on_step_errored(event)
            case NextLinkLost():
                return self._on_next_link_lost(event)
            case Released():
                return self._on_released(event)
            case _:
                assert_never(event)

    # --- stages come and go ------------------------------------------------------------------------

    def _on_assigned(self, assignment: StageAssignment) -> list[WorkerEffect]:
        if assignment.epoch <= self._last_epoch:
            return []
        self._last_epoch = assignment.epoch
        if self._phase is StagePhase.EMPTY:
            return self._load(assignment)
        self._next = assignment
        return self._give_up()

    def _on_released(self, event: Released) -> list[WorkerEffect]:
        self._last_epoch = max(self._last_epoch, event.epoch)
        if self._next is not None and self._next.epoch <= event.epoch:
            self._next = None
        if self._phase in {StagePhase.EMPTY, StagePhase.ENDING}:
            return []
        assert self._assignment is not None
        return self._give_up() if self._assignment.epoch <= event.epoch else []

    def _load(self, assignment: StageAssignment) -> list[WorkerEffect]:
        self._phase = StagePhase.LOADING
        self._assignment = assignment
        self._next = None
        self._loading = True
        self._last_arrived = 0
        self._failure = ""
        return [LoadStage(assignment=assignment)]

    def _give_up(self) -> list[WorkerEffect]:
        """Stop taking steps; take the stage down now, or as soon as nothing of it loads or computes."""
        self._phase = StagePhase.ENDING
        effects: list[WorkerEffect] = [DropStep(epoch=self._held_epoch, step=step) for step in self._queue]
        self._queue.clear()
        if self._loading or self._computing is not None:
            return effects
        return effects + self._take_down(was_loaded=True)

    def _take_down(self, *, was_loaded: bool) -> list[WorkerEffect]:
        """Unload, and begin what waits; if that is the same part of the model, its weights may be kept."""
        old = self._assignment
        assert old is not None
        new = self._next
        effects: list[WorkerEffect] = []
        if was_loaded:
            keep_weights = new is not None and _same_part(old, new)
            effects.append(UnloadStage(epoch=old.epoch, keep_weights=keep_weights))
        self._assignment = None
        self._phase = StagePhase.EMPTY
        if new is not None:
            effects += self._load(new)
        return effects

    def _on_load_finished(self, event: LoadFinished) -> list[WorkerEffect]:
        if not self._loading or event.epoch != self._held_epoch:
            return []
        self._loading = False
        if self._phase is StagePhase.ENDING:
            return self._take_down(was_loaded=True)
        self._phase = StagePhase.READY
        return []

    def _on_load_failed(self, event: LoadFailed) -> list[WorkerEffect]:
        if not self._loading or event.epoch != self._held_epoch:
            return []
        self._loading = False
        return self._take_down(was_loaded=False)

    # --- steps -------------------------------------------------------------------------------------

    @property
    def _held_epoch(self) -> Epoch:
        assert self._assignment is not None
        return self._assignment.epoch

    def _on_step_arrived(self, event: StepArrived) -> list[WorkerEffect]:
        epoch, step = event.epoch, event.step
        if self.epoch == 0:
            return [RefuseStep(epoch=epoch, step=step, reason=f"step {step} of epoch {epoch}, but no stage is held")]
        if epoch != self.epoch:
            reason = f"step {step} of epoch {epoch}, but the stage is of epoch {self.epoch}"
            return [RefuseStep(epoch=epoch, step=step, reason=reason)]
        if self._phase is StagePhase.LOADING:
            return [RefuseStep(epoch=epoch, step=step, reason=f"step {step}, but the stage is still loading")]
        if step != self._last_arrived + 1:
            reason = f"step {step} after step {self._last_arrived}, expected {self._last_arrived + 1}"
            return [RefuseStep(epoch=epoch, step=step, reason=reason)]
        self._last_arrived = step
        if self._phase is StagePhase.FAILED:
            return self._turn_back(step)
        if self._computing is not None:
            self._queue.append(step)
            return []
        return self._compute(step)

    def _compute(self, step: StepId) -> list[WorkerEffect]:
        self._computing = step
        return [ComputeStep(epoch=self._held_epoch, step=step), AckStep(epoch=self._held_epoch, step=step)]

    def _turn_back(self, step: StepId) -> list[WorkerEffect]:
        epoch = self._held_epoch
        return [DropStep(epoch=epoch, step=step), ReportFailure(epoch=epoch, step=step, reason=self._failure)]

    def _on_step_computed(self, event: StepComputed) -> list[WorkerEffect]:
        epoch, step = event.epoch, event.step
        if self._assignment is None or epoch != self._held_epoch or step != self._computing:
            return [DropStep(epoch=epoch, step=step)]
        self._computing = None
        if self._phase is StagePhase.ENDING:
            return [DropStep(epoch=epoch, step=step), *self._take_down(was_loaded=True)]
        if self._phase is StagePhase.FAILED:  # the next stage is gone, and this step has been reported
            return [DropStep(epoch=epoch, step=step)]
        # The compute thread gets its next step before this one's result is packed and sent.
        effects = self._compute(self._queue.popleft()) if self._queue else []
        if self._assignment.is_last:
            return [*effects, PublishTokens(epoch=epoch, step=step)]
        return [*effects, ForwardStep(epoch=epoch, step=step)]

    def _on_step_errored(self, event: StepErrored) -> list[WorkerEffect]:
        epoch, step = event.epoch, event.step
        if self._assignment is None or epoch != self._held_epoch or step != self._computing:
            return [DropStep(epoch=epoch, step=step)]
        self._computing = None
        if self._phase is StagePhase.ENDING:
            return [DropStep(epoch=epoch, step=step), *self._take_down(was_loaded=True)]
        if self._phase is StagePhase.FAILED:
            return [DropStep(epoch=epoch, step=step)]
        self._fail(event.reason)
        return [*self._turn_back(step), *self._turn_back_queue()]

    def _on_next_link_lost(self, event: NextLinkLost) -> list[WorkerEffect]:
        if event.epoch != self.epoch or self._phase is not StagePhase.READY:
            return []
        # What computes can't be stopped: it is reported now and dropped when it is done. With nothing in hand the last
        # step that came stands for what may be lost on the way.
        step = self._last_arrived if self._computing is None else self._computing
        self._fail(event.reason)
        return [ReportFailure(epoch=event.epoch, step=step, reason=event.reason), *self._turn_back_queue()]

    def _fail(self, reason: str) -> None:
        self._phase = StagePhase.FAILED
        self._failure = reason

    def _turn_back_queue(self) -> list[WorkerEffect]:
        effects: list[WorkerEffect] = []
        while self._queue:
            effects += self._turn_back(self._queue.popleft())
        return effects

    # --- invariants --------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant; tests call it after each event."""
        assert (self._assignment is None) == (self._phase is StagePhase.EMPTY), self._phase
        assert self._loading is False or self._phase in {StagePhase.LOADING, StagePhase.ENDING}, self._phase
        assert not (self._loading and self._computing is not None), "loads and computes at once"
        assert self._next is None or self._phase is StagePhase.ENDING, "an assignment waits for nothing"
        if self._phase is StagePhase.ENDING:
            assert self._loading or self._computing is not None, "ends, but nothing holds it up"
        if self._phase is not StagePhase.READY:
            assert not self._queue, f"steps {list(self._queue)} wait in phase {self._phase.value}"
        if self._queue:
            assert self._computing is not None, "steps wait for an idle compute thread"
            waiting = [self._computing, *self._queue]
            assert waiting == list(range(self._computing, self._last_arrived + 1)), waiting
        assert self._assignment is None or self._assignment.epoch <= self._last_epoch


def _same_part(old: StageAssignment, new: StageAssignment) -> bool:
    return old.layers == new.layers and old.is_first == new.is_first and old.is_last == new.is_last
