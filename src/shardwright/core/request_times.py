"""When open requests run out of time, and how soon a full queue is likely to have room. Knows ids and times alone."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container

from shardwright.types import SeqId

_REMEMBERED = 32
_LATELY_S = 60.0
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0
_UNKNOWN_RETRY_S = 10.0


class Deadlines:
    """The requests that must be over at a given time, earliest first.

    Requests that ended otherwise are not taken out one by one: their entries are skipped when their time comes, and
    dropped together when they are more than half of all.
    """

    def __init__(self, open_requests: Container[SeqId]) -> None:
        self._open = open_requests
        self._heap: list[tuple[float, SeqId]] = []
        self._most = 64

    def add(self, seq_id: SeqId, deadline: float) -> None:
        """Note a new request's deadline."""
        if len(self._heap) >= self._most:
            self._heap = [entry for entry in self._heap if entry[1] in self._open]
            heapq.heapify(self._heap)
            self._most = max(64, 2 * len(self._heap))
        heapq.heappush(self._heap, (deadline, seq_id))

    def next(self) -> float | None:
        """The earliest deadline of a request that is open; None without any."""
        heap = self._heap
        while heap and heap[0][1] not in self._open:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def take_expired(self, now: float) -> list[SeqId]:
        """The open requests whose time is up, each told once, in order of their deadlines."""
        expired = []
        while (deadline := self.next()) is not None and deadline <= now:
            expired.append(heapq.heappop(self._heap)[1])
        return expired

    def __len__(self) -> int:
        """Entries that are kept, those of ended requests among them."""
        return len(self._heap)


class Departures:
    """How fast requests end, for those who ask when to come again.

    With one request ending every d seconds, the k-th that was turned away since finds a place after k d seconds: so
    they are not all told to come back at the same moment.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._turned_away = 0

    def note(self, now: float) -> None:
        """A request is over: one place is free, or will be."""
        self._times.append(now)
        self._turned_away = max(0, self._turned_away - 1)

    def turn_away(self, now: float) -> float:
        """One more request finds the queue full; after how many seconds it is likely to find room."""
        while self._times and self._times[0] < now - _LATELY_S:
            self._times.popleft()
        self._turned_away += 1
        if not self._times:
            return _UNKNOWN_RETRY_S
        interval_s = (now - self._times[0]) / len(self._times)
        return min(max(self._turned_away * interval_s, _LEAST_RETRY_S), _MOST_RETRY_S)
