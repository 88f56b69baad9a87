"""What the master learned from one worker's heartbeats: its clock, its pace over the last seconds, its errors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Final

from shardwright.runtime.clock_sync import ClockSync
from shardwright.transport.address import join_address, split_address
from shardwright.types import HeartbeatReport, WorkerCapacity, WorkerDescription

WINDOW_S: Final = 5.0
"""Busy ratios and rates are of so many seconds."""

MAX_ERROR_KINDS: Final = 32
OTHER_ERRORS: Final = "other"


class ErrorCounts:
    """Errors by kind; kinds beyond the first 32 share one count, since workers name them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, count: int = 1) -> None:
        """So many more of a kind."""
        known = kind in self._counts or len(self._counts) < MAX_ERROR_KINDS
        self._counts[kind if known else OTHER_ERRORS] += count

    def items(self) -> tuple[tuple[str, int], ...]:
        """All counts, by name."""
        return tuple(sorted(self._counts.items()))


class WorkerWatch:
    """One worker over the time that this master knows it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.capacity: WorkerCapacity | None = None
        self.description: WorkerDescription | None = None
        self.clock = ClockSync()
        self.next_trace = 0  # what to ask for in the next heartbeat
        self.is_asking = False  # a heartbeat that brings traces is under way
        self.heard_at: float | None = None  # the last heartbeat, on the master's clock
        self._work: deque[tuple[float, HeartbeatReport]] = deque()  # reports of the last seconds, with their times
        self._told_errors: dict[str, int] = {}  # by the worker's process, in its last report

    @property
    def metrics_target(self) -> str:
        """Where Prometheus finds the worker, as host:port; empty where it answers nobody."""
        if self.description is None or not self.description.metrics_port:
            return ""
        return join_address(split_address(self.address)[0], self.description.metrics_port)

    def introduce(self, capacity: WorkerCapacity) -> None:
        """The worker joins, for the first time or again: what was measured of its last process is void."""
        self.capacity = capacity
        self.clock = ClockSync()
        self._begin_anew()

    def heard(
        self, report: HeartbeatReport, *, sent_s: float, returned_s: float, asked_since: int | None, errors: ErrorCounts
    ) -> None:
        """A heartbeat was answered; both times are the master's. New errors of the worker are added to `errors`.

        `asked_since` is the number from which on traces were asked for; None: for none.
        """
        self.heard_at = returned_s
        is_same = True
        if report.clock_sent_s > 0.0:
            is_same = self.clock.add(
                sent_s=sent_s,
                received_s=report.clock_received_s,
                answered_s=report.clock_sent_s,
                returned_s=returned_s,
            )
        if not is_same or (asked_since is not None and report.next_trace < asked_since):
            self._begin_anew()  # its process was started again: ask for what it has traced from its start
        elif asked_since is not None:
            self.next_trace = report.next_trace
        self._note_errors(report.errors, errors)
        self._note_work(report.clock_sent_s or returned_s, report)

    def _begin_anew(self) -> None:
        self.next_trace = 0
        self._work.clear()
        self._told_errors = {}

    def _note_errors(self, told: Iterable[tuple[str, int]], errors: ErrorCounts) -> None:
        for kind, count in told:
            before = self._told_errors.get(kind, 0)
            new = count - before if count >= before else count  # fewer than before: counted from zero again
            if new:
                errors.add(kind, new)
            self._told_errors[kind] = count

    def _note_work(self, at: float, report: HeartbeatReport) -> None:
        work = self._work
        if work and (at <= work[-1][0] or not _goes_on(work[-1][1], report)):
            if at == work[-1][0]:
                return
            work.clear()
        work.append((at, report))
        while len(work) > 2 and at - work[1][0] >= WINDOW_S:
            work.popleft()

    @property
    def last_report(self) -> HeartbeatReport | None:
        """Of its present process; None before the first heartbeat."""
        return self._work[-1][1] if self._work else None

    @property
    def busy_ratio(self) -> float | None:
        """The part of the last seconds that the stage computed, 0 to 1; None before two reports of one stage."""
        if len(self._work) < 2 or self._work[-1][1].epoch == 0:
            return None
        (since, before), (now, report) = self._work[0], self._work[-1]
        return min(max((report.busy_s - before.busy_s) / (now - since), 0.0), 1.0)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Of tensors to the next stage, over the last seconds; None before two reports of one link."""
        if len(self._work) < 2:
            return None
        (since, before), (now, report) = self._work[0], self._work[-1]
        if report.link is None or before.link is None or report.link.peer != before.link.peer:
            return None
        sent = report.link.bytes_sent - before.link.bytes_sent
        return sent / (now - since) if sent >= 0 else None


def _goes_on(before: HeartbeatReport, report: HeartbeatReport) -> bool:
    """Whether both are of the same stage, so that their counters can be compared."""
    return report.epoch == before.epoch and report.busy_s >= before.busy_s and report.steps_done >= before.steps_done
