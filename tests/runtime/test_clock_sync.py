"""A worker's clock told from heartbeats: skew, drift, ways that differ, processes that begin anew."""

import random  # noqa: TID251  seeded noise is the point

import pytest

from shardwright.runtime.clock_sync import KEPT, ClockSync


class Worker:
    """A clock that shows something else than the master's and runs at its own speed."""

    def __init__(self, *, skew_s=0.0, drift=0.0):
        self.skew_s = skew_s
        self.drift = drift

    def shows(self, master_s):
        return master_s * (1 + self.drift) + self.skew_s

    def offset_at(self, master_s):
        """What turns its time into the master's at that moment."""
        return master_s - self.shows(master_s)


def beat(sync, worker, at, *, there_s, back_s, held_s=0.002):
    """One heartbeat that leaves at `at`."""
    received, answered = at + there_s, at + there_s + held_s
    return sync.add(
        sent_s=at,
        received_s=worker.shows(received),
        answered_s=worker.shows(answered),
        returned_s=answered + back_s,
    )


def test_nothing_is_known_before_the_first_heartbeat():
    sync = ClockSync()
    assert (sync.offset_s, sync.round_trip_s, sync.to_master(5.0)) == (None, None, None)


@pytest.mark.parametrize("skew_s", [0.0, 1e6, -86_400.5])
def test_with_equal_ways_the_offset_is_exact(skew_s):
    sync, worker = ClockSync(), Worker(skew_s=skew_s)
    assert beat(sync, worker, 100.0, there_s=0.01, back_s=0.01)
    assert sync.offset_s == pytest.approx(-skew_s, abs=1e-6)
    assert sync.round_trip_s == pytest.approx(0.02, abs=1e-6)
    assert sync.to_master(worker.shows(123.25)) == pytest.approx(123.25, abs=1e-6)


def test_time_that_the_worker_takes_for_its_answer_is_no_way():
    sync, worker = ClockSync(), Worker(skew_s=7.0)
    beat(sync, worker, 100.0, there_s=0.01, back_s=0.01, held_s=3.0)
    assert sync.round_trip_s == pytest.approx(0.02)
    assert sync.offset_s == pytest.approx(-7.0)


@pytest.mark.parametrize("drift", [0.0, 20e-6, -80e-6, 200e-6])
@pytest.mark.parametrize("seed", range(3))
def test_the_offset_follows_a_drifting_clock_through_noise_that_is_on_one_side(seed, drift):
    """The way there is often held up, the way back rarely: a mean would be wrong by 10 ms and more."""
    draw = random.Random(seed)
    sync, worker = ClockSync(), Worker(skew_s=-4321.0, drift=drift)
    errors = []
    for second in range(600):
        noise_s = draw.choice([0.0, 0.0, 0.005, 0.02, 0.08]) * draw.random()
        there_s = 0.0004 + noise_s
        back_s = 0.0004 + draw.choice([0.0, 0.0, 0.0, 0.01]) * draw.random()
        assert beat(sync, worker, float(second), there_s=there_s, back_s=back_s), "it is the same clock all the time"
        errors.append(abs(sync.offset_s - worker.offset_at(second)))
    assert max(errors[20:]) < 0.003, "the first minute's drift is not known"
    assert max(errors[100:]) < 0.0015
    assert sorted(errors[100:])[250] < 0.0002
    assert sync.round_trip_s < 0.0015


def test_the_error_is_never_more_than_half_of_the_shortest_way():
    """All that can be promised where the ways there and back differ for good."""
    sync, worker = ClockSync(), Worker(skew_s=50.0)
    for second in range(20):
        beat(sync, worker, float(second), there_s=0.03, back_s=0.001)
    assert abs(sync.offset_s + 50.0) <= sync.round_trip_s / 2 + 1e-9


def test_processes_of_one_machine_share_its_clock_exactly():
    draw = random.Random(1)
    sync, worker = ClockSync(), Worker()
    for second in range(100):
        beat(sync, worker, float(second), there_s=draw.random() / 100, back_s=draw.random() / 1000)
        assert sync.offset_s == 0.0


def test_a_machine_that_was_started_in_the_same_moment_is_another_all_the_same():
    sync, worker = ClockSync(), Worker(skew_s=0.0004)
    for second in range(100):
        beat(sync, worker, float(second), there_s=0.001 if second % 3 else 0.0002, back_s=0.0002)
    assert sync.offset_s == pytest.approx(-0.0004, abs=1e-6)


def test_a_clock_that_jumps_is_another_clock():
    sync, worker = ClockSync(), Worker(skew_s=50.0)
    for second in range(KEPT):
        assert beat(sync, worker, float(second), there_s=0.0004, back_s=0.0004)
    worker.skew_s = 3.0
    assert not beat(sync, worker, 100.0, there_s=0.02, back_s=0.02), "though its round trip is the longest of all"
    assert sync.offset_s == pytest.approx(-3.0, abs=0.02)
    assert sync.round_trip_s == pytest.approx(0.04)
    assert beat(sync, worker, 101.0, there_s=0.0004, back_s=0.0004)
    assert sync.offset_s == pytest.approx(-3.0, abs=0.0005)


def test_a_long_silence_is_no_jump():
    sync, worker = ClockSync(), Worker(skew_s=50.0, drift=100e-6)
    beat(sync, worker, 0.0, there_s=0.0001, back_s=0.0001)
    assert beat(sync, worker, 3600.0, there_s=0.0001, back_s=0.0001)
    assert sync.offset_s == pytest.approx(worker.offset_at(3600.0), abs=0.001)


def test_an_answer_before_its_question_is_ignored():
    sync, worker = ClockSync(), Worker(skew_s=50.0)
    beat(sync, worker, 10.0, there_s=0.001, back_s=0.001)
    assert sync.add(sent_s=11.0, received_s=61.0, answered_s=60.0, returned_s=11.1)
    assert sync.add(sent_s=11.0, received_s=61.0, answered_s=63.0, returned_s=11.1)
    assert sync.offset_s == pytest.approx(-50.0)
    assert sync.round_trip_s == pytest.approx(0.002)
