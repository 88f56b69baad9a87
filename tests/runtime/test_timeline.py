"""Steps put together from what the master saw and what workers told on clocks of their own."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.runtime.clock_sync import ClockSync
from shardwright.runtime.timeline import PIPELINES_KEPT, Timeline, put_right
from shardwright.types import GREEDY, SequenceSlice, StepInput, StepTrace

WALL = 1_000_000.0


def step_of(step, *, epoch=1, counts=(1, 1)):
    slices = tuple(
        SequenceSlice(seq_id=seq_id, start_position=0, token_ids=(5,) * count, block_table=(0,), sampling=GREEDY)
        for seq_id, count in enumerate(counts, start=1)
    )
    return StepInput(epoch=epoch, step=step, slices=slices)


def trace_of(step, arrived, left, *, epoch=1, **changes):
    """Between arrival and departure a tenth is the queue's, a tenth the sending's."""
    spent = left - arrived
    trace = StepTrace(
        epoch=epoch,
        step=step,
        num_sequences=2,
        num_tokens=2,
        arrived_s=arrived,
        started_s=arrived + 0.1 * spent,
        finished_s=left - 0.1 * spent,
        sent_s=left,
        serialise_s=0.05 * spent,
        bytes_in=0,
        bytes_out=64,
    )
    return replace(trace, **changes)


def clock_with(offset_s):
    clock = ClockSync()
    clock.add(sent_s=0.0, received_s=-offset_s, answered_s=-offset_s, returned_s=0.0)
    return clock


@pytest.fixture
def timeline():
    timeline = Timeline()
    timeline.opened(1, ["a", "b"])
    return timeline


def test_a_step_is_seen_from_its_start_and_grows(timeline):
    timeline.sent(step_of(1, counts=(1, 6)), 10.0)
    (step,) = timeline.steps(0, WALL)
    assert (step.number, step.epoch, step.step, step.num_sequences, step.num_tokens) == (1, 1, 1, 2, 7)
    assert (step.sent_at, step.returned_at, step.stages, step.num_stages) == (WALL + 10.0, None, (), 2)
    timeline.returned(1, 1, 10.5)
    (step,) = timeline.steps(0, WALL)
    assert (step.returned_at, step.stages) == (WALL + 10.5, ())
    timeline.merge("b", [trace_of(1, 910.3, 910.45)], clock_with(-900.0))
    (step,) = timeline.steps(0, WALL)
    assert [(stage.worker_id, stage.stage_index, stage.wire_s) for stage in step.stages] == [("b", 1, None)]
    timeline.merge("a", [trace_of(1, 0.1, 0.2)], clock_with(10.0))
    (step,) = timeline.steps(0, WALL)
    first, second = step.stages
    times = (10.1, 10.11, 10.19, 10.2)
    assert (first.arrived_at, first.started_at, first.finished_at, first.sent_at) == pytest.approx(
        tuple(WALL + time for time in times), abs=1e-6
    )
    assert (first.wire_s, second.wire_s) == pytest.approx((0.1, 0.1))
    assert (first.worker_id, first.bytes_out, first.serialise_s) == ("a", 64, pytest.approx(0.005))


def test_what_no_clock_can_get_wrong_stays_when_clocks_are_wrong():
    """Links take 20 ms each; b's clock is read 50 ms too late, so that its step seems to end after it was back."""
    timeline = Timeline()
    timeline.opened(1, ["a", "b"])
    timeline.sent(step_of(1), 10.0)
    timeline.returned(1, 1, 10.26)
    timeline.merge("a", [trace_of(1, 10.02, 10.12)], clock_with(0.0))
    timeline.merge("b", [trace_of(1, 10.14, 10.24)], clock_with(0.05))
    (step,) = timeline.steps(0, 0.0)
    first, second = step.stages
    for stage in step.stages:
        assert stage.sent_at - stage.arrived_at == pytest.approx(0.1), "a stage's own duration is right on any clock"
        assert stage.wire_s >= 0.0
    assert step.sent_at <= first.arrived_at <= first.sent_at <= second.arrived_at <= second.sent_at
    assert second.sent_at <= step.returned_at + 1e-9
    back_s = step.returned_at - second.sent_at
    assert first.wire_s + second.wire_s + back_s == pytest.approx(0.06), "so is the links' sum"
    assert timeline.link_wire_s(2) == pytest.approx(back_s)


@pytest.mark.parametrize(
    ("visits", "gaps", "factor"),
    [
        ([(1.0, 2.0), (3.0, 4.0)], [1.0, 1.0, 1.0], 1.0),
        ([(-0.5, 0.5), (3.0, 4.0)], [0.0, 3.0 * 2.5 / 3.5, 3.0 / 3.5], 1.0),
        ([(0.5, 3.5), (3.0, 6.0)], [0.0, 0.0, 0.0], 5.0 / 6.0),
        ([(0.0, 0.0), (6.0, 6.0)], [0.0, 5.0, 0.0], 1.0),
    ],
)
def test_links_never_take_less_than_nothing(visits, gaps, factor):
    found, found_factor = put_right(0.0, 5.0, visits)
    assert found == pytest.approx(gaps)
    assert found_factor == pytest.approx(factor)
    inside = sum(left - arrived for arrived, left in visits)
    assert sum(found) + found_factor * inside == pytest.approx(5.0), "the trip took what it took"


@given(
    cuts=st.lists(st.floats(0.0, 100.0), min_size=2, max_size=10).filter(lambda cuts: len(cuts) % 2 == 0),
    errors=st.lists(st.floats(-50.0, 50.0), min_size=5, max_size=5),
)
def test_however_wrong_the_clocks_are_the_sum_of_all_is_the_trips(cuts, errors):
    """A true trip from 0 to 100, seen with each stage's clock wrong by as much as half of it."""
    cuts = sorted(cuts)
    visits = [(a + e, b + e) for (a, b), e in zip(zip(cuts[::2], cuts[1::2], strict=True), errors, strict=False)]
    gaps, factor = put_right(0.0, 100.0, visits)
    assert min(gaps) >= 0.0
    inside = sum(left - arrived for arrived, left in visits)
    assert sum(gaps) + factor * inside == pytest.approx(100.0, abs=1e-6)
    assert factor == pytest.approx(1.0), "the stages' own times are right"


def test_a_step_under_way_is_never_shown_at_a_stage_before_it_was_sent(timeline):
    timeline.sent(step_of(1), 10.0)
    timeline.merge("a", [trace_of(1, 9.5, 9.7)], clock_with(0.0))
    timeline.merge("b", [trace_of(1, 9.6, 9.9)], clock_with(0.0))
    (step,) = timeline.steps(0, 0.0)
    first, second = step.stages
    assert (first.arrived_at, first.sent_at) == pytest.approx((10.0, 10.2))
    assert (second.arrived_at, second.sent_at) == pytest.approx((10.2, 10.5))
    assert (first.wire_s, second.wire_s) == (0.0, 0.0)


def test_whoever_follows_gets_each_step_again_when_more_is_known(timeline):
    assert timeline.steps_changed(0, WALL) == (0, ())
    timeline.sent(step_of(1), 1.0)
    timeline.sent(step_of(2), 2.0)
    cursor, steps = timeline.steps_changed(0, WALL)
    assert [step.number for step in steps] == [1, 2]
    assert timeline.steps_changed(cursor, WALL) == (cursor, ())
    timeline.returned(1, 1, 3.0)
    cursor, steps = timeline.steps_changed(cursor, WALL)
    assert [(step.number, step.returned_at) for step in steps] == [(1, WALL + 3.0)]
    timeline.merge("a", [trace_of(1, 1.1, 1.2), trace_of(2, 2.1, 2.2)], clock_with(0.0))
    cursor, steps = timeline.steps_changed(cursor, WALL)
    assert [(step.number, len(step.stages)) for step in steps] == [(1, 1), (2, 1)]
    timeline.merge("a", [trace_of(1, 1.15, 1.25)], clock_with(0.0))
    assert timeline.steps_changed(cursor, WALL) == (cursor, ()), "what was told before is no news"
    assert len(timeline.steps_changed(cursor + 1000, WALL)[1]) == 2, "a cursor of another master counts as none"
    same, steps = timeline.steps_changed(0, WALL, limit=1)
    assert (same, [step.number for step in steps]) == (cursor, [2]), "of many only the newest, and nothing of the rest"
    assert len(timeline.steps_changed(0, WALL, limit=5)[1]) == 2


def test_steps_are_counted_over_all_pipelines_and_given_by_number(timeline):
    timeline.sent(step_of(1), 1.0)
    timeline.opened(2, ["b"])
    timeline.sent(step_of(1, epoch=2), 2.0)
    timeline.sent(step_of(2, epoch=2), 3.0)
    assert [(step.number, step.epoch, step.step) for step in timeline.steps(1, 0.0)] == [(2, 2, 1), (3, 2, 2)]
    assert timeline.steps(3, 0.0) == ()
    assert timeline.steps(99, 0.0) == ()
    timeline.merge("b", [trace_of(1, 2.1, 2.2, epoch=2)], clock_with(0.0))
    assert [stage.stage_index for stage in timeline.steps(1, 0.0)[0].stages] == [0], "b is the first stage now"


def test_only_so_many_steps_and_pipelines_are_kept():
    timeline = Timeline(kept=10)
    for epoch in range(1, 100):
        timeline.opened(epoch, ["a"])
        timeline.sent(step_of(1, epoch=epoch), float(epoch))
    assert [step.number for step in timeline.steps(0, 0.0)] == list(range(90, 100))
    assert len(timeline.steps(95, 0.0)) == 4
    assert len(timeline._pipelines) == PIPELINES_KEPT


def test_traces_of_unknown_steps_and_strange_workers_are_ignored(timeline):
    timeline.sent(step_of(1), 1.0)
    timeline.merge("a", [trace_of(9, 1.1, 1.2), trace_of(1, 1.1, 1.2, epoch=7)], clock_with(0.0))
    timeline.merge("stranger", [trace_of(1, 1.1, 1.2)], clock_with(0.0))
    timeline.merge("a", [trace_of(1, 1.1, 1.2)], ClockSync())
    assert timeline.returned(1, 9, 2.0) is None
    (step,) = timeline.steps(0, 0.0)
    assert step.stages == ()


def test_times_of_a_trace_that_go_back_are_held_in_order(timeline):
    timeline.sent(step_of(1), 1.0)
    timeline.merge("a", [trace_of(1, 1.5, 1.6, started_s=1.2, finished_s=1.1, sent_s=1.0)], clock_with(0.0))
    (stage,) = timeline.steps(0, 0.0)[0].stages
    assert stage.arrived_at == stage.started_at == stage.finished_at == stage.sent_at == 1.5


@pytest.mark.parametrize("is_told_first", [False, True], ids=["back first", "told first"])
def test_the_ways_are_counted_once_for_each_step(timeline, is_told_first):
    def tell():
        timeline.merge("a", [trace_of(1, 1.25, 1.5)], clock_with(0.0))
        timeline.merge("b", [trace_of(1, 1.625, 1.75)], clock_with(0.0))

    assert timeline.wire("a") is None
    timeline.sent(step_of(1), 1.0)
    if is_told_first:
        tell()
    timeline.returned(1, 1, 2.0)
    assert timeline.returned(1, 1, 3.0) is None
    tell()
    tell()
    assert [timeline.wire(worker).total for worker in ("a", "b")] == [0.25, 0.125]
    assert [sum(timeline.wire(worker).counts) for worker in ("a", "b")] == [1, 1]
    assert [timeline.link_wire_s(index) for index in range(4)] == [0.25, 0.125, 0.25, None]
    timeline.opened(2, ["b", "a"])
    assert timeline.link_wire_s(0) is None, "the links of a new pipeline are others"
    assert timeline.wire("a").total == 0.25, "the worker's count goes on"


def test_a_passage_is_made_once_and_again_when_the_clock_was_set(timeline):
    timeline.sent(step_of(1), 1.0)
    (step,) = timeline.steps(0, WALL)
    assert timeline.steps(0, WALL)[0] is step
    assert timeline.steps(0, WALL + 60.0)[0].sent_at == step.sent_at + 60.0
