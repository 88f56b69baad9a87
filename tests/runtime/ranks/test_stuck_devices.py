"""GPUs of which one hangs: all of them stop finishing layers, and whoever watches the ranks tells it by that."""

from __future__ import annotations

import pytest
from fake_device import FakeDevice

from shardwright.model.layer_progress import LayerProgress
from shardwright.runtime.rank_watch import STILL_S, RankWatch, WatchedRank
from shardwright.runtime.step_watch import FIRST_S


class Ranked:
    """Rank 0's view of two GPUs in their third step, of four layers; rank 1's beats say what is put there."""

    def __init__(self, *, is_first=False):
        self.device = FakeDevice()
        self.other = WatchedRank(1, "cuda:1", 4711)
        self.progress = LayerProgress(self.device.mark)
        self.watch = RankWatch([self.other], device="cuda:0", waits=lambda: False, on_stuck=print)
        for first in (False, False, is_first):
            self.watch.begin_step(self.progress, is_first=first)
            self.watch.end_step()  # the thread goes on, long before the device is through
        for _ in range(4):
            self.progress.mark()

    def says(self, *, finished, steps_done=3, begun=4):
        said = {"moves": 1, "waits": False, "python_threads": [], "steps_done": steps_done, "device": [begun, finished]}
        self.other.beat(said)

    def look(self, now_s):
        return self.watch.find_stuck(self.watch._leading, now_s)


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
    ranked.says(finished=2)
    when_s, what = looks(ranked, 5)
    assert STILL_S <= when_s < 1.5
    assert what.startswith("no GPU of this worker has finished a layer of a step for 1.2 s; not yet over: rank 0 (")
    assert what.endswith("rank 1 (process 4711, cuda:1)")


def test_only_who_is_not_through_is_named(ranked):
    """Rank 1 was not even told all: its thread stands between two layers."""
    ranked.device.done = 4
    ranked.says(finished=2, begun=2, steps_done=2)
    _, what = looks(ranked, 5)
    assert "rank 0" not in what
    assert "rank 1 (process 4711, cuda:1)" in what


def test_devices_that_go_on_are_waited_for(ranked):
    ranked.says(finished=0)
    assert ranked.look(0.0) is None
    for now_s, done in ((1.0, 1), (2.0, 2), (3.0, 3)):
        ranked.device.done = done
        assert ranked.look(now_s) is None
    ranked.says(finished=3)
    assert ranked.look(4.0) is None
    assert ranked.look(5.3) is not None


def test_when_all_are_through_rank_0_may_take_its_time(ranked):
    ranked.device.done = 4
    ranked.says(finished=4)
    assert looks(ranked, 30) is None


def test_a_rank_that_has_said_nothing_of_its_device_yet_is_not_through(ranked):
    ranked.device.done = 4
    assert looks(ranked, 5) is not None


def test_a_stages_first_step_may_take_longer():
    ranked = Ranked(is_first=True)
    ranked.says(finished=0)
    when_s, what = looks(ranked, 100)
    assert when_s >= FIRST_S
    assert "for 60 s" in what


def test_a_step_that_failed_is_not_waited_for(ranked):
    ranked.watch.end_step(failed=True)
    assert ranked.watch._leading is None
