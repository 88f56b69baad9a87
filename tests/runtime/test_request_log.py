"""What is kept of each request: times, counts and steps, nothing of its content."""

from dataclasses import replace

from shardwright.runtime.request_log import FINISHED_KEPT, FIRST_STEPS_KEPT, LAST_STEPS_KEPT, RequestLog
from shardwright.types import GREEDY, FinishReason, SequenceSlice

WALL = 1000.0


def piece(seq_id, start, count, *, samples=True):
    return SequenceSlice(
        seq_id=seq_id,
        start_position=start,
        token_ids=(777_777,) * count,
        block_table=(0,),
        sampling=GREEDY if samples else None,
    )


def test_a_request_from_its_arrival_to_its_end():
    log = RequestLog()
    log.submitted(7, 40, 10.0)
    waiting = log.request(7, WALL)
    assert (waiting.submitted_at, waiting.started_at, waiting.num_steps) == (1010.0, None, 0)
    assert log.step_sent(1, [piece(7, 16, 16, samples=False)], 10.5) == 16
    assert log.step_sent(2, [piece(7, 32, 8), piece(0, 0, 1)], 10.6) == 8, "the master's probe is nobody's prompt"
    log.token(7, 10.8)
    assert log.step_sent(3, [piece(7, 40, 1)], 10.8) == 0
    log.token(7, 10.9)
    log.finished(7, FinishReason.LENGTH, 10.9, num_preemptions=2)
    trace = log.request(7, WALL)
    assert (trace.submitted_at, trace.started_at, trace.first_token_at, trace.finished_at) == (
        1010.0,
        1010.5,
        1010.8,
        1010.9,
    )
    assert (trace.num_prompt_tokens, trace.num_cached_tokens, trace.num_output_tokens) == (40, 16, 2)
    assert (trace.reason, trace.num_preemptions, trace.num_steps) == (FinishReason.LENGTH, 2, 3)
    assert [(step.number, step.num_tokens, step.is_prompt) for step in trace.steps] == [
        (1, 16, True),
        (2, 8, True),
        (3, 1, False),
    ]
    assert log.requests(WALL) == (replace(trace, steps=()),)


def test_what_is_computed_again_counts_as_prompt_until_it_has_caught_up():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    log.step_sent(1, [piece(1, 0, 4)], 0.1)
    for index in range(3):
        log.token(1, 0.2 + index)
        log.step_sent(2 + index, [piece(1, 4 + index, 1)], 0.2 + index)
    log.step_sent(5, [piece(1, 0, 5, samples=False)], 4.0)  # preempted: its 7 tokens are computed again
    log.step_sent(6, [piece(1, 5, 1, samples=False)], 4.1)
    log.step_sent(7, [piece(1, 6, 1)], 4.2)
    assert [step.is_prompt for step in log.request(1, 0.0).steps] == [True, False, False, False, True, True, False]
    assert log.request(1, 0.0).num_cached_tokens == 0


def test_the_last_token_of_a_prompt_is_a_prompts():
    log = RequestLog()
    log.submitted(1, 1, 0.0)
    assert log.step_sent(1, [piece(1, 0, 1)], 0.1) == 1
    log.submitted(2, 17, 0.0)
    assert log.step_sent(2, [piece(2, 16, 1)], 0.1) == 1, "all others were cached"
    assert log.request(2, 0.0).num_cached_tokens == 16


def test_times_to_the_first_token_and_between_tokens_are_counted():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    log.submitted(2, 4, 0.0)
    for seq_id, first in ((1, 0.25), (2, 2.0)):
        log.token(seq_id, first)
        for index in range(1, 5):
            log.token(seq_id, first + 0.0625 * index)
    first_tokens, gaps = log.time_to_first_token, log.inter_token_latency
    assert (sum(first_tokens.counts), first_tokens.total) == (2, 2.25)
    assert (sum(gaps.counts), gaps.total) == (8, 0.5)
    assert 0.06 < gaps.quantile(0.5) < 0.08
    assert 0.2 < first_tokens.quantile(0.5) <= 0.3


def test_of_very_many_steps_the_first_and_the_last_are_kept():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    for number in range(1, 1001):
        log.step_sent(number, [piece(1, 3 + number, 1)], 0.1)
    trace = log.request(1, 0.0)
    assert trace.num_steps == 1000
    numbers = [step.number for step in trace.steps]
    first, last = list(range(1, FIRST_STEPS_KEPT + 1)), list(range(1001 - LAST_STEPS_KEPT, 1001))
    assert numbers == first + last


def test_open_requests_are_all_kept_and_of_those_that_ended_the_last():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    for seq_id in range(2, FINISHED_KEPT + 12):
        log.submitted(seq_id, 4, float(seq_id))
        log.finished(seq_id, FinishReason.STOP, seq_id + 0.5)
    ids = [trace.seq_id for trace in log.requests(0.0)]
    assert ids == [*range(FINISHED_KEPT + 11, 11, -1), 1]
    assert log.request(5, 0.0) is None
    assert log.open_ids() == (1,)


def test_what_is_over_is_made_once_and_again_when_the_clock_was_set():
    log = RequestLog()
    log.submitted(1, 4, 10.0)
    assert log.requests(WALL)[0].finished_at is None
    log.finished(1, FinishReason.STOP, 11.0)
    (trace,) = log.requests(WALL)
    assert trace.finished_at == 1011.0
    assert log.requests(WALL)[0] is trace
    assert log.requests(WALL + 60.0)[0].finished_at == 1071.0


def test_what_is_not_open_is_no_news():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    log.rejected(1)
    log.token(1, 1.0)
    log.finished(1, FinishReason.STOP, 1.0)
    assert log.requests(0.0) == ()
    assert sum(log.time_to_first_token.counts) == 0


def test_preemptions_of_an_open_request_are_noted():
    log = RequestLog()
    log.submitted(1, 4, 0.0)
    log.preempted(1, 3)
    log.preempted(2, 1)
    assert log.request(1, 0.0).num_preemptions == 3
    log.finished(1, FinishReason.ABORT, 1.0)
    assert log.request(1, 0.0).num_preemptions == 3
