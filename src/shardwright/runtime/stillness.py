"""Tells for how long a process has stood still: its compute thread sleeps and nothing in the process could wake it.

Knows what Linux tells of threads: their state, and how often each has left its core. A thread that sleeps and has not
left a core since the last look has not run in between, on however busy a machine: one that waits for its turn, for
memory that was paged out or for a disk does not count as asleep. Elsewhere nothing is told, and nothing stands still.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_AT_WORK = frozenset("RD")  # running or waiting for its turn; waiting for memory or a disk


class ThreadState(NamedTuple):
    """A thread at one moment."""

    state: str  # the kernel's letter: R, S, D, T ...
    moves: int  # times that it has left a core since it began


def thread_state(pid: int | str, thread_id: int, *, proc: Path = _PROC) -> ThreadState | None:
    """How a thread is; None where that can't be told, or it has ended. `pid` may be `self`."""
    try:
        text = (proc / str(pid) / "task" / str(thread_id) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        moves = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
        return ThreadState(fields["State"].split()[0], moves)
    except (KeyError, ValueError, IndexError):
        return None


def python_threads() -> frozenset[int]:
    """The threads of this process that run Python's code, as the system numbers them."""
    return frozenset(thread.native_id for thread in threading.enumerate() if thread.native_id is not None)


class Stillness:
    """Watches one process; `look` at it several times a second."""

    def __init__(self, pid: int | str, thread_id: int, *, proc: Path = _PROC) -> None:
        """`thread_id` is the compute thread's, as the system numbers it."""
        self._pid = pid
        self.thread_id = thread_id
        self.bystanders: frozenset[int] = frozenset()
        """Threads for which the compute thread never waits, as the system numbers them. On a busy machine they may be
        found waiting for their turn again and again, with nothing of a step to do."""
        self._proc = proc
        self._seen: ThreadState | None = None
        self._since_s = 0.0
        self._at_work: set[str] = set()

    @property
    def seen(self) -> ThreadState | None:
        """The compute thread as the last look saw it."""
        return self._seen

    def forget(self) -> None:
        """Begin anew: whoever looks was away, or something else is asked for."""
        self._seen = None
        self._at_work = set()

    def look(self, now_s: float) -> float:
        """For how long it has stood still, in seconds: from one look to the next at least; 0 where it has not.

        Another thread that is at work in two looks one behind the other may be what the compute thread waits for.
        One that only wakes now and then to see whether there is something to do is not.
        """
        seen, before = thread_state(self._pid, self.thread_id, proc=self._proc), self._seen
        at_work = self._others_at_work()
        goes_on = bool(at_work & self._at_work)
        self._seen, self._at_work = seen, at_work
        if seen is None or seen.state != "S" or seen != before or goes_on:
            self._since_s = now_s
        return now_s - self._since_s

    def _others_at_work(self) -> set[str]:
        found = set()
        who_looks = threading.get_native_id()  # is at work, of course
        not_asked = {str(thread) for thread in (self.thread_id, who_looks, *self.bystanders)}
        with contextlib.suppress(OSError):
            for task in (self._proc / str(self._pid) / "task").iterdir():
                if task.name in not_asked:
                    continue
                with contextlib.suppress(OSError, IndexError):  # it has ended
                    # The name before the state is in brackets, and may hold anything.
                    text = (task / "stat").read_text(encoding="ascii", errors="replace")
                    if text.rpartition(")")[2].split()[0] in _AT_WORK:
                        found.add(task.name)
        return found
