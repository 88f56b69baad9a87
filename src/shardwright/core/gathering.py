"""Lets requests that come together begin together. Knows when they came; nothing of what they ask.

A pipeline without anything to compute would send off the first request of a burst by itself. From then on the others'
prompts are cut into chunks that keep that one's tokens coming, and each chunk's step costs its overhead. So an idle
pipeline waits for a moment: until for `gather_s` no further request came, and at most `MAX_TIMES` that in all.
"""

from __future__ import annotations

from typing import Final

MAX_TIMES: Final = 5


class Gathering:
    """How long the first step of an idle pipeline is put off."""

    def __init__(self, gather_s: float) -> None:
        """With 0 seconds nothing is ever put off."""
        self._gather_s = gather_s
        self._latest = 0.0  # when it ends at the latest
        self.until: float | None = None
        """When it ends unless more requests come; None: there is none."""

    def add(self, now: float) -> None:
        """A request came while nothing runs."""
        if not self._gather_s:
            return
        if self.until is None:
            self._latest = now + MAX_TIMES * self._gather_s
        self.until = min(now + self._gather_s, self._latest)

    def end(self) -> None:
        """There is nothing to wait for any more: enough came, something runs, or the pipeline is gone."""
        self.until = None

    def goes_on(self, now: float) -> bool:
        """Whether the first step still has to wait; tells once that it is over."""
        if self.until is not None and self.until <= now:
            self.until = None
        return self.until is not None
