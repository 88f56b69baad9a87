"""What a worker remembers of its steps and errors: the last steps' passages, phases as histograms, errors by kind.

Counts are since the worker's process began. The event loop alone writes them, a few microseconds for each step; any
thread may read them, and gets copies.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Final

from shardwright.types import PHASE_BUCKETS_S, Epoch, PhaseTimes, StepId, StepPhase, StepTrace

MAX_KEPT_TRACES: Final = 4096
"""Steps whose passages are kept for whoever asks."""

MAX_TOLD_TRACES: Final = 1024
"""Most passages told at once: building and encoding them keeps the event loop for some milliseconds."""

MAX_ERROR_KINDS: Final = 32
"""Kinds of errors that are counted each for itself; those of further kinds count as `other`."""

OTHER_ERRORS: Final = "other"


@dataclass(slots=True)
class Transit:
    """One step on its way through this worker: seconds on its monotonic clock, bytes of tensors."""

    epoch: Epoch
    step: StepId
    num_sequences: int
    num_tokens: int
    arrived_s: float
    started_s: float
    finished_s: float
    serialise_s: float  # of the time between started and finished
    bytes_in: int
    bytes_out: int


_Trace = tuple[Transit, float]  # and when it was sent


class _Phase:
    """One phase's histogram."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(PHASE_BUCKETS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(PHASE_BUCKETS_S, seconds)] += 1
        self.total_s += seconds


class StepRecorder:
    """The steps that went through this worker."""

    def __init__(self) -> None:
        self._traces: deque[_Trace] = deque(maxlen=MAX_KEPT_TRACES)
        self._count = 0
        self._last_finished_s: float | None = None
        self._phases = {phase: _Phase() for phase in StepPhase}
        # Looked up here once: to hash an enum's member for each step takes as long as all the rest.
        self._add_queue = self._phases[StepPhase.QUEUE].add
        self._add_serialise = self._phases[StepPhase.SERIALISE].add
        self._add_compute = self._phases[StepPhase.COMPUTE].add
        self._add_send = self._phases[StepPhase.SEND].add
        self._add_wait = self._phases[StepPhase.WAIT].add

    @property
    def num_traces(self) -> int:
        """Steps traced since the process began: the number of the next one, counted from 0."""
        return self._count

    def begin_stage(self) -> None:
        """A stage is there anew: the time until its first step is no step's waiting."""
        self._last_finished_s = None

    def record(self, transit: Transit, sent_s: float) -> None:
        """A step was taken by the link or the token stream. Call in the order that steps were computed in."""
        last_finished_s, self._last_finished_s = self._last_finished_s, transit.finished_s
        if last_finished_s is not None:
            self._add_wait(max(transit.arrived_s - last_finished_s, 0.0))
        self._add_queue(transit.started_s - transit.arrived_s)
        self._add_serialise(transit.serialise_s)
        self._add_compute(max(transit.finished_s - transit.started_s - transit.serialise_s, 0.0))
        self._add_send(sent_s - transit.finished_s)
        self._traces.append((transit, sent_s))
        self._count += 1

    def phases(self) -> tuple[PhaseTimes, ...]:
        """How long each phase took, since the process began."""
        return tuple(
            PhaseTimes(phase=phase, counts=tuple(times.counts), total_s=times.total_s)
            for phase, times in self._phases.items()
        )

    def traces(self, since: int) -> tuple[tuple[StepTrace, ...], int]:
        """The steps from number `since` on, oldest first, as many as are kept and may be told at once.

        And the number to ask for next. A number that was not reached yet (of another process, before this one took its
        place) gives none, and the number that is next here.
        """
        first_kept = self._count - len(self._traces)
        first = max(min(since, self._count), first_kept) - first_kept
        told = tuple(itertools.islice(self._traces, first, first + MAX_TOLD_TRACES))
        return tuple(_as_trace(*each) for each in told), first_kept + first + len(told)


def _as_trace(transit: Transit, sent_s: float) -> StepTrace:
    return StepTrace(
        epoch=transit.epoch,
        step=transit.step,
        num_sequences=transit.num_sequences,
        num_tokens=transit.num_tokens,
        arrived_s=transit.arrived_s,
        started_s=transit.started_s,
        finished_s=transit.finished_s,
        sent_s=sent_s,
        serialise_s=transit.serialise_s,
        bytes_in=transit.bytes_in,
        bytes_out=transit.bytes_out,
    )


class ErrorCounter:
    """Errors by the names of their classes. The kinds are bounded: each becomes a series of its own in Prometheus."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, kind: type[BaseException]) -> None:
        """One more of a kind."""
        name = kind.__name__
        if name not in self._counts and len(self._counts) >= MAX_ERROR_KINDS:
            name = OTHER_ERRORS
        self._counts[name] = self._counts.get(name, 0) + 1

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Kinds and how often each happened, by name."""
        return tuple(sorted(self._counts.items()))
