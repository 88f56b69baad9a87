"""GPUs of which one hangs: all of them stop finishing layers, and whoever watches the ranks tells it by that."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from shardwright.model.layer_progress import LayerProgress
from shardwright.runtime.ranks import STILL_S, Ranks, _Leading, _Process
from shardwright.runtime.step_watch import FIRST_S
from shardwright.runtime.stillness import Stillness


class Mark:
    """Finished when its device is."""

    def __init__(self, device):
        self.device = device

    def record(self):
        self.place = self.device.told = self.device.told + 1

    def query(self):
        return self.place <= self.device.done


class Ranked:
    """Rank 0's view of two GPUs in its third step of four layers; rank 1's beats say what is put there."""

    def __init__(self, *, is_first=False):
        self.device = SimpleNamespace(told=0, done=0)
        progress = LayerProgress(lambda: Mark(self.device))
        for _ in range(4):
            progress.mark()
        self.ranks = ranks = Ranks.__new__(Ranks)
        ranks.devices = ("cuda:0", "cuda:1")
        ranks._num_steps = 3
        ranks._processes = [_Process(1, "cuda:1", SimpleNamespace(pid=4711), None)]
        ranks._leading = _Leading(0.0, Stillness("self", threading.get_native_id()), progress, is_first)

    def other(self, *, finished, steps_done=3, begun=4):
        (process,) = self.ranks._processes
        process.progress = {"moves": 1, "waits": False, "steps_done": steps_done, "device": [begun, finished]}

    def look(self, now_s):
        return self.ranks._find_stuck_devices(self.ranks._leading, now_s)


@pytest.fixture
def ranked():
    return Ranked()


def looks(ranked, until_s):
    """What is told, a tenth of a second apart, and when."""
    for tenth in range(int(until_s * 10) + 1):
        if (what := ranked.look(tenth / 10)) is not None:
            return tenth / 10, what
    return None


def test_devices_that_finish_nothing_are_told_within_two_seconds(ranked):
    ranked.device.done = 2
    ranked.other(finished=2)
    when_s, what = looks(ranked, 5)
    assert STILL_S <= when_s < 1.5
    assert what.startswith("no GPU of this worker has finished a layer of a step for 1.2 s; not yet over: rank 0 (")
    assert what.endswith("rank 1 (process 4711, cuda:1)")


def test_only_who_is_not_through_is_named(ranked):
    """Rank 1 was not even told all: its thread stands between two layers."""
    ranked.device.done = 4
    ranked.other(finished=2, begun=2, steps_done=2)
    _, what = looks(ranked, 5)
    assert "rank 0" not in what
    assert "rank 1 (process 4711, cuda:1)" in what


def test_devices_that_go_on_are_waited_for(ranked):
    ranked.other(finished=0)
    assert ranked.look(0.0) is None
    for now_s, done in ((1.0, 1), (2.0, 2), (3.0, 3)):
        ranked.device.done = done
        assert ranked.look(now_s) is None
    ranked.other(finished=3)
    assert ranked.look(4.0) is None
    assert ranked.look(5.3) is not None


def test_when_all_are_through_rank_0_may_take_its_time(ranked):
    ranked.device.done = 4
    ranked.other(finished=4)
    assert looks(ranked, 30) is None


def test_a_rank_that_has_said_nothing_of_its_device_yet_is_not_through(ranked):
    ranked.device.done = 4
    (process,) = ranked.ranks._processes
    process.progress = None
    assert looks(ranked, 5) is not None


def test_a_stages_first_step_may_take_longer():
    ranked = Ranked(is_first=True)
    ranked.other(finished=0)
    when_s, what = looks(ranked, 100)
    assert when_s >= FIRST_S
    assert "for 60 s" in what
