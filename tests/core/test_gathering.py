"""Requests that come to an idle pipeline together begin in one step."""

from __future__ import annotations

import pytest
from conversation import piece, ready_master, sampled, send, steps, submit, tell

from shardwright.core.events import Abort, Tick, WorkerLost
from shardwright.core.gathering import MAX_TIMES, Gathering


def test_requests_that_come_within_the_time_go_in_one_step():
    master = ready_master(gather_s=0.01)
    assert tell(master, submit(1, (5, 6)), now=1.0) == []
    assert master.next_deadline() == 1.01
    assert tell(master, submit(2, (7,)), now=1.005) == []
    assert tell(master, Tick(), now=1.01) == [], "the second request put the end off"
    assert tell(master, Tick(), now=1.015) == [send(2, piece(1, 0, (5, 6), (0,)), piece(2, 0, (7,), (1,)))]


def test_requests_that_go_on_coming_are_waited_for_only_so_long():
    gathering = Gathering(0.01)
    for number in range(2 * MAX_TIMES):
        gathering.add(1.0 + 0.009 * number)
    assert gathering.until == 1.0 + 0.01 * MAX_TIMES
    assert gathering.goes_on(1.049)
    assert not gathering.goes_on(1.05)
    assert not gathering.goes_on(1.0), "it is over, and was told so"


def test_a_prompt_that_fills_a_step_is_not_kept_waiting():
    master = ready_master(gather_s=0.01)
    assert len(steps(tell(master, submit(1, tuple(range(5, 13))), now=1.0))) == 1


def test_a_request_beside_a_running_one_is_not_kept_waiting():
    master = ready_master(gather_s=0.01, max_steps_in_flight=2)
    tell(master, submit(1, (5,)), now=1.0)
    assert len(steps(tell(master, Tick(), now=1.01))) == 1
    assert len(steps(tell(master, submit(2, (6,)), now=1.011))) == 1


def test_an_idle_pipeline_gathers_again_after_the_last_request():
    master = ready_master(gather_s=0.01)
    tell(master, submit(1, (5,), new=1), now=1.0)
    tell(master, Tick(), now=1.01)
    tell(master, sampled(2, (1, 9)), now=1.02)
    assert tell(master, submit(2, (6,)), now=2.0) == []
    assert len(steps(tell(master, Tick(), now=2.01))) == 1


def test_nothing_is_waited_for_once_all_requests_are_gone():
    master = ready_master(gather_s=0.01)
    tell(master, submit(1, (5,)), now=1.0)
    assert master.next_deadline() == 1.01
    tell(master, Abort(seq_id=1), now=1.001)
    assert master.next_deadline() is None
    tell(master, submit(2, (5,)), now=1.002)
    assert master.next_deadline() == 1.012
    tell(master, WorkerLost(worker_id="a", reason="gone"), now=1.003)
    assert master.next_deadline() is None, "a pipeline that is gone waits for nothing"


def test_a_step_of_an_aborted_sequence_is_no_idle_pipeline():
    """Until it is back the next request waits for it anyway; a time to gather would pass by unseen, again and again."""
    master = ready_master(gather_s=0.01)
    tell(master, submit(1, (5,)), now=1.0)
    tell(master, Tick(), now=1.01)
    tell(master, Abort(seq_id=1), submit(2, (6,)), now=1.02)
    tell(master, Tick(), now=1.1)
    assert master.next_deadline() is None
    assert len(steps(tell(master, sampled(2, (1, 9)), now=1.2))) == 1


def test_as_many_requests_as_can_run_are_not_kept_waiting():
    master = ready_master(gather_s=0.01, max_running=2)
    assert tell(master, submit(1, (5,)), now=1.0) == []
    (step,) = steps(tell(master, submit(2, (6,)), now=1.001))
    assert len(step.slices) == 2


def test_no_probe_goes_in_front_of_requests_that_are_gathered():
    master = ready_master(gather_s=0.01, probe_interval_s=5.0)
    tell(master, submit(1, (5,)), now=4.999)
    assert master.next_deadline() == pytest.approx(5.009)
    assert tell(master, Tick(), now=5.005) == []
    (step,) = steps(tell(master, Tick(), now=5.01))
    assert [part.seq_id for part in step.slices] == [1]
