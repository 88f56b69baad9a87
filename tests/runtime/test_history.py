"""The last hour in points and rows."""

from dataclasses import replace

import pytest
from fake_observatory import NOW, example_view

from shardwright.observation import Histogram
from shardwright.runtime.history import History
from shardwright.runtime.metrics import ROW_FIELDS, metrics_rows


def view_at(at, **counts):
    view = example_view(at=NOW + at)
    return replace(view, snapshot=replace(view.snapshot, **counts))


def look(history, view, *, prompt_tokens=0, now=None):
    history.look(view, now=view.at - NOW if now is None else now, prompt_tokens=prompt_tokens, rows=metrics_rows(view))


def test_a_point_tells_what_happened_since_the_last_look():
    history = History(kept_s=3600.0)
    before = view_at(0.0, total_output_tokens=100, total_prompt_tokens=1000, total_cached_tokens=100)
    look(history, before, prompt_tokens=900)
    assert history.points() == ()
    after = view_at(4.0, total_output_tokens=180, total_prompt_tokens=1200, total_cached_tokens=150)
    counts = Histogram(bounds=(0.1, 0.5, 1.0), counts=(2, 6, 11, 1), total=12.0)
    look(history, replace(after, time_to_first_token=counts), prompt_tokens=1100)
    (point,) = history.points()
    assert (point.at, point.interval_s) == (NOW + 4.0, 4.0)
    assert (point.output_tokens_per_s, point.prompt_tokens_per_s) == (20.0, 50.0)
    assert point.prefix_hit_ratio == 0.25
    assert point.ttft_p50_s == pytest.approx(0.75), "only the ten of this time count"
    assert (point.inter_token_p50_s, point.inter_token_p95_s) == (None, None), "no token came in this time"
    assert (point.kv_used_ratio, point.num_running, point.num_waiting) == (pytest.approx(0.4), 3, 2)
    assert (point.num_workers_lost, point.is_ready) == (0, True)


def test_a_time_without_requests_has_no_ratio_and_no_pipeline_no_blocks():
    history = History(kept_s=3600.0)
    look(history, view_at(0.0))
    look(history, view_at(5.0, num_blocks=0, num_free_blocks=0))
    (point,) = history.points()
    assert (point.prefix_hit_ratio, point.kv_used_ratio, point.output_tokens_per_s) == (None, 0.0, 0.0)


def test_what_is_older_than_it_goes_back_is_forgotten():
    history = History(kept_s=60.0)
    for index in range(40):
        look(history, view_at(5.0 * index))
    assert [point.at - NOW for point in history.points()] == [5.0 * index for index in range(27, 40)]
    assert {row["timestamp"] - NOW for row in history.rows(0.0)} == {5.0 * index for index in range(27, 40)}


def test_two_looks_at_one_moment_make_no_point():
    history = History(kept_s=60.0)
    look(history, view_at(1.0))
    look(history, view_at(1.0))
    assert history.points() == ()


def test_a_system_clock_that_was_set_makes_no_difference_to_the_rates():
    history = History(kept_s=3600.0)
    look(history, view_at(0.0, total_output_tokens=0), now=0.0)
    look(history, view_at(-500.0, total_output_tokens=50), now=5.0)
    (point,) = history.points()
    assert (point.output_tokens_per_s, point.interval_s, point.at) == (10.0, 5.0, NOW - 500.0)


def test_rows_can_be_had_from_a_moment_on():
    history = History(kept_s=3600.0)
    for at in (0.0, 5.0):
        look(history, view_at(at))
    assert [(row["timestamp"], row["worker"]) for row in history.rows(NOW)] == [
        (NOW + 5.0, "rack-1"),
        (NOW + 5.0, "desk"),
    ]
    assert list(history.rows(0.0)[0]) == list(ROW_FIELDS)
    assert history.rows(NOW + 5.0) == []


def test_rows_of_an_earlier_master_come_first_and_lack_what_it_did_not_know():
    history = History(kept_s=3600.0)
    look(history, view_at(0.0))
    earlier = [
        {"timestamp": NOW - 10.0, "worker": "old", "busy_ratio": 0.5, "of a later version": 1},
        {"timestamp": "yesterday", "worker": "mad"},
        {"timestamp": NOW - 5.0, "worker": "old"},
        {"timestamp": NOW - 5.0},
    ]
    history.remember(earlier)
    rows = history.rows(0.0)
    assert [(row["timestamp"] - NOW, row["worker"]) for row in rows] == [
        (-10.0, "old"),
        (-5.0, "old"),
        (0.0, "rack-1"),
        (0.0, "desk"),
    ]
    assert (rows[0]["busy_ratio"], rows[1]["busy_ratio"]) == (0.5, None)
    assert list(rows[0]) == list(ROW_FIELDS)
