"""Counts the layers that a stage's device has finished: work is handed to a GPU long before it is done.

Whoever watches a worker can tell by it a device that hangs from one that is slow.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

_MAX_OPEN = 512
"""So many marks are kept before the finished ones among them are dropped, where nobody asks."""


class Mark(Protocol):
    """A place in what a device was given to do."""

    def record(self) -> None:
        """Stand behind all that the device was given so far."""
        ...

    def query(self) -> bool:
        """Whether the device has come so far."""
        ...


class LayerProgress:
    """The layers of one stage, as they are handed to the device and as it finishes them, in the same order.

    The compute thread marks; any thread may ask.
    """

    def __init__(self, make_mark: Callable[[], Mark]) -> None:
        self._make_mark = make_mark
        self._open: deque[Mark] = deque()
        self._lock = threading.Lock()
        self._finished = 0
        self.begun = 0
        """Layers handed to the device since the stage was built."""

    def mark(self) -> None:
        """One more layer was handed to the device."""
        mark = self._make_mark()
        mark.record()
        self.begun += 1
        self._open.append(mark)
        if len(self._open) > _MAX_OPEN:
            self.finished()

    def finished(self) -> int:
        """How many of them the device has finished."""
        with self._lock:
            while self._open and self._open[0].query():
                self._open.popleft()
                self._finished += 1
            return self._finished


def layer_progress(device: torch.device) -> LayerProgress | None:
    """For a stage on that device; None where its layers are finished when the call that computes them returns."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return LayerProgress(torch.cuda.Event)
