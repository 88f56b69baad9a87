"""A process stands still when its compute thread sleeps and no thread of it has anything to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest

from shardwright.runtime.stillness import Stillness, ThreadState, python_threads, thread_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing of threads")


class FakeProc:
    """A folder like /proc with one process, 7, whose compute thread is 7 too."""

    def __init__(self, folder):
        self.folder = folder
        self.put(7, "S", 5)
        self.put(8, "S", 0)

    def put(self, thread_id, state, moves):
        task = self.folder / "7" / "task" / str(thread_id)
        task.mkdir(parents=True, exist_ok=True)
        (task / "status").write_text(
            f"Name:\tpython: 3\nState:\t{state} (whatever)\n"
            f"voluntary_ctxt_switches:\t{moves - 1}\nnonvoluntary_ctxt_switches:\t1\n"
        )
        (task / "stat").write_text(f"{thread_id} (a) R (b) {state} 1 7 7 0")


@pytest.fixture
def proc(tmp_path):
    return FakeProc(tmp_path)


@pytest.fixture
def watched(proc):
    stillness = Stillness(7, 7, proc=proc.folder)
    assert stillness.look(0.0) == 0.0  # one look shows no rest
    return stillness


def test_a_thread_that_sleeps_and_does_not_move_stands_still_since_the_first_look_that_saw_it_so(watched):
    assert [watched.look(now) for now in (0.5, 1.0, 1.5)] == [0.5, 1.0, 1.5]
    assert watched.seen == ThreadState("S", 5)


def test_a_thread_that_has_moved_in_between_begins_anew(watched, proc):
    assert watched.look(1.0) == 1.0
    proc.put(7, "S", 6)
    assert [watched.look(1.1), watched.look(1.3)] == [0.0, pytest.approx(0.2)]


@pytest.mark.parametrize("state", ["R", "D", "T"])
def test_a_thread_that_waits_for_its_turn_or_for_a_disk_does_not_stand_still(watched, proc, state):
    proc.put(7, state, 5)
    assert [watched.look(1.0), watched.look(2.0)] == [0.0, 0.0]


@pytest.mark.parametrize("state", ["R", "D"])
def test_a_helper_at_work_in_two_looks_keeps_its_process_from_standing_still(watched, proc, state):
    assert watched.look(1.0) == 1.0
    proc.put(8, state, 0)
    assert watched.look(1.1) == 1.1  # it may have woken for a moment
    assert [watched.look(1.2), watched.look(1.3)] == [0.0, 0.0]
    proc.put(8, "S", 0)
    assert [watched.look(1.4), watched.look(1.5)] == [pytest.approx(0.1), pytest.approx(0.2)]


def test_a_bystander_at_work_does_not_count(watched, proc):
    watched.bystanders = frozenset({8})
    proc.put(8, "R", 0)
    assert [watched.look(now) for now in (0.5, 1.0, 1.5)] == [0.5, 1.0, 1.5]
    proc.put(9, "R", 0)
    assert [watched.look(now) for now in (2.0, 2.5)] == [2.0, 0.0]


def test_pythons_threads_are_known_by_the_systems_numbers():
    told = threading.Event()
    others = [threading.Thread(target=told.wait) for _ in range(2)]
    for other in others:
        other.start()
    try:
        assert {threading.get_native_id(), *(other.native_id for other in others)} <= python_threads()
    finally:
        told.set()
    for other in others:
        other.join()
    assert not python_threads() & {other.native_id for other in others}


def test_a_helper_that_wakes_now_and_then_does_not_count(watched, proc):
    for number in range(1, 9):
        proc.put(8, "R" if number % 2 else "S", number)
        assert watched.look(float(number)) == number


def test_what_was_forgotten_does_not_count(watched):
    assert watched.look(1.0) == 1.0
    watched.forget()
    assert [watched.look(5.0), watched.look(5.5)] == [0.0, 0.5]


def test_of_a_process_that_can_not_be_seen_nothing_is_told(tmp_path):
    stillness = Stillness(7, 7, proc=tmp_path)
    assert [stillness.look(0.0), stillness.look(9.0)] == [0.0, 0.0]
    (tmp_path / "7" / "task" / "7").mkdir(parents=True)
    (tmp_path / "7" / "task" / "7" / "status").write_text("State:\n")
    assert thread_state(7, 7, proc=tmp_path) is None


# --- real processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def python(code, core=None):
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
            time.sleep(0.5)  # until it does what it shall
            yield process
        finally:
            process.kill()


def watch(pid, seconds):
    """The longest rest that was seen."""
    stillness = Stillness(pid, pid)
    began, longest = time.monotonic(), 0.0
    while time.monotonic() < began + seconds:
        longest = max(longest, stillness.look(time.monotonic()))
        time.sleep(0.05)
    return longest


def test_a_real_process_that_sleeps_stands_still_also_while_a_thread_of_it_polls():
    code = "import sys, threading, time\ndef poll():\n  while True: time.sleep(0.01)\n"
    code += "threading.Thread(target=poll, daemon=True).start()\nsys.stdin.read()"
    with python(code) as process:
        assert watch(process.pid, 1.5) > 0.5


def test_a_real_process_that_computes_does_not_stand_still():
    with python("while True: pass") as process:
        assert watch(process.pid, 1.0) < 0.3


def test_a_process_that_gets_hardly_any_time_does_not_stand_still():
    """It computes at the lowest priority on a core that others take."""
    core = min(os.sched_getaffinity(0))
    code = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    with python(code, core) as starved, contextlib.ExitStack() as others:
        for _ in range(4):
            others.enter_context(python("while True: pass", core))
        assert watch(starved.pid, 1.5) < 0.3


def test_a_thread_can_look_whether_another_one_of_its_process_stands_still():
    thread_id = threading.get_native_id()
    longest = []

    def look():
        stillness, until = Stillness("self", thread_id), time.monotonic() + 1.0
        seen = 0.0
        while time.monotonic() < until:
            seen = max(seen, stillness.look(time.monotonic()))
            time.sleep(0.05)
        longest.append(seen)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert longest[0] > 0.3
