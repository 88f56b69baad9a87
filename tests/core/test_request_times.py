"""Deadlines of many requests, and when to come again to a full queue."""

import pytest

from shardwright.core.request_times import Deadlines, Departures


def test_the_earliest_open_request_has_the_next_deadline():
    open_requests = {1, 2, 3}
    deadlines = Deadlines(open_requests)
    for seq_id, deadline in ((1, 5.0), (2, 3.0), (3, 4.0)):
        deadlines.add(seq_id, deadline)
    assert deadlines.next() == 3.0
    open_requests.remove(2)
    assert deadlines.next() == 4.0
    assert deadlines.take_expired(3.9) == []
    assert deadlines.take_expired(5.0) == [3, 1]
    assert deadlines.next() is None
    assert deadlines.take_expired(99.0) == []


def test_requests_that_ended_early_leave_little_behind():
    """A hundred thousand requests with an hour each, of which a hundred are open at any time."""
    open_requests: dict[int, None] = {}
    deadlines = Deadlines(open_requests)
    most = 0
    for seq_id in range(100_000):
        open_requests[seq_id] = None
        if seq_id >= 100:
            del open_requests[seq_id - 100]
        deadlines.add(seq_id, 3600.0 + seq_id)
        most = max(most, len(deadlines))
    assert most < 500
    assert deadlines.next() == 3600.0 + 99_900


def test_who_is_turned_away_later_is_told_to_come_later():
    departures = Departures()
    for second in range(0, 40, 2):
        departures.note(float(second))
    assert [departures.turn_away(40.0) for _ in range(3)] == [2.0, 4.0, 6.0]
    departures.note(40.0)
    assert departures.turn_away(40.0) == pytest.approx(3 * 40 / 21)


def test_the_time_to_wait_is_at_least_a_second_and_at_most_a_minute():
    departures = Departures()
    for _ in range(9):
        departures.note(1.0)
    assert departures.turn_away(1.1) == 1.0
    slow = Departures()
    slow.note(0.0)
    assert [slow.turn_away(50.0) for _ in range(2)] == [50.0, 60.0]


def test_without_an_end_in_the_last_minute_nothing_is_known():
    departures = Departures()
    assert departures.turn_away(5.0) == 10.0
    departures.note(5.0)
    assert departures.turn_away(65.1) == 10.0
