"""What bounds a server that runs, from the steps that it watched."""

import pytest

from shardwright.core.prediction import PartKind
from shardwright.observation import StagePassage, StepPassage
from shardwright.runtime.measured_steps import summarise, summary_sentences


def passage(worker_id, index, arrived_at, *, queue=0.0, compute=0.01, serialise=0.001, send=0.0, wire=0.001):
    return StagePassage(
        worker_id=worker_id,
        stage_index=index,
        arrived_at=arrived_at,
        started_at=arrived_at + queue,
        finished_at=arrived_at + queue + compute,
        sent_at=arrived_at + queue + compute + send,
        serialise_s=serialise,
        wire_s=wire,
        bytes_in=0,
        bytes_out=0,
    )


def step(number, sent_at, *, computes=(0.01, 0.03), wire=0.001, back=0.002, tokens=1, sequences=1, epoch=1, queue=0.0):
    """A step through a and b that begins at this time."""
    stages, at = [], sent_at
    for index, compute in enumerate(computes):
        at += wire
        stages.append(passage("ab"[index], index, at, compute=compute, wire=wire, queue=queue))
        at = stages[-1].sent_at
    return StepPassage(
        number=number,
        epoch=epoch,
        step=number,
        num_sequences=sequences,
        num_tokens=tokens,
        sent_at=sent_at,
        returned_at=at + back,
        stages=tuple(stages),
    )


def test_the_parts_of_the_mean_step_add_up_to_its_trip():
    steps = [step(1, 10.0), step(2, 10.1, computes=(0.02, 0.05), queue=0.004), step(3, 10.3, wire=0.005)]
    found = summarise(steps, is_decode=True)
    assert found.num_steps == 3
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.trip_s)
    at_b = [part for part in found.parts if part.worker_id == "b" and part.kind is PartKind.COMPUTE]
    assert at_b[0].seconds == pytest.approx((0.03 + 0.05 + 0.03) / 3 - 0.001)
    sentence, few = summary_sentences("Decode", found)
    assert sentence.startswith("Decode is bound by computing")
    assert "worker b" in sentence
    assert few == "That is from 3 steps alone; send requests, then look again."


def test_a_link_that_takes_most_of_a_step_is_named_with_its_time():
    found = summarise([step(n, n * 0.1, wire=0.022, computes=(0.002, 0.002)) for n in range(1, 6)], is_decode=True)
    first, second, *_ = summary_sentences("Decode", found)
    assert first.startswith("Decode is bound by links")
    assert second == "The link to worker a takes 22.0 ms of a 50.0 ms step."


def test_a_stage_that_computes_all_the_time_while_others_wait_is_named():
    steps = [step(n, n * 0.031, queue=0.01) for n in range(1, 40)]
    found = summarise(steps, is_decode=True)
    assert found.steps_in_flight > 1.2
    assert found.busiest == ("b", pytest.approx(0.96, abs=0.03))
    (sentence,) = summary_sentences("Decode", found)
    assert sentence.startswith("Decode is bound by worker b, which computes 9")


def test_pauses_between_stretches_of_work_do_not_count():
    found = summarise([step(1, 0.0), step(2, 100.0)], is_decode=True)
    assert found.tokens_per_s == pytest.approx(1 / found.trip_s)
    assert found.steps_in_flight == pytest.approx(1.0)


def test_steps_with_prompts_are_summed_up_for_themselves_and_older_pipelines_are_left_out():
    steps = [step(1, 0.0, epoch=1), step(2, 1.0, tokens=64, epoch=2), step(3, 2.0, tokens=2, sequences=2, epoch=2)]
    assert summarise(steps, is_decode=True).sequences_per_step == 2
    assert summarise(steps, is_decode=False).tokens_per_step == 64
    assert summarise(steps[:1], is_decode=False) is None


def test_steps_that_are_not_wholly_known_tell_nothing():
    whole = step(1, 0.0)
    fields = {name: getattr(whole, name) for name in StepPassage.__slots__}
    underway = StepPassage(**{**fields, "returned_at": None})
    unreported = StepPassage(**{**fields, "stages": whole.stages[1:]})
    assert summarise([underway, unreported], is_decode=True) is None
    assert summarise([], is_decode=True) is None
