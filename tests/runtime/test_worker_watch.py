"""One worker as its heartbeats show it: busy, sending, failing, started again."""

from dataclasses import replace

import pytest
from fake_observatory import example_report

from shardwright.runtime.worker_watch import MAX_ERROR_KINDS, ErrorCounts, WorkerWatch
from shardwright.types import LinkReport, WorkerCapacity

CAPACITY = WorkerCapacity(worker_id="a", host_id="h", device="cpu", memory_bytes=1, read_bandwidth=1.0, matrix_rate=1.0)


class Heartbeats:
    """A worker that answers at once, on a clock of its own."""

    def __init__(self):
        self.watch = WorkerWatch("[::1]:50051")
        self.watch.introduce(CAPACITY)
        self.errors = ErrorCounts()
        self.skew_s = 500.0

    def beat(self, at, *, asked_since=0, sent=0, **changes):
        link = LinkReport(peer="b", bytes_sent=sent, steps_sent=1, round_trip_s=0.001)
        report = example_report(
            clock_received_s=at + self.skew_s,
            clock_sent_s=at + self.skew_s,
            **{"link": link, "errors": (), "next_trace": 10} | changes,
        )
        self.watch.heard(report, sent_s=at - 0.001, returned_s=at + 0.001, asked_since=asked_since, errors=self.errors)


@pytest.fixture
def beats():
    return Heartbeats()


def test_busy_and_bytes_are_of_the_last_seconds(beats):
    assert (beats.watch.busy_ratio, beats.watch.link_bytes_per_s) == (None, None)
    for second in range(60):
        busy_s = 0.0 if second < 50 else 0.75 * (second - 50)
        beats.beat(float(second), busy_s=busy_s, sent=1000 * second)
    assert beats.watch.busy_ratio == pytest.approx(0.75)
    assert beats.watch.link_bytes_per_s == pytest.approx(1000.0)
    assert len(beats.watch._work) < 10


def test_a_new_stage_begins_anew(beats):
    beats.beat(1.0, busy_s=5.0, sent=4000)
    beats.beat(2.0, busy_s=5.5, sent=5000)
    assert beats.watch.busy_ratio == pytest.approx(0.5)
    beats.beat(3.0, epoch=4, busy_s=0.0, sent=0)
    assert (beats.watch.busy_ratio, beats.watch.link_bytes_per_s) == (None, None)
    beats.beat(4.0, epoch=4, busy_s=0.25, sent=700)
    assert (beats.watch.busy_ratio, beats.watch.link_bytes_per_s) == (pytest.approx(0.25), pytest.approx(700.0))


def test_who_holds_nothing_is_not_busy_and_sends_nothing(beats):
    for second in (1.0, 2.0):
        beats.beat(second, epoch=0, busy_s=0.0, link=None)
    assert (beats.watch.busy_ratio, beats.watch.link_bytes_per_s) == (None, None)


def test_traces_are_asked_for_from_where_the_last_report_ended(beats):
    beats.beat(1.0, asked_since=0, next_trace=40)
    assert beats.watch.next_trace == 40
    beats.beat(2.0, asked_since=None, next_trace=55)
    assert beats.watch.next_trace == 40, "a heartbeat without traces leaves them to the next one"
    beats.beat(3.0, asked_since=40, next_trace=60)
    assert beats.watch.next_trace == 60


def test_a_process_that_was_started_again_on_the_same_machine_is_asked_for_everything(beats):
    """The machine's clock goes on, so only the counts tell."""
    beats.beat(1.0, next_trace=40, errors=(("LinkLostError", 3),))
    beats.beat(2.0, asked_since=40, next_trace=2, errors=(("LinkLostError", 1),), steps_done=0, busy_s=0.0)
    assert beats.watch.next_trace == 0
    assert beats.errors.items() == (("LinkLostError", 4),)
    assert beats.watch.busy_ratio is None


def test_a_clock_that_jumps_means_another_machine_or_another_start_of_it(beats):
    beats.beat(1.0, next_trace=40, errors=(("LinkLostError", 3),))
    beats.skew_s = 9.0
    beats.beat(2.0, asked_since=40, next_trace=90, errors=(("LinkLostError", 5),))
    assert beats.watch.next_trace == 0
    assert beats.watch.clock.offset_s == pytest.approx(-9.0)
    assert beats.errors.items() == (("LinkLostError", 8),), "a new process's errors are all new"


def test_errors_that_were_told_before_are_counted_once(beats):
    beats.beat(1.0, errors=(("A", 1),))
    beats.beat(2.0, errors=(("A", 1), ("B", 2)))
    beats.beat(3.0, errors=(("A", 4), ("B", 2)))
    assert beats.errors.items() == (("A", 4), ("B", 2))


def test_the_kinds_of_errors_are_bounded():
    errors = ErrorCounts()
    for index in range(100):
        errors.add(f"Kind{index:03}")
    errors.add("Kind000", 5)
    counts = dict(errors.items())
    assert len(counts) == MAX_ERROR_KINDS + 1
    assert (counts["Kind000"], counts["other"]) == (6, 100 - MAX_ERROR_KINDS)


def test_a_worker_without_a_clock_of_its_own_is_timed_by_the_masters(beats):
    """As one that answers in the manner of an older version would."""
    for second in (1.0, 2.0):
        report = example_report(busy_s=second / 2, clock_received_s=0.0, clock_sent_s=0.0)
        beats.watch.heard(report, sent_s=second, returned_s=second, asked_since=0, errors=beats.errors)
    assert beats.watch.clock.offset_s is None
    assert beats.watch.busy_ratio == pytest.approx(0.5)


@pytest.mark.parametrize(("port", "target"), [(0, ""), (9464, "[::1]:9464")])
def test_prometheus_finds_the_worker_at_its_registered_host(beats, port, target):
    assert beats.watch.metrics_target == ""
    beats.watch.description = replace(_description(), metrics_port=port)
    assert beats.watch.metrics_target == target


def _description():
    from shardwright.types import WorkerDescription

    return WorkerDescription(
        protocol_version=3,
        package_version="0",
        torch_version="0",
        transformers_version="0",
        host_id="h",
        pid=1,
        device="cpu",
        device_name="",
        memory_total_bytes=1,
        memory_available_bytes=1,
        read_bandwidth=1.0,
        matrix_rate=1.0,
        num_threads=1,
    )
