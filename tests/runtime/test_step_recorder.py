"""Phases, traces and errors of a worker, from steps whose times are given."""

from __future__ import annotations

import time

import pytest

from shardwright.errors import LinkLostError, ProtocolError
from shardwright.runtime.step_recorder import (
    MAX_ERROR_KINDS,
    MAX_KEPT_TRACES,
    MAX_TOLD_TRACES,
    ErrorCounter,
    StepRecorder,
    Transit,
)
from shardwright.types import PHASE_BUCKETS_S, StepPhase, StepTrace


def transit(step: int, arrived_s: float = 0.0, *, started_s: float | None = None, finished_s: float | None = None,
            serialise_s: float = 0.0) -> Transit:  # fmt: skip
    started_s = arrived_s if started_s is None else started_s
    return Transit(
        epoch=3, step=step, num_sequences=2, num_tokens=9, arrived_s=arrived_s, started_s=started_s,
        finished_s=started_s if finished_s is None else finished_s, serialise_s=serialise_s, bytes_in=10, bytes_out=20,
    )  # fmt: skip


def phases(recorder: StepRecorder) -> dict[StepPhase, tuple[float, list[float]]]:
    """The total of each phase, and the bounds of the buckets that hold something."""
    bounds = (*PHASE_BUCKETS_S, float("inf"))
    found = {}
    for times in recorder.phases():
        held = [bound for bound, count in zip(bounds, times.counts, strict=True) for _ in range(count)]
        found[times.phase] = (pytest.approx(times.total_s), held)
    return found


def test_a_steps_time_is_told_by_phase():
    recorder = StepRecorder()
    recorder.record(transit(1, 10.0, started_s=10.02, finished_s=10.12, serialise_s=0.004), 10.1204)
    recorder.record(transit(2, 10.42, started_s=10.4204, finished_s=22.4204, serialise_s=0.0), 22.4204)
    assert phases(recorder) == {
        StepPhase.QUEUE: (0.0204, [0.0005, 0.025]),
        StepPhase.SERIALISE: (0.004, [0.0001, 0.005]),
        StepPhase.COMPUTE: (12.096, [0.1, float("inf")]),
        StepPhase.SEND: (0.0004, [0.0001, 0.0005]),
        StepPhase.WAIT: (0.3, [0.5]),  # of the second step: nothing is known of the time before the first
    }


def test_a_step_that_arrived_before_the_last_one_was_done_waited_for_it_and_not_the_other_way_round():
    recorder = StepRecorder()
    recorder.record(transit(1, 1.0, finished_s=2.0), 2.0)
    recorder.record(transit(2, 1.5, started_s=2.0, finished_s=3.0), 3.0)
    assert phases(recorder)[StepPhase.WAIT] == (0.0, [0.0001])
    assert phases(recorder)[StepPhase.QUEUE] == (0.5, [0.0001, 0.5])


def test_the_time_until_a_stage_is_there_is_no_steps_waiting():
    recorder = StepRecorder()
    recorder.record(transit(1, 1.0), 1.0)
    recorder.begin_stage()
    recorder.record(transit(1, 100.0), 100.0)
    assert phases(recorder)[StepPhase.WAIT] == (0.0, [])


def test_a_time_that_lies_on_a_bound_belongs_below_it():
    recorder = StepRecorder()
    recorder.record(transit(1, 0.0, finished_s=0.25), 0.25)
    assert phases(recorder)[StepPhase.COMPUTE] == (0.25, [0.25])


def test_traces_are_told_from_where_the_asker_left_off():
    recorder = StepRecorder()
    assert recorder.traces(0) == ((), 0)
    for step in (1, 2):
        recorder.record(transit(step, float(step), finished_s=step + 0.5, serialise_s=0.25), step + 0.75)
    first, then = recorder.traces(0)
    assert first == tuple(
        StepTrace(
            epoch=3, step=step, num_sequences=2, num_tokens=9, arrived_s=float(step), started_s=float(step),
            finished_s=step + 0.5, sent_s=step + 0.75, serialise_s=0.25, bytes_in=10, bytes_out=20,
        )
        for step in (1, 2)
    )  # fmt: skip
    assert then == 2
    assert recorder.traces(then) == ((), 2)
    recorder.record(transit(3), 0.0)
    assert [trace.step for trace in recorder.traces(then)[0]] == [3]
    assert recorder.traces(0)[0][:2] == first  # asking takes nothing away


def test_the_oldest_traces_are_dropped_and_many_are_told_in_parts():
    recorder = StepRecorder()
    for step in range(MAX_KEPT_TRACES + 100):
        recorder.record(transit(step), 0.0)
    steps: list[int] = []
    since = 0
    while True:
        traces, since = recorder.traces(since)
        if not traces:
            break
        assert len(traces) <= MAX_TOLD_TRACES
        steps += [trace.step for trace in traces]
    assert steps == list(range(100, MAX_KEPT_TRACES + 100))
    assert since == recorder.num_traces == MAX_KEPT_TRACES + 100


def test_a_number_that_another_process_told_leads_back_to_this_ones():
    recorder = StepRecorder()
    recorder.record(transit(1), 0.0)
    assert recorder.traces(5000) == ((), 1)


def test_errors_are_counted_by_kind_and_the_kinds_are_bounded():
    errors = ErrorCounter()
    for kind in (ProtocolError, LinkLostError, ProtocolError):
        errors.add(kind)
    assert errors.counts() == (("LinkLostError", 1), ("ProtocolError", 2))
    for number in range(40):
        errors.add(type(f"Kind{number}Error", (Exception,), {}))
    errors.add(LinkLostError)
    counts = dict(errors.counts())
    assert len(counts) == MAX_ERROR_KINDS + 1
    assert (counts["LinkLostError"], counts["other"]) == (2, 10)


def test_recording_a_step_costs_microseconds():
    """The bound is far above what it takes (about two), and far below what a step takes."""
    recorder = StepRecorder()
    steps = [transit(step, float(step), finished_s=step + 0.5) for step in range(2000)]
    best = min(_seconds(recorder, steps) for _ in range(5)) / len(steps)
    assert best < 50e-6


def _seconds(recorder: StepRecorder, steps: list[Transit]) -> float:
    begin = time.thread_time()
    for each in steps:
        recorder.record(each, each.finished_s)
    return time.thread_time() - begin
