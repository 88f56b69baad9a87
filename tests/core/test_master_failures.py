"""Conversations with the master about trouble: lost workers, failed steps and loads, old answers."""

from conversation import COSTS, bring_up, heartbeat, joined, piece, ready_master, sampled, send, settings, submit, tell

from shardwright.core.effects import (
    AssignStage,
    ClosePipeline,
    DeployFailed,
    EmitToken,
    Finish,
    OpenPipeline,
    ReleaseStage,
    SendStep,
)
from shardwright.core.events import (
    Deploy,
    PipelineOpened,
    StageLoaded,
    StageLoadFailed,
    StepFailed,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from shardwright.core.master import MasterState
from shardwright.types import FinishReason, LayerRange


def error(seq_id: int, message: str) -> Finish:
    return Finish(seq_id=seq_id, reason=FinishReason.ERROR, message=message)


def lost(worker_id: str) -> WorkerLost:
    return WorkerLost(worker_id=worker_id, reason="connection reset")


def assigned(effects: list) -> list[tuple[int, str, LayerRange]]:
    stages = [effect.assignment for effect in effects if isinstance(effect, AssignStage)]
    return [(stage.epoch, stage.worker_id, stage.layers) for stage in stages]


def test_without_recovery_a_lost_worker_ends_every_request_and_names_itself():
    master = ready_master("a", "b")
    tell(master, submit(1, (5,)), submit(2, (6,)))
    reason = "worker b was lost: connection reset"
    assert tell(master, lost("b")) == [
        ClosePipeline(epoch=1),
        ReleaseStage(worker_id="a", epoch=1),
        DeployFailed(reason=reason),
        error(1, reason),
        error(2, reason),
    ]
    assert tell(master, lost("b")) == []
    assert tell(master, sampled(2, (1, 9))) == []
    assert tell(master, submit(3, (7,))) == [error(3, reason)]
    assert [worker.status for worker in master.snapshot().workers] == ["joining", "lost"]


def test_with_recovery_a_request_goes_on_where_it_was():
    """No token is emitted twice or left out; what was computed on the lost worker is computed again."""
    master = ready_master("a", "b", recover=True)
    tell(master, submit(1, (5, 6)))
    assert tell(master, sampled(2, (1, 7)))[0] == EmitToken(seq_id=1, index=0, token_id=7, logprob=-1.0)
    effects = tell(master, lost("b"))
    assert effects[0] == ClosePipeline(epoch=1)
    assert assigned(effects) == [(2, "a", LayerRange(0, 4))]
    assert len(effects) == 2
    assert bring_up(master, epoch=2)[1] == send(2, piece(1, 0, (5, 6, 7), (0,)), epoch=2)
    assert tell(master, sampled(3, (1, 9), epoch=1)) == []
    assert tell(master, sampled(2, (1, 8), epoch=2))[0] == EmitToken(seq_id=1, index=1, token_id=8, logprob=-1.0)


def test_the_prefix_cache_is_void_after_a_new_placement():
    master = ready_master("a", "b", recover=True)
    prompt = (1, 2, 3, 4, 5)
    tell(master, submit(1, prompt, new=1), sampled(2, (1, 9)), lost("b"))
    bring_up(master, epoch=2)
    sent = tell(master, submit(2, prompt, new=1))
    assert sent == [send(2, piece(2, 0, prompt, (0, 1)), epoch=2)]


def test_a_lost_spare_worker_is_no_trouble():
    master = ready_master("a")
    tell(master, joined("spare"))
    assert tell(master, lost("spare")) == []
    assert tell(master, lost("nobody")) == []
    assert master.snapshot().ready


def test_a_worker_that_joins_again_while_it_holds_a_stage_has_lost_it():
    master = ready_master("a", "b", recover=True)
    effects = tell(master, joined("b"))
    assert assigned(effects) == [(2, "a", LayerRange(0, 4))]
    assert [worker.status for worker in master.snapshot().workers] == ["loading", "joining"]
    assert assigned(tell(master, Deploy())) == [(3, "a", LayerRange(0, 2)), (3, "b", LayerRange(2, 4))]


def test_a_deploy_that_leaves_a_worker_out_releases_it():
    """Four layers go to four workers at most; a fast fifth takes the place of one of them."""
    master = ready_master("a", "b", "c", "d")
    effects = tell(master, joined("e", read_bandwidth=1e12), Deploy())
    placed = [worker_id for _, worker_id, _ in assigned(effects)]
    (left_out,) = {"a", "b", "c", "d"} - set(placed)
    assert "e" in placed
    assert effects[:2] == [ClosePipeline(epoch=1), ReleaseStage(worker_id=left_out, epoch=1)]
    assert len(effects) == 6


def test_silence_is_a_loss_only_to_a_worker_that_was_heard():
    master = ready_master("a", "b")
    assert master.next_deadline() is None
    tell(master, heartbeat("b"), now=5.0)
    assert master.next_deadline() == 15.0
    assert tell(master, Tick(), now=14.9) == []
    assert tell(master, heartbeat("b"), now=14.9) == []
    assert master.next_deadline() == 24.9
    reason = "worker b was lost: no heartbeat for 10 s"
    assert DeployFailed(reason=reason) in tell(master, Tick(), now=24.9)
    assert master.next_deadline() is None
    assert tell(master, heartbeat("b"), now=25.0) == []


def test_workers_that_fall_silent_together_cost_one_recovery():
    master = ready_master("a", "b", "c", recover=True)
    tell(master, heartbeat("b"), heartbeat("c"), now=1.0)
    effects = tell(master, Tick(), now=11.0)
    assert assigned(effects) == [(2, "a", LayerRange(0, 4))]
    assert [type(effect) for effect in effects] == [ClosePipeline, AssignStage]


def test_a_failed_step_ends_every_request_without_recovery():
    master = ready_master("a", "b")
    tell(master, submit(1, (5,)))
    failed = StepFailed(epoch=1, step=2, worker_id="b", reason="out of memory")
    assert tell(master, failed) == [
        ClosePipeline(epoch=1),
        ReleaseStage(worker_id="a", epoch=1),
        ReleaseStage(worker_id="b", epoch=1),
        DeployFailed(reason="worker b failed at step 2: out of memory"),
        error(1, "worker b failed at step 2: out of memory"),
    ]
    assert tell(master, failed) == []


def test_recovery_from_failed_steps_ends_after_some_tries_without_progress():
    master = ready_master("a", recover=True, max_redeploys=2)
    tell(master, submit(1, (5,), new=9))
    for epoch in (1, 2):
        effects = tell(master, StepFailed(epoch=epoch, step=2, worker_id="a", reason="broken"))
        assert assigned(effects) == [(epoch + 1, "a", LayerRange(0, 4))]
        bring_up(master, epoch=epoch + 1)
    last = tell(master, StepFailed(epoch=3, step=2, worker_id="a", reason="broken"))
    assert last[-1] == error(
        1, "worker a failed at step 2: broken; gave up after 2 recoveries without one finished step"
    )


def test_a_finished_step_makes_recovery_possible_again():
    master = ready_master("a", recover=True, max_redeploys=1)
    tell(master, submit(1, (5,), new=9))
    for epoch in (1, 2, 3):
        tell(master, sampled(2, (1, 9), epoch=epoch))
        effects = tell(master, StepFailed(epoch=epoch, step=3, worker_id="a", reason="broken"))
        assert assigned(effects)[0][0] == epoch + 1
        bring_up(master, epoch=epoch + 1)


def test_a_stage_that_can_not_be_loaded_fails_the_deployment():
    master = MasterState(settings(recover=True), COSTS)
    tell(master, joined("a"), joined("b"), submit(1, (5,)), Deploy())
    reason = "worker b could not load its stage: a tensor is corrupt"
    assert tell(master, StageLoadFailed(worker_id="b", epoch=1, reason="a tensor is corrupt")) == [
        ClosePipeline(epoch=1),
        ReleaseStage(worker_id="a", epoch=1),
        DeployFailed(reason=reason),
        error(1, reason),
    ]
    assert tell(master, StageLoaded(worker_id="a", epoch=1)) == []
    assert tell(master, StageLoadFailed(worker_id="b", epoch=1, reason="again")) == []


def test_a_load_that_takes_too_long_names_who_is_late():
    master = MasterState(settings(load_timeout_s=30.0), COSTS)
    tell(master, joined("a"), joined("b"), Deploy(), StageLoaded(worker_id="a", epoch=1), now=1.0)
    assert master.next_deadline() == 31.0
    effects = tell(master, Tick(), now=31.0)
    assert DeployFailed(reason="the model was not ready after 30 s (still loading: b)") in effects


def test_a_probe_that_does_not_come_back_fails_the_deployment():
    master = MasterState(settings(load_timeout_s=30.0), COSTS)
    tell(master, joined("a"), Deploy(), StageLoaded(worker_id="a", epoch=1), PipelineOpened(epoch=1))
    effects = tell(master, Tick(), now=30.0)
    assert effects[-1] == DeployFailed(reason="the model was not ready after 30 s (no token came through the pipeline)")


def test_no_worker_is_a_failed_deployment_and_the_next_deploy_may_succeed():
    master = MasterState(settings(), COSTS)
    effects = tell(master, submit(1, (5,)), Deploy())
    assert [type(effect) for effect in effects] == [DeployFailed, Finish]
    assert effects[0].reason == effects[1].message
    assert "no worker" in effects[0].reason
    assert assigned(tell(master, joined("a"), Deploy())) == [(1, "a", LayerRange(0, 4))]
    bring_up(master)
    assert [type(effect) for effect in tell(master, submit(2, (5,)))] == [SendStep]


def test_a_failed_recovery_tells_what_began_it():
    master = ready_master("a", recover=True)
    reason = tell(master, lost("a"))[-1].reason
    assert reason.startswith("worker a was lost: connection reset; the model can't be placed again: ")


def test_answers_out_of_turn_break_the_protocol():
    for answer, what in (
        (sampled(3, (1, 9)), "step 3 came back, expected step 2"),
        (sampled(2), "step 2 came back with tokens for sequences [], expected [1]"),
        (sampled(2, (4, 9)), "step 2 came back with tokens for sequences [4], expected [1]"),
    ):
        master = ready_master("a", "b")
        tell(master, submit(1, (5,)))
        assert tell(master, answer)[-1] == error(1, f"worker b broke the protocol: {what}")


def test_a_probe_with_a_wrong_answer_breaks_the_protocol():
    master = MasterState(settings(), COSTS)
    tell(master, joined("a"), Deploy(), StageLoaded(worker_id="a", epoch=1), PipelineOpened(epoch=1))
    reason = "worker a broke the protocol: step 1 came back with 0 tokens, expected step 1 with one"
    assert tell(master, sampled(1))[-1] == DeployFailed(reason=reason)


def test_what_comes_from_an_old_epoch_is_ignored():
    master = ready_master("a", "b", recover=True)
    tell(master, submit(1, (5,)), lost("b"))
    for late in (
        sampled(2, (1, 9), epoch=1),
        StepFailed(epoch=1, step=2, worker_id="a", reason="late"),
        StageLoaded(worker_id="a", epoch=1),
        StageLoadFailed(worker_id="a", epoch=1, reason="late"),
        PipelineOpened(epoch=1),
    ):
        assert tell(master, late) == []
    assert [type(effect) for effect in tell(master, StageLoaded(worker_id="a", epoch=2))] == [OpenPipeline]


def test_epochs_begin_where_the_settings_say():
    """A master that starts anew has to be above what the workers have seen from the one before."""
    master = MasterState(settings(first_epoch=1000), COSTS)
    assert assigned(tell(master, joined("a"), Deploy()))[0][0] == 1000


def test_a_sequence_that_the_smaller_pipeline_can_not_hold_ends_with_an_error():
    """After the loss the one worker that is left has room for fewer blocks than the sequence has tokens."""
    master = MasterState(settings(recover=True, token_budget=32), COSTS)
    tell(master, joined("a", memory_bytes=5320), joined("b"), Deploy())
    bring_up(master)
    assert master.snapshot().num_blocks == 16
    tell(master, submit(1, tuple(range(20)), new=9), sampled(2, (1, 50)))
    effects = tell(master, lost("b"))
    assert [type(effect) for effect in effects] == [ClosePipeline, AssignStage, Finish]
    num_blocks = effects[1].assignment.num_blocks
    assert effects[2] == error(
        1,
        f"the prompt and its answer so far have 21 tokens, but all {num_blocks} KV blocks of 4 hold {4 * num_blocks}",
    )


def test_a_model_that_was_lost_is_placed_again_when_a_worker_joins():
    """Under an epoch above all that the worker has seen; what came between ended with the reason."""
    master = ready_master("a", recover=True)
    reason = tell(master, lost("a"))[-1].reason
    assert tell(master, submit(1, (5,))) == [error(1, reason)]
    again = WorkerJoined(capacity=joined("a").capacity, last_epoch=7)
    assert assigned(tell(master, again)) == [(8, "a", LayerRange(0, 4))]
    bring_up(master, epoch=8)
    assert [type(effect) for effect in tell(master, submit(2, (5,)))] == [SendStep]


def test_a_model_that_was_never_ready_is_not_placed_unasked():
    master = MasterState(settings(recover=True), COSTS)
    tell(master, Deploy())
    assert tell(master, joined("a")) == []
    assert master.next_deadline() is None


def test_what_failed_is_tried_again_after_longer_and_longer_times_until_a_step_is_done():
    master = ready_master("a", recover=True, max_redeploys=0, retry_after_s=5.0)
    now, epoch = 0.0, 1
    for wait in (5.0, 10.0, 20.0, 40.0, 80.0, 80.0):
        tell(master, submit(epoch, (5,)), now=now)
        tell(master, StepFailed(epoch=epoch, step=2, worker_id="a", reason="broken"), now=now)
        assert master.next_deadline() == now + wait
        now, epoch = now + wait, epoch + 1
        assert assigned(tell(master, Tick(), now=now)) == [(epoch, "a", LayerRange(0, 4))]
        bring_up(master, epoch=epoch, now=now)
    tell(master, submit(epoch, (5,), new=9), sampled(2, (epoch, 9), epoch=epoch), now=now)
    tell(master, StepFailed(epoch=epoch, step=3, worker_id="a", reason="broken"), now=now)
    assert master.next_deadline() == now + 5.0


def test_a_worker_that_joins_a_running_pipeline_is_a_spare():
    master = ready_master("a", "b", recover=True)
    tell(master, lost("b"))
    bring_up(master, epoch=2)
    assert tell(master, joined("b")) == []
    assert assigned(tell(master, lost("a"))) == [(3, "b", LayerRange(0, 4))]


def test_a_recovery_is_counted_with_its_time_and_what_is_computed_again():
    master = ready_master("a", "b", recover=True)
    tell(master, submit(1, (5, 6)), sampled(2, (1, 7)), now=1.0)
    tell(master, lost("b"), now=2.0)
    seen = master.snapshot()
    assert seen.recovering_from == "worker b was lost: connection reset"
    assert (seen.total_recoveries, seen.total_recomputed_tokens) == (0, 2)
    bring_up(master, epoch=2, now=5.5)
    seen = master.snapshot()
    assert (seen.recovering_from, seen.total_recoveries, seen.total_recovery_s) == ("", 1, 3.5)
