"""Notices a rank that stands still, between steps or in one, though its process lives.

Knows ranks by what they say of themselves several times a second, and by what the system says of their threads; nothing
of how they were started, and nothing of what a step computes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from shardwright.runtime.step_watch import FIRST_S, Standstill, device_state
from shardwright.runtime.stillness import Stillness, python_threads, thread_state

if TYPE_CHECKING:
    from shardwright.model.layer_progress import LayerProgress

SILENCE_S = 1.5
"""Without a beat for so long, a rank that is stopped is lost. Beats come from a thread that does nothing else."""

HUNG_S = 10.0
"""The same for one that is not stopped: on a machine with too much to do, its thread may have to wait for its turn."""

STILL_S = 1.2
"""For how long a rank that computes on CPUs may stand still in a step, where it does not wait for another; and for how
long all GPUs of a worker may finish no layer of a step that is not over."""

_LOOK_AFTER_S = 0.2  # most steps are over by then, and nobody has to look
_INTERVAL_S = 0.1


@dataclass(slots=True)
class WatchedRank:
    """A rank from 1 on, as far as its beats tell."""

    rank: int
    device: str
    pid: int
    beat_s: float | None = None  # when the last one came; None: it has not joined yet
    progress: dict[str, Any] | None = None  # where its compute thread was then
    stillness: Stillness = field(init=False)

    def __post_init__(self) -> None:
        self.stillness = Stillness(self.pid, self.pid)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid}, {self.device})"

    def joined(self) -> None:
        """From now on its beats are waited for."""
        self.beat_s = time.monotonic()

    def beat(self, progress: dict[str, Any] | None) -> None:
        """It said where it is."""
        self.progress = progress
        if progress is not None:
            self.stillness.bystanders = frozenset(progress["python_threads"])
        if self.beat_s is not None:
            self.beat_s = time.monotonic()

    def is_stuck(self, num_steps: int, now_s: float) -> bool:
        """Whether a process that stands still has one of so many steps in hand, and does not wait for another rank.

        What the last beat says is so now if the thread has not moved since. Without beats the interpreter stands
        still with it.
        """
        said, seen = self.progress, self.stillness.seen
        if self.beat_s is not None and now_s - self.beat_s > SILENCE_S:
            return True
        if said is None or seen is None or said["moves"] != seen.moves:
            return False
        return bool(said["steps_done"] < num_steps and not said["waits"])

    def has_finished(self, num_steps: int) -> bool:
        """Whether, as the last beat has it, its device has finished its part of so many steps."""
        said = self.progress
        if said is None or said["device"] is None:
            return False
        begun, finished = said["device"]
        return bool(said["steps_done"] >= num_steps and finished >= begun)

    def is_stopped(self) -> bool:
        """Whether the system has stopped the process."""
        try:
            return psutil.Process(self.pid).status() in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
        except psutil.Error:
            return False  # it has ended: its pipe tells


@dataclass(slots=True, eq=False)
class _Leading:
    """A step that rank 0 leads the others through."""

    began_s: float
    stillness: Stillness  # of rank 0
    progress: LayerProgress | None  # of its device; None on CPUs
    is_first: bool  # of its stage
    devices: Standstill = field(default_factory=Standstill)  # all of them


class RankWatch:
    """Watches all ranks of a worker from rank 0's process. `start`, then `close`."""

    def __init__(
        self,
        ranks: Sequence[WatchedRank],
        *,
        device: str,
        waits: Callable[[], bool],
        on_stuck: Callable[[str], None],
    ) -> None:
        """`device` is rank 0's; `waits` tells whether rank 0 may be waiting for the others just now.

        `on_stuck` is called once, on a thread of its own, with what is to be said.
        """
        self._ranks = tuple(ranks)
        self._device = device
        self._waits = waits
        self._on_stuck = on_stuck
        self._leading: _Leading | None = None
        self._num_steps = 0
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def close(self) -> None:
        """End watching. Safe to call twice."""
        self._closed.set()

    def begin_step(self, progress: LayerProgress | None, *, is_first: bool) -> None:
        """The calling thread leads the ranks through one more step, the stage's first one or not."""
        self._num_steps += 1
        stillness = Stillness("self", threading.get_native_id())
        self._leading = _Leading(time.monotonic(), stillness, progress, is_first)

    def end_step(self, *, failed: bool = False) -> None:
        """That thread goes on. A GPU may have much to do still, and is watched on unless the step has failed."""
        leading = self._leading
        if failed or leading is None or leading.progress is None:
            self._leading = None

    def _run(self) -> None:
        """A process that was itself stopped for a while gives the others time."""
        last_s = time.monotonic()
        looked_at: _Leading | None = None
        while not self._closed.wait(_INTERVAL_S):
            now_s = time.monotonic()
            was_away = now_s - last_s > SILENCE_S / 2
            last_s = now_s
            leading = self._leading
            if was_away or leading is not looked_at:
                looked_at = leading
                self._forget(leading)
            what = self._find_silent(now_s, was_away=was_away)
            if what is None and leading is not None:
                what = self.find_stuck(leading, now_s)
            if what is not None:
                self._on_stuck(what)
                return

    def _forget(self, leading: _Leading | None) -> None:
        for each in self._ranks:
            each.stillness.forget()
        if leading is not None:
            leading.stillness.forget()
            leading.devices = Standstill()

    def _find_silent(self, now_s: float, *, was_away: bool) -> str | None:
        """What is to be said of a rank whose beats have stopped."""
        for each in self._ranks:
            if each.beat_s is None:
                continue
            if was_away:
                each.beat_s = now_s
            elif (silence_s := now_s - each.beat_s) > SILENCE_S and (each.is_stopped() or silence_s > HUNG_S):
                return f"{each} has not moved for {HUNG_S if silence_s > HUNG_S else SILENCE_S} s"
        return None

    def find_stuck(self, leading: _Leading, now_s: float) -> str | None:
        """What is to be said of a rank that stands still in a step, though its process lives and sends beats."""
        if leading.progress is None:
            return self._find_stuck_thread(leading, now_s)
        return self._find_stuck_device(leading, leading.progress, now_s)

    def _find_stuck_thread(self, leading: _Leading, now_s: float) -> str | None:
        """On CPUs. A step that is slow is not stuck: a thread of it runs, waits for its turn on a core, or waits for a
        rank of which that is true. Whoever sleeps in a step without waiting for a rank is stuck. Where all ranks sleep,
        some of them waiting for others, nobody is left who could go on, whoever it was that began. Python's threads
        send beats, listen and serve; what computes beside the compute thread is of OpenMP or torch.
        """
        if now_s - leading.began_s < _LOOK_AFTER_S:
            return None
        num_steps = self._num_steps
        own = leading.stillness
        own.bystanders = python_threads()
        still_s = [own.look(now_s), *(each.stillness.look(now_s) for each in self._ranks)]
        if self._leading is not leading:
            return None  # it has ended meanwhile
        for each, for_s in zip(self._ranks, still_s[1:], strict=True):
            if for_s >= STILL_S and each.is_stuck(num_steps, now_s):
                return f"{each} has stood still in a step for {STILL_S} s"
        waits = self._waits()
        if still_s[0] >= STILL_S and not waits and thread_state("self", own.thread_id) == own.seen:
            return f"{self._rank_0()} has stood still in a step for {STILL_S} s"
        if min(still_s) >= STILL_S:
            return f"all ranks have stood still in a step for {STILL_S} s: each waits for another"
        return None

    def _find_stuck_device(self, leading: _Leading, progress: LayerProgress, now_s: float) -> str | None:
        """On GPUs, which are told by the layers that they finish: threads hand them over and go on.

        A GPU that hangs keeps the others in the sum before, so that none of them finishes a layer any more.
        """
        own = device_state(progress)
        others = tuple((each.progress or {}).get("device") for each in self._ranks)
        steps = tuple((each.progress or {}).get("steps_done") for each in self._ranks)
        limit_s = FIRST_S if leading.is_first else STILL_S
        waited_s = leading.devices.look((own, others, steps), now_s)
        if waited_s < limit_s or self._leading is not leading:
            return None
        unfinished = [str(each) for each in self._ranks if not each.has_finished(self._num_steps)]
        if own.begun > own.finished:
            unfinished.insert(0, self._rank_0())
        if not unfinished:
            return None  # rank 0 picks tokens
        what = f"no GPU of this worker has finished a layer of a step for {limit_s:g} s"
        return f"{what}; not yet over: {', '.join(unfinished)}"

    def _rank_0(self) -> str:
        return f"rank 0 (process {os.getpid()}, {self._device})"
