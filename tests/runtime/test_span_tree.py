"""The spans of a sequence, made of recorded steps: what lies in what, what adds up, and how many there are at most."""

import itertools

import pytest

from shardwright.observation import RequestStep, RequestTrace, StagePassage, StepPassage
from shardwright.runtime.span_tree import MAX_RUNS, RUN_STEPS, SequenceRuns, failure, sequence_attributes
from shardwright.types import FinishReason, LayerRange

T0 = 1_700_000_000.0
STEP_S = 0.010


def passage(number, *, at, tokens=1, sequences=3, batch=7, epoch=2, seconds=STEP_S, skew_s=0.0, stages=2):
    """A step through two stages: a tenth of its time on each wire, the rest computing, queued, packed and sent."""
    unit = seconds / 10

    def stage(index):
        arrived = at + unit + index * 4 * unit + skew_s
        return StagePassage(
            worker_id=f"w{index}",
            stage_index=index,
            arrived_at=arrived,
            started_at=arrived + unit * 0.5,
            finished_at=arrived + unit * 2.5,
            sent_at=arrived + unit * 3,
            serialise_s=unit * 0.25,
            wire_s=unit,
            bytes_in=100 * index,
            bytes_out=100 * (1 - index),
        )

    return StepPassage(
        number=number,
        epoch=epoch,
        step=number,
        num_sequences=sequences,
        num_tokens=batch,
        sent_at=at,
        returned_at=at + seconds,
        stages=tuple(stage(index) for index in range(stages)),
    )


def request(*, steps=0, started=T0 + 1, first_token=T0 + 2, finished=T0 + 9, reason=FinishReason.STOP):
    return RequestTrace(
        seq_id=7,
        submitted_at=T0,
        started_at=started,
        first_token_at=first_token,
        finished_at=finished,
        reason=reason,
        num_prompt_tokens=30,
        num_cached_tokens=4,
        num_output_tokens=5,
        num_preemptions=1,
        steps=(),
        num_steps=steps,
    )


def layers(epoch, index):
    return LayerRange(index * 6, index * 6 + 6) if epoch == 2 else None


def folded(*steps):
    """Runs of (passage, tokens of the sequence, whether of its prompt)."""
    runs = SequenceRuns()
    for step, count, is_prompt in steps:
        runs.add(step, RequestStep(number=step.number, num_tokens=count, is_prompt=is_prompt))
    return runs


def spans_of(runs, trace, end=T0 + 9):
    return runs.spans(trace, start=T0, end=end, layers=layers)


def walk(nodes):
    for node in nodes:
        yield node
        yield from walk(node.children)


def check_nesting(nodes, start, end):
    """Every span lies within its parent and is not turned round; siblings begin in order."""
    last = start
    for node in nodes:
        assert start <= node.start <= node.end <= end
        assert last <= node.start
        last = node.start
        check_nesting(node.children, node.start, node.end)


def decode_steps(count, *, first=1, at=T0 + 2, every=STEP_S, epoch=2):
    return [(passage(first + i, at=at + i * every, epoch=epoch), 1, False) for i in range(count)]


def test_a_sequence_is_its_queue_its_prefill_and_its_decode():
    runs = folded(
        (passage(1, at=T0 + 1), 20, True),
        (passage(2, at=T0 + 1.5), 6, True),
        *decode_steps(3, first=3),
    )
    queue, prefill, decode = spans_of(runs, request())
    assert [(s.name, s.start - T0, s.end - T0) for s in (queue, prefill, decode)] == [
        ("queue", 0, 1),
        ("prefill", 1, 2),
        ("decode", 2, 9),
    ]
    assert queue.children == ()
    assert [s.name for s in prefill.children] == ["prompt step", "prompt step"]
    assert [s.name for s in decode.children] == ["decode steps"]
    assert prefill.attributes == {"shardwright.tokens": 26, "shardwright.cached_tokens": 4}
    assert decode.attributes == {"shardwright.tokens": 3}
    check_nesting((queue, prefill, decode), T0, T0 + 9)


def test_a_step_tells_whose_it_was_and_each_of_its_stages_where_its_time_went():
    (step,) = spans_of(folded((passage(41, at=T0 + 1, batch=26), 20, True)), request())[1].children
    assert step.attributes == {
        "shardwright.epoch": 2,
        "shardwright.steps": 1,
        "shardwright.first_step": 41,
        "shardwright.last_step": 41,
        "shardwright.tokens": 20,
        "shardwright.batch.tokens": 26,
        "shardwright.batch.sequences": 3,
        "shardwright.in_pipeline_s": pytest.approx(STEP_S),
        "shardwright.return_s": pytest.approx(0.002, abs=1e-6),
    }
    first, second = step.children
    assert [first.name, second.name] == ["stage 0", "stage 1"]
    assert second.attributes == {
        "shardwright.stage": 1,
        "shardwright.layers": "6-11",
        "shardwright.worker": "w1",
        "shardwright.steps": 1,
        "shardwright.wire_s": pytest.approx(0.001),
        "shardwright.queue_s": pytest.approx(0.0005, abs=1e-6),
        "shardwright.compute_s": pytest.approx(0.00175, abs=1e-6),
        "shardwright.serialise_s": pytest.approx(0.00025),
        "shardwright.send_s": pytest.approx(0.0005, abs=1e-6),
        "shardwright.bytes_in": 100,
        "shardwright.bytes_out": 0,
    }


def test_the_parts_of_a_step_add_up_to_the_step():
    runs = folded(*decode_steps(5))
    (step,) = spans_of(runs, request())[2].children
    parts = ("wire_s", "queue_s", "compute_s", "serialise_s", "send_s")
    total = sum(stage.attributes[f"shardwright.{part}"] for stage in step.children for part in parts)
    total += step.attributes["shardwright.return_s"]
    assert total == pytest.approx(step.attributes["shardwright.in_pipeline_s"], rel=1e-3)
    assert step.attributes["shardwright.in_pipeline_s"] == pytest.approx(5 * STEP_S, rel=1e-3)


def test_decode_steps_come_in_runs_that_end_with_their_number_or_their_time():
    fast = spans_of(folded(*decode_steps(40)), request())[2].children
    assert [s.attributes["shardwright.steps"] for s in fast] == [RUN_STEPS, RUN_STEPS, 8]
    assert [s.attributes["shardwright.first_step"] for s in fast] == [1, 17, 33]
    slow = spans_of(folded(*decode_steps(10, every=0.1)), request())[2].children
    assert [s.attributes["shardwright.steps"] for s in slow] == [3, 3, 3, 1]


def test_a_very_long_answer_has_longer_runs_and_not_more_of_them():
    runs = folded(*decode_steps(5000, every=0.001), *((passage(6000 + i, at=T0 + 8), 2, True) for i in range(200)))
    *_, decode = spans_of(runs, request())
    names = [node.name for node in decode.children]
    assert names.count("decode steps") <= MAX_RUNS
    assert names.count("prompt step") <= MAX_RUNS
    assert sum(node.attributes["shardwright.steps"] for node in decode.children) == 5200 == runs.num_steps
    assert sum(node.children[0].attributes["shardwright.steps"] for node in decode.children) == 5200
    numbers = [
        (node.attributes["shardwright.first_step"], node.attributes["shardwright.last_step"])
        for node in decode.children
    ]
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(numbers))
    check_nesting(decode.children, decode.start, decode.end)


def test_a_run_ends_with_its_epoch_and_where_the_prompt_was_computed_again():
    runs = folded(
        *decode_steps(2),
        *decode_steps(2, first=3, at=T0 + 2.03, epoch=3),
        (passage(5, at=T0 + 2.06, epoch=3), 34, True),
        *decode_steps(2, first=6, at=T0 + 2.08, epoch=3),
    )
    decode = spans_of(runs, request())[2]
    told = [(s.name, s.attributes["shardwright.epoch"], s.attributes["shardwright.steps"]) for s in decode.children]
    assert told == [("decode steps", 2, 2), ("decode steps", 3, 2), ("prompt step", 3, 1), ("decode steps", 3, 2)]
    assert decode.attributes == {"shardwright.tokens": 40}
    assert "shardwright.layers" not in decode.children[1].children[0].attributes, "epoch 3's are not known"


@pytest.mark.parametrize("skew_s", [-5.0, -0.004, 0.004, 5.0])
def test_a_workers_clock_that_is_wrong_moves_spans_into_their_parents_and_no_durations(skew_s):
    runs = folded((passage(1, at=T0 + 1, skew_s=skew_s), 26, True), (passage(2, at=T0 + 2, skew_s=skew_s), 1, False))
    nodes = spans_of(runs, request())
    check_nesting(nodes, T0, T0 + 9)
    stage = nodes[1].children[0].children[0]
    assert stage.attributes["shardwright.compute_s"] == pytest.approx(0.00175, abs=1e-6)


def test_a_sequence_that_never_ran_has_waited_to_its_end():
    (queue,) = spans_of(SequenceRuns(), request(started=None, first_token=None, reason=FinishReason.DEADLINE))
    assert (queue.name, queue.start, queue.end) == ("queue", T0, T0 + 9)


def test_a_sequence_that_failed_in_its_prompt_has_no_decode():
    step = passage(1, at=T0 + 1, stages=1)
    lost = StepPassage(**{name: getattr(step, name) for name in step.__slots__} | {"returned_at": None})
    nodes = spans_of(folded((lost, 26, True)), request(first_token=None, reason=FinishReason.ERROR))
    assert [(node.name, node.end - T0) for node in nodes] == [("queue", 1), ("prefill", 9)]
    (only,) = nodes[1].children
    assert [stage.name for stage in only.children] == ["stage 0"]
    assert only.end == lost.stages[0].sent_at, "as far as it is known to have come"


def test_steps_of_which_no_worker_has_told_are_shown_without_stages():
    (step,) = spans_of(folded((passage(1, at=T0 + 1, stages=0), 26, True)), request())[1].children
    assert step.children == ()
    assert step.end - step.start == pytest.approx(STEP_S, abs=1e-6)


def test_a_sequence_tells_its_tokens_by_the_conventions_for_generative_ai():
    assert sequence_attributes(request(steps=9), num_traced_steps=8) == {
        "shardwright.sequence": 7,
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 2.0,
        "shardwright.preemptions": 1,
        "shardwright.steps": 9,
        "shardwright.traced_steps": 8,
    }


def test_only_an_answer_that_came_whole_is_no_failure():
    assert {reason: failure(reason) for reason in FinishReason if failure(reason)} == {
        reason: reason.value
        for reason in (FinishReason.ABORT, FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.REJECTED)
    }


def test_no_span_tells_anything_but_numbers_and_names_of_the_cluster():
    nodes = spans_of(folded((passage(1, at=T0 + 1), 26, True), *decode_steps(3, first=2)), request())
    texts = {value for node in walk(nodes) for value in node.attributes.values() if isinstance(value, str)}
    assert texts == {"0-5", "6-11", "w0", "w1"}
