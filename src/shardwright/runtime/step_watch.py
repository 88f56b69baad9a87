"""Notices that a worker hangs in a step though its process lives and answers: a deadlock, or a device that never ends.

A step that is slow goes on all the same: its thread runs, another of its process does, or its device finishes layer
after layer. Only where nothing of that is so for a long time, the worker can't be waited for any more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from shardwright.runtime.stillness import Stillness

if TYPE_CHECKING:
    from shardwright.model.layer_progress import LayerProgress

HUNG_S = 10.0
"""After so long without any progress in a step it is given up."""

FIRST_S = 60.0
"""The same for a stage's first step on a GPU, for which libraries load and set up what they need."""

_INTERVAL_S = 1.0


class DeviceState(NamedTuple):
    """How far a device was at one moment."""

    begun: int  # layers handed to it
    finished: int


@dataclass(slots=True)
class Standstill:
    """For how long something observed has stayed the same."""

    seen: object = None
    since_s: float = 0.0

    def look(self, seen: object, now_s: float) -> float:
        """Seconds since it last was different, from one look to the next at least."""
        if seen != self.seen:
            self.seen, self.since_s = seen, now_s
        return now_s - self.since_s


@dataclass(slots=True, eq=False)
class _Step:
    """A step that is computed now."""

    began_s: float
    is_first: bool  # of its stage
    thread: Stillness
    progress: LayerProgress | None
    device: Standstill = field(default_factory=Standstill)


class StepWatch:
    """Watches the compute thread of this process while it computes steps. `close` ends it."""

    def __init__(
        self,
        on_hung: Callable[[str], None],
        *,
        hung_s: float = HUNG_S,
        first_s: float = FIRST_S,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """`on_hung` is called once, on a thread of its own, with what happened; the step will never end."""
        self._on_hung = on_hung
        self._hung_s = hung_s
        self._first_s = first_s
        self._interval_s = interval_s
        self._step: _Step | None = None
        self._known: LayerProgress | None = None  # of the stage that computed a step to its end
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="step watch", daemon=True)
        self._watcher.start()

    @contextlib.contextmanager
    def step(self, progress: LayerProgress | None) -> Iterator[None]:
        """Watch what the calling thread does in the block, and the device that it does it on."""
        is_first = progress is not None and progress is not self._known
        self._step = _Step(time.monotonic(), is_first, Stillness("self", threading.get_native_id()), progress)
        try:
            yield
            self._known = progress
        finally:
            self._step = None

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        self._ended.set()

    def _watch(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(self._interval_s):
            now_s = time.monotonic()
            was_away = now_s - last_s > 2 * self._interval_s + 1.0  # the process was stopped, or the machine slept
            last_s = now_s
            step = self._step
            if step is None or now_s - step.began_s < self._interval_s:
                continue
            if was_away:
                step.thread.forget()
                step.device = Standstill()
            what = self._find_hung(step, now_s)
            if what is not None and self._step is step:
                self._on_hung(what)
                return

    def _find_hung(self, step: _Step, now_s: float) -> str | None:
        """What is to be said of a step that does not go on."""
        still_s = step.thread.look(now_s)
        if step.progress is None:
            return None if still_s < self._hung_s else f"its compute thread has stood still for {self._hung_s:g} s"
        limit_s = self._first_s if step.is_first else self._hung_s
        state = device_state(step.progress)
        waited_s = step.device.look(state, now_s)
        if waited_s < limit_s:
            return None
        if state.begun > state.finished:  # a thread that waits for a GPU may sleep or not
            return f"its device has not finished a layer for {limit_s:g} s"
        return None if still_s < limit_s else f"its compute thread has stood still for {limit_s:g} s"


def device_state(progress: LayerProgress) -> DeviceState:
    """How far a stage's device is now."""
    begun = progress.begun  # before the other, which must not be more
    return DeviceState(begun, min(progress.finished(), begun))
