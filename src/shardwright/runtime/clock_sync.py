"""What a worker's clock shows when the master's shows something else, told from heartbeats alone.

The arithmetic is that of NTP (RFC 5905, section 8): a question leaves at `sent_s` and its answer is here at
`returned_s` on the master's clock; the worker took the one at `received_s` and gave the other at `answered_s` on its
own. The offset that such a sample tells can be wrong by half of its round trip, so the shortest one tells most. Clocks
run apart, so an old sample tells less than its round trip says; how fast they do is told by good samples far apart.

Processes of one machine share its clock. Where every sample allows an offset of nothing, nothing it is: machines of
their own would have to have been started in the same millisecond.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

KEPT: Final = 32
"""Samples to choose from: half a minute of heartbeats."""

DRIFT: Final = 50e-6
"""Two clocks run apart by about this much (seconds a second) where nothing better is known: old samples tell less."""

ANCHORS_KEPT: Final = 8
"""So many runs of `KEPT` samples have their best one kept, to see how the offset changes over minutes."""

MOST_DRIFT: Final = 1e-3
"""No two clocks run apart faster than this, also while they are being set right: what differs more has jumped."""

_GRAIN_S: Final = 1e-6
"""Clocks and sums of their times are not finer than this."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float  # on the master's clock
    offset_s: float
    round_trip_s: float


class ClockSync:
    """One worker's clock as seen from the master's. Both must never go back while their process lives."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=KEPT)
        self._anchors: deque[_Sample] = deque(maxlen=ANCHORS_KEPT)
        self._num_added = 0
        self._best: _Sample | None = None
        self._offset_s = 0.0

    @property
    def offset_s(self) -> float | None:
        """What to add to the worker's time to get the master's, now; None before the first heartbeat."""
        return None if self._best is None else self._offset_s

    @property
    def round_trip_s(self) -> float | None:
        """The shortest of the last heartbeats' ways there and back, without the worker's time for the answer."""
        return min((sample.round_trip_s for sample in self._samples), default=None)

    def add(self, *, sent_s: float, received_s: float, answered_s: float, returned_s: float) -> bool:
        """Learn from one heartbeat. False when the worker's clock is another than before: its process began anew.

        A sample that can't be (an answer before its question) is ignored.
        """
        held_s = answered_s - received_s
        round_trip_s = returned_s - sent_s - held_s
        if held_s < 0 or round_trip_s < 0:
            return True
        sample = _Sample(returned_s, (sent_s + returned_s - received_s - answered_s) / 2, round_trip_s)
        is_same = self._best is None or _agree(self._best, sample)
        if not is_same:
            self._samples.clear()
            self._anchors.clear()
            self._num_added = 0
        self._samples.append(sample)
        self._num_added += 1
        best = self._best = min(self._samples, key=lambda s: s.round_trip_s / 2 + DRIFT * (returned_s - s.at))
        if self._num_added % KEPT == 0:
            self._anchors.append(min(self._samples, key=lambda s: s.round_trip_s))
        if all(abs(s.offset_s) <= s.round_trip_s / 2 + _GRAIN_S for s in self._samples):
            self._offset_s = 0.0
        else:
            self._offset_s = best.offset_s + self._drift(best) * (returned_s - best.at)
        return is_same

    def _drift(self, best: _Sample) -> float:
        """By how much the offset grows in a second; 0 while that is not known better than `DRIFT`."""
        if not self._anchors or best.at <= self._anchors[0].at:
            return 0.0
        anchor = self._anchors[0]
        apart_s = best.at - anchor.at
        error = (anchor.round_trip_s + best.round_trip_s) / 2 / apart_s
        return (best.offset_s - anchor.offset_s) / apart_s if error < DRIFT else 0.0

    def to_master(self, worker_s: float) -> float | None:
        """A time on the worker's clock as the master's shows it."""
        return None if self._best is None else worker_s + self._offset_s


def _agree(one: _Sample, other: _Sample) -> bool:
    """Whether one offset can explain both: each is right to half of its round trip, but for the drift between them."""
    margin = (one.round_trip_s + other.round_trip_s) / 2 + MOST_DRIFT * abs(other.at - one.at)
    return abs(one.offset_s - other.offset_s) <= margin + _GRAIN_S
