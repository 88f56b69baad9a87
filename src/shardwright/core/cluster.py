"""The workers' lives: who has joined, who loads, who is ready, who is lost, and when silence means loss."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shardwright.types import HeartbeatReport, StageAssignment, WorkerCapacity, WorkerId


class WorkerStatus(enum.Enum):
    """What a worker is to the master now."""

    JOINING = "joining"  # known and usable, holds no stage
    LOADING = "loading"  # was given a stage and builds it
    READY = "ready"  # holds its stage
    LOST = "lost"  # gone; may join again


class WorkerFact(enum.Enum):
    """What can happen to a worker, as far as its life is concerned."""

    JOINED = "joined"
    ASSIGNED = "assigned"
    LOADED = "loaded"
    RELEASED = "released"
    LOST = "lost"


NEXT: dict[tuple[WorkerStatus, WorkerFact], WorkerStatus] = {
    (WorkerStatus.JOINING, WorkerFact.JOINED): WorkerStatus.JOINING,  # described itself anew
    (WorkerStatus.LOST, WorkerFact.JOINED): WorkerStatus.JOINING,
    (WorkerStatus.JOINING, WorkerFact.ASSIGNED): WorkerStatus.LOADING,
    (WorkerStatus.LOADING, WorkerFact.ASSIGNED): WorkerStatus.LOADING,  # a newer epoch before the older was loaded
    (WorkerStatus.READY, WorkerFact.ASSIGNED): WorkerStatus.LOADING,
    (WorkerStatus.LOADING, WorkerFact.LOADED): WorkerStatus.READY,
    (WorkerStatus.LOADING, WorkerFact.RELEASED): WorkerStatus.JOINING,
    (WorkerStatus.READY, WorkerFact.RELEASED): WorkerStatus.JOINING,
    (WorkerStatus.JOINING, WorkerFact.LOST): WorkerStatus.LOST,
    (WorkerStatus.LOADING, WorkerFact.LOST): WorkerStatus.LOST,
    (WorkerStatus.READY, WorkerFact.LOST): WorkerStatus.LOST,
}
"""A worker's whole life; a pair that is not here can't happen, and a `KeyError` on it is a bug of the master."""


@dataclass(slots=True, eq=False, kw_only=True)
class WorkerRecord:
    """All that the master knows of one worker."""

    capacity: WorkerCapacity
    status: WorkerStatus = WorkerStatus.JOINING
    assignment: StageAssignment | None = None
    last_heard_s: float | None = None  # None: no heartbeat since it joined, so silence means nothing yet
    report: HeartbeatReport | None = None
    lost_reason: str = ""


class Cluster:
    """The workers in the order in which they first joined."""

    def __init__(self, *, heartbeat_timeout_s: float) -> None:
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self.workers: dict[WorkerId, WorkerRecord] = {}

    def _move(self, worker: WorkerRecord, fact: WorkerFact) -> None:
        worker.status = NEXT[worker.status, fact]

    def usable(self) -> list[WorkerCapacity]:
        """The capacities of all workers that are not lost."""
        return [worker.capacity for worker in self.workers.values() if worker.status is not WorkerStatus.LOST]

    def holders(self) -> list[WorkerId]:
        """The workers that hold or load a stage."""
        return [worker_id for worker_id, worker in self.workers.items() if worker.assignment is not None]

    def is_holder(self, worker_id: WorkerId) -> bool:
        """Whether the worker holds or loads a stage."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.assignment is not None

    def is_there(self, worker_id: WorkerId) -> bool:
        """Whether the worker has joined and is not lost."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.status is not WorkerStatus.LOST

    def join(self, capacity: WorkerCapacity) -> None:
        """A worker is there, new or again. It must not hold a stage."""
        worker = self.workers.get(capacity.worker_id)
        if worker is None:
            self.workers[capacity.worker_id] = WorkerRecord(capacity=capacity)
            return
        self._move(worker, WorkerFact.JOINED)
        worker.capacity = capacity
        worker.last_heard_s = None
        worker.report = None
        worker.lost_reason = ""

    def assign(self, assignment: StageAssignment) -> None:
        """Give a worker a stage, whatever it held before."""
        worker = self.workers[assignment.worker_id]
        self._move(worker, WorkerFact.ASSIGNED)
        worker.assignment = assignment

    def loaded(self, worker_id: WorkerId) -> None:
        """The worker holds its stage now."""
        self._move(self.workers[worker_id], WorkerFact.LOADED)

    def release(self, worker_id: WorkerId) -> None:
        """The worker holds no stage any more."""
        worker = self.workers[worker_id]
        self._move(worker, WorkerFact.RELEASED)
        worker.assignment = None

    def lose(self, worker_id: WorkerId, reason: str) -> bool:
        """A worker is gone; whether it held or loaded a stage. A worker that is unknown or lost already is no news."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.status is WorkerStatus.LOST:
            return False
        held = worker.assignment is not None
        self._move(worker, WorkerFact.LOST)
        worker.assignment = None
        worker.lost_reason = reason
        return held

    def hear(self, worker_id: WorkerId, report: HeartbeatReport, now: float) -> bool:
        """Note a heartbeat; False for a worker that is unknown or lost (it has to join again)."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.status is WorkerStatus.LOST:
            return False
        worker.last_heard_s = now
        worker.report = report
        return True

    def _deadline(self, worker: WorkerRecord) -> float | None:
        if worker.last_heard_s is None or worker.status is WorkerStatus.LOST:
            return None
        return worker.last_heard_s + self._heartbeat_timeout_s

    def next_deadline(self) -> float | None:
        """When the first worker is lost if none is heard."""
        deadlines = [self._deadline(worker) for worker in self.workers.values()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def silent(self, now: float) -> list[WorkerId]:
        """The workers whose deadline has come."""
        return [
            worker_id
            for worker_id, worker in self.workers.items()
            if (deadline := self._deadline(worker)) is not None and deadline <= now
        ]

    def all_loaded(self) -> bool:
        """Whether no worker still loads."""
        return all(worker.status is not WorkerStatus.LOADING for worker in self.workers.values())

    def check(self) -> None:
        """Assert that exactly the workers that load or are ready have a stage."""
        for worker_id, worker in self.workers.items():
            has_stage = worker.status in {WorkerStatus.LOADING, WorkerStatus.READY}
            assert has_stage == (worker.assignment is not None), f"worker {worker_id} is {worker.status.value}"
            assert worker.assignment is None or worker.assignment.worker_id == worker_id
