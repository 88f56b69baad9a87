"""Whether the pipeline gives answers: when steps were sent, when the last one came back, when to try it with a probe.

A probe is a step of the master's own, one token through every stage. The first of a pipeline's steps is one; after
that an idle pipeline is tried again and again, if the settings want it, so that "ready" never means "was ready once".
"""

from __future__ import annotations

from collections import deque

from shardwright.types import StepId

_TRUSTED_S = 10.0
"""For how long an answer says that the pipeline works, where no interval of probes is set."""


class Liveness:
    """The times of one pipeline's steps, each sent and back in the order of their numbers."""

    def __init__(self, probe_interval_s: float | None) -> None:
        self._probe_interval_s = probe_interval_s
        self._trusted_s = _TRUSTED_S if probe_interval_s is None else 2 * probe_interval_s
        self._sent_at: deque[float] = deque()
        self._back_at: float | None = None  # when a step last came back; None: none of this pipeline's yet
        self.probe: StepId | None = None  # the probe that is on its way; nothing before it is

    def begin(self) -> None:
        """A pipeline ends or a new one begins: nothing is known of it."""
        self._sent_at.clear()
        self._back_at = None
        self.probe = None

    def sent(self, now: float) -> None:
        """A step was sent."""
        self._sent_at.append(now)

    def back(self, now: float) -> None:
        """The oldest step came back."""
        self._sent_at.popleft()
        self._back_at = now

    @property
    def next_probe(self) -> float | None:
        """When an idle pipeline is to be tried; None while a step is on its way or before the first one was back."""
        if self._probe_interval_s is None or self._sent_at or self._back_at is None:
            return None
        return self._back_at + self._probe_interval_s

    def is_live(self, now: float) -> bool:
        """Whether a step came back lately and none is overdue."""
        since = now - self._trusted_s
        if self._back_at is None or self._back_at < since:
            return False
        return not self._sent_at or self._sent_at[0] >= since

    @property
    def num_in_flight(self) -> int:
        """Steps on their way, probes among them."""
        return len(self._sent_at)
