"""Conversations with the master about requests: from submit to finish on a pipeline that works."""

from dataclasses import replace

import pytest
from conversation import (
    COSTS,
    bring_up,
    heartbeat,
    joined,
    piece,
    ready_master,
    sampled,
    send,
    settings,
    submit,
    tell,
    timing,
)

from shardwright.core.effects import AssignStage, EmitToken, Finish, OpenPipeline, PipelineReady, SendStep
from shardwright.core.events import Abort, Deploy, PipelineOpened, StageLoaded
from shardwright.core.master import MasterState
from shardwright.types import FinishReason, LayerRange, StageAssignment


def emit(seq_id: int, index: int, token_id: int) -> EmitToken:
    return EmitToken(seq_id=seq_id, index=index, token_id=token_id, logprob=-1.0)


def done(seq_id: int, reason: FinishReason, *, cached: int = 0) -> Finish:
    return Finish(seq_id=seq_id, reason=reason, num_cached_tokens=cached)


def test_a_pipeline_is_ready_after_a_token_went_through_it():
    """Load, open, probe, ready: the master's own step 1 passes every stage before any request does."""
    master = MasterState(settings(), COSTS)
    tell(master, joined("a"), joined("b"))
    stages = tuple(
        StageAssignment(
            epoch=1,
            worker_id=worker_id,
            stage_index=index,
            num_stages=2,
            layers=LayerRange(2 * index, 2 * index + 2),
            num_blocks=16,
            block_size=4,
            next_worker_id="b" if index == 0 else None,
        )
        for index, worker_id in enumerate(("a", "b"))
    )
    assert tell(master, Deploy()) == [AssignStage(assignment=stage) for stage in stages]
    assert tell(master, submit(1, (5, 6))) == []
    assert tell(master, StageLoaded(worker_id="b", epoch=1)) == []
    assert tell(master, StageLoaded(worker_id="b", epoch=1)) == []
    assert tell(master, StageLoaded(worker_id="a", epoch=1)) == [OpenPipeline(epoch=1, stages=stages)]
    assert tell(master, PipelineOpened(epoch=1)) == [send(1, piece(0, 0, (0,), (0,)))]
    assert not master.snapshot().ready
    assert tell(master, PipelineOpened(epoch=1)) == []
    assert tell(master, sampled(1, (0, 3))) == [
        PipelineReady(epoch=1, stages=stages),
        send(2, piece(1, 0, (5, 6), (0,))),
    ]
    assert master.snapshot().ready


def test_a_request_from_submit_to_its_last_token():
    master = ready_master()
    assert tell(master, submit(1, (5, 6, 7), new=2)) == [send(2, piece(1, 0, (5, 6, 7), (0,)))]
    assert tell(master, sampled(2, (1, 8))) == [emit(1, 0, 8), send(3, piece(1, 3, (8,), (0,)))]
    assert tell(master, sampled(3, (1, 9))) == [emit(1, 1, 9), done(1, FinishReason.LENGTH)]
    snapshot = master.snapshot()
    assert snapshot.num_free_blocks == snapshot.num_blocks == 16
    assert snapshot.finished == ((FinishReason.LENGTH, 1),)
    assert (snapshot.total_prompt_tokens, snapshot.total_output_tokens) == (3, 2)


def test_a_long_prompt_goes_in_chunks_and_samples_after_the_last():
    master = ready_master()
    first = tuple(range(1, 9))
    assert tell(master, submit(1, (*first, 9, 10))) == [send(2, piece(1, 0, first, (0, 1), samples=False))]
    assert tell(master, sampled(2)) == [send(3, piece(1, 8, (9, 10), (0, 1, 2)))]
    assert tell(master, sampled(3, (1, 11))) == [emit(1, 0, 11), send(4, piece(1, 10, (11,), (0, 1, 2)))]


def test_a_stop_token_is_given_out_and_ends_the_request():
    master = ready_master()
    tell(master, submit(1, (5,), stop=(7,)))
    assert tell(master, sampled(2, (1, 7))) == [emit(1, 0, 7), done(1, FinishReason.STOP)]


def test_the_context_ends_a_request_by_length():
    """31 tokens in a context of 32 leave room for one more."""
    master = ready_master(token_budget=64)
    tell(master, submit(1, tuple(range(31)), new=10))
    assert tell(master, sampled(2, (1, 7))) == [emit(1, 0, 7), done(1, FinishReason.LENGTH)]


def test_a_prompt_that_fills_the_context_still_gets_one_token():
    master = ready_master(token_budget=64)
    tell(master, submit(1, tuple(range(32)), new=10))
    assert tell(master, sampled(2, (1, 7))) == [emit(1, 0, 7), done(1, FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty; give at least one token"),
        (tuple(range(33)), "the prompt has 33 tokens, but the model's context holds 32"),
    ],
)
def test_a_request_that_no_pipeline_could_serve_ends_at_once(prompt, message):
    refused = [Finish(seq_id=1, reason=FinishReason.ERROR, message=message)]
    assert tell(MasterState(settings(), COSTS), submit(1, prompt)) == refused
    assert tell(ready_master(), submit(1, prompt)) == refused


def test_a_prompt_longer_than_all_blocks_ends_when_their_number_is_known():
    message = "the prompt has 21 tokens, but all 5 KV blocks of 4 hold 20"
    refused = Finish(seq_id=1, reason=FinishReason.ERROR, message=message)
    assert tell(ready_master(max_kv_tokens=20), submit(1, tuple(range(21)))) == [refused]
    early = MasterState(settings(max_kv_tokens=20), COSTS)
    assert tell(early, joined("a"), submit(1, tuple(range(21)))) == []
    assert tell(early, Deploy())[1:] == [refused]


def test_max_model_len_lowers_the_context():
    master = ready_master(max_model_len=3)
    assert tell(master, submit(1, (1, 2, 3, 4)))[0].message == (
        "the prompt has 4 tokens, but the model's context holds 3"
    )
    tell(master, submit(2, (1, 2)))
    assert tell(master, sampled(2, (2, 7))) == [emit(2, 0, 7), done(2, FinishReason.LENGTH)]


def test_abort_of_a_waiting_request():
    master = MasterState(settings(), COSTS)
    tell(master, submit(1, (5,)))
    assert tell(master, Abort(seq_id=1)) == [done(1, FinishReason.ABORT)]
    assert tell(master, Abort(seq_id=1)) == []
    assert tell(master, Abort(seq_id=77)) == []


def test_abort_in_flight_keeps_blocks_until_the_step_is_back():
    """Blocks of an aborted sequence stay reserved while a stage may still write them."""
    master = ready_master()
    tell(master, submit(1, (5, 6)))
    assert tell(master, Abort(seq_id=1)) == [done(1, FinishReason.ABORT)]
    assert master.snapshot().num_free_blocks == 15
    assert tell(master, sampled(2, (1, 7))) == []
    assert master.snapshot().num_free_blocks == 16


def test_an_equal_prefix_is_computed_once():
    """Two full blocks of the second prompt are reused; its last token is computed although it is known too."""
    master = ready_master(token_budget=16)
    prompt = tuple(range(1, 9))
    tell(master, submit(1, prompt, new=1))
    tell(master, sampled(2, (1, 50)))
    assert tell(master, submit(2, (*prompt, 9), new=1)) == [send(3, piece(2, 8, (9,), (0, 1, 2)))]
    assert tell(master, sampled(3, (2, 51)))[1] == done(2, FinishReason.LENGTH, cached=8)
    assert tell(master, submit(3, prompt, new=1)) == [send(4, piece(3, 4, (5, 6, 7, 8), (0, 2)))]
    assert tell(master, sampled(4, (3, 50)))[1] == done(3, FinishReason.LENGTH, cached=4)
    assert master.snapshot().total_cached_tokens == 12


def test_without_the_prefix_cache_everything_is_computed():
    master = ready_master(prefix_cache=False)
    for seq_id in (1, 2):
        sent = tell(master, submit(seq_id, (1, 2, 3, 4, 5), new=1))
        assert sent[0].step.slices[0].token_ids == (1, 2, 3, 4, 5)
        tell(master, sampled(1 + seq_id, (seq_id, 50)))


def test_two_steps_in_flight_carry_each_half_of_the_sequences():
    master = ready_master(max_steps_in_flight=2)
    assert [len(effect.step.slices) for effect in tell(master, submit(1, (1,)))] == [1]
    assert [effect.step.step for effect in tell(master, submit(2, (2,)))] == [3]
    assert tell(master, submit(3, (3,))) == []
    first = tell(master, sampled(2, (1, 10)))
    assert [[s.seq_id for s in effect.step.slices] for effect in first if isinstance(effect, SendStep)] == [[1, 3]]
    second = tell(master, sampled(3, (2, 20)))
    assert [[s.seq_id for s in effect.step.slices] for effect in second if isinstance(effect, SendStep)] == [[2]]
    assert master.snapshot().num_steps_in_flight == 2


def test_steps_in_flight_follow_what_the_workers_measure():
    """Where a step's time grows with its sequences, two machines work on two halves.

    On one machine it depends on how much two stages slow each other down, which is tried once.
    """
    slowed = [replace(timing(2, 0.05), concurrency=2)]
    for hosts, together, steps in ((("x", "y"), [], 2), (("x", "x"), [], 2), (("x", "x"), slowed, 1)):
        master = MasterState(settings(token_budget=32), COSTS)
        tell(master, *(joined(w, host_id=h) for w, h in zip("ab", hosts, strict=True)), Deploy())
        bring_up(master)
        for worker_id in "ab":
            tell(master, heartbeat(worker_id, timing(1, 0.01), timing(2, 0.02), timing(4, 0.04), *together))
        for seq_id in range(1, 5):
            tell(master, submit(seq_id, (seq_id,)))
        assert master.snapshot().max_steps_in_flight == steps


def test_a_heartbeat_of_another_epoch_measures_nothing():
    master = ready_master("a", "b")
    for worker_id in "ab":
        tell(master, heartbeat(worker_id, timing(1, 0.01), timing(2, 0.02), epoch=7))
    tell(master, submit(1, (1,)), submit(2, (2,)))
    assert master.snapshot().max_steps_in_flight == 1
