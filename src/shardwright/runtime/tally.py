"""Counts observations by bucket, for a fraction of a microsecond each."""

from __future__ import annotations

from bisect import bisect_left

from shardwright.observation import Histogram


class Tally:
    """A histogram that grows. A value that equals a bound lies below it."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """One more observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), total=self._total)
