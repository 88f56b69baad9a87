"""Conversations with a worker's core: steps in order, stages that come and go, trouble that travels back."""

import pytest
from conversation import assignment
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core.effects import (
    AckStep,
    ComputeStep,
    DropStep,
    ForwardStep,
    LoadStage,
    PublishTokens,
    RefuseStep,
    ReportFailure,
    UnloadStage,
)
from shardwright.core.events import (
    Assigned,
    LoadFailed,
    LoadFinished,
    NextLinkLost,
    Released,
    StepArrived,
    StepComputed,
    StepErrored,
)
from shardwright.core.worker import StagePhase, WorkerState

FIRST_OF_TWO = assignment(index=0, of=2, layers=(0, 2))
OTHER_PART = assignment(epoch=2, index=1, of=2, layers=(2, 4))


def tell(worker: WorkerState, *events: object) -> list:
    effects: list = []
    for event in events:
        effects = worker.handle(event, 0.0)
        worker.check()
    return effects


def arrived(step: int, epoch: int = 1) -> StepArrived:
    return StepArrived(epoch=epoch, step=step)


def computed(step: int, epoch: int = 1) -> StepComputed:
    return StepComputed(epoch=epoch, step=step)


def errored(step: int, reason: str = "broken") -> StepErrored:
    return StepErrored(epoch=1, step=step, reason=reason)


def begun(step: int) -> list:
    return [ComputeStep(epoch=1, step=step), AckStep(epoch=1, step=step)]


def turned_back(step: int, reason: str = "broken") -> list:
    return [DropStep(epoch=1, step=step), ReportFailure(epoch=1, step=step, reason=reason)]


@pytest.fixture
def worker():
    """Holds the first of two stages in epoch 1."""
    state = WorkerState()
    tell(state, Assigned(assignment=FIRST_OF_TWO), LoadFinished(epoch=1))
    return state


def test_a_stage_is_loaded_then_takes_steps():
    worker = WorkerState()
    assert (worker.epoch, worker.assignment) == (0, None)
    assert tell(worker, Assigned(assignment=FIRST_OF_TWO)) == [LoadStage(assignment=FIRST_OF_TWO)]
    assert worker.phase is StagePhase.LOADING
    assert tell(worker, LoadFinished(epoch=1)) == []
    assert (worker.phase, worker.epoch, worker.assignment) == (StagePhase.READY, 1, FIRST_OF_TWO)
    assert tell(worker, arrived(1)) == begun(1)
    assert tell(worker, computed(1)) == [ForwardStep(epoch=1, step=1)]


def test_the_last_stage_publishes_tokens():
    worker = WorkerState()
    tell(worker, Assigned(assignment=assignment()), LoadFinished(epoch=1), arrived(1))
    assert tell(worker, computed(1)) == [PublishTokens(epoch=1, step=1)]


def test_steps_wait_in_order_and_one_computes(worker):
    assert tell(worker, arrived(1)) == begun(1)
    assert tell(worker, arrived(2)) == []
    assert tell(worker, arrived(3)) == []
    assert worker.queue_depth == 2
    assert tell(worker, computed(1)) == [*begun(2), ForwardStep(epoch=1, step=1)]
    assert tell(worker, computed(2)) == [*begun(3), ForwardStep(epoch=1, step=2)]
    assert worker.queue_depth == 0


@pytest.mark.parametrize(
    ("step", "epoch", "reason"),
    [
        (7, 1, "step 7 after step 2, expected 3"),
        (2, 1, "step 2 after step 2, expected 3"),
        (3, 4, "step 3 of epoch 4, but the stage is of epoch 1"),
        (3, 0, "step 3 of epoch 0, but the stage is of epoch 1"),
    ],
)
def test_a_step_out_of_turn_is_refused(worker, step, epoch, reason):
    tell(worker, arrived(1), arrived(2))
    assert tell(worker, arrived(step, epoch)) == [RefuseStep(epoch=epoch, step=step, reason=reason)]
    assert tell(worker, arrived(3)) == []


def test_a_step_without_a_stage_is_refused():
    worker = WorkerState()
    refused = [RefuseStep(epoch=1, step=1, reason="step 1 of epoch 1, but no stage is held")]
    assert tell(worker, arrived(1)) == refused
    tell(worker, Assigned(assignment=FIRST_OF_TWO))
    assert tell(worker, arrived(1)) == [RefuseStep(epoch=1, step=1, reason="step 1, but the stage is still loading")]


def test_a_failed_step_spoils_the_stage_until_the_next_assignment(worker):
    tell(worker, arrived(1), arrived(2), arrived(3))
    assert tell(worker, errored(1)) == [*turned_back(1), *turned_back(2), *turned_back(3)]
    assert worker.phase is StagePhase.FAILED
    assert tell(worker, arrived(4)) == turned_back(4)
    effects = tell(worker, Assigned(assignment=OTHER_PART))
    assert effects == [UnloadStage(epoch=1), LoadStage(assignment=OTHER_PART)]


def test_a_broken_link_is_reported_for_the_step_in_hand(worker):
    tell(worker, arrived(1), arrived(2))
    lost = NextLinkLost(epoch=1, reason="gone")
    assert tell(worker, lost) == [ReportFailure(epoch=1, step=1, reason="gone"), *turned_back(2, "gone")]
    assert tell(worker, lost) == []
    assert tell(worker, computed(1)) == [DropStep(epoch=1, step=1)]


def test_a_broken_link_with_nothing_in_hand_is_reported_too(worker):
    tell(worker, arrived(1), computed(1))
    lost = NextLinkLost(epoch=1, reason="gone")
    assert tell(worker, lost) == [ReportFailure(epoch=1, step=1, reason="gone")]
    assert tell(worker, arrived(2)) == turned_back(2, "gone")


def test_an_error_after_a_broken_link_is_no_news(worker):
    tell(worker, arrived(1), NextLinkLost(epoch=1, reason="gone"))
    assert tell(worker, errored(1)) == [DropStep(epoch=1, step=1)]


def test_a_broken_link_of_another_epoch_is_ignored(worker):
    assert tell(worker, NextLinkLost(epoch=3, reason="gone")) == []
    assert worker.phase is StagePhase.READY


def test_a_failed_load_leaves_the_worker_empty_and_alive():
    worker = WorkerState()
    tell(worker, Assigned(assignment=FIRST_OF_TWO))
    assert tell(worker, LoadFailed(epoch=1, reason="corrupt")) == []
    assert (worker.phase, worker.epoch) == (StagePhase.EMPTY, 0)
    assert tell(worker, Assigned(assignment=OTHER_PART)) == [LoadStage(assignment=OTHER_PART)]


def test_release_of_an_idle_stage_unloads_it(worker):
    assert tell(worker, Released(epoch=1)) == [UnloadStage(epoch=1)]
    assert tell(worker, Released(epoch=1)) == []
    assert worker.epoch == 0


def test_release_waits_for_the_compute_thread(worker):
    """Weights and KV blocks are not dropped under a step that computes."""
    tell(worker, arrived(1), arrived(2))
    assert tell(worker, Released(epoch=1)) == [DropStep(epoch=1, step=2)]
    assert (worker.phase, worker.epoch) == (StagePhase.ENDING, 0)
    assert tell(worker, arrived(3)) == [RefuseStep(epoch=1, step=3, reason="step 3 of epoch 1, but no stage is held")]
    assert tell(worker, computed(1)) == [DropStep(epoch=1, step=1), UnloadStage(epoch=1)]


def test_release_waits_for_a_step_that_fails(worker):
    tell(worker, arrived(1), Released(epoch=1))
    assert tell(worker, errored(1)) == [DropStep(epoch=1, step=1), UnloadStage(epoch=1)]


def test_release_during_load_unloads_when_it_is_done():
    worker = WorkerState()
    tell(worker, Assigned(assignment=FIRST_OF_TWO))
    assert tell(worker, Released(epoch=1)) == []
    assert tell(worker, LoadFinished(epoch=1)) == [UnloadStage(epoch=1)]


def test_a_release_that_overtakes_its_assignment_is_kept_in_mind():
    worker = WorkerState()
    tell(worker, Released(epoch=1))
    assert tell(worker, Assigned(assignment=FIRST_OF_TWO)) == []
    assert tell(worker, LoadFinished(epoch=1)) == []


def test_a_newer_assignment_replaces_an_idle_stage(worker):
    assert tell(worker, Assigned(assignment=OTHER_PART)) == [UnloadStage(epoch=1), LoadStage(assignment=OTHER_PART)]
    assert tell(worker, Released(epoch=1)) == []
    assert worker.epoch == 2


def test_the_same_part_of_the_model_may_keep_its_weights(worker):
    again = assignment(epoch=2, index=0, of=3, layers=(0, 2))
    kept = UnloadStage(epoch=1, keep_weights=True)
    assert tell(worker, Assigned(assignment=again)) == [kept, LoadStage(assignment=again)]


def test_the_same_layers_with_another_role_are_another_part():
    worker = WorkerState()
    tell(worker, Assigned(assignment=assignment(index=1, of=2, layers=(2, 4))), LoadFinished(epoch=1))
    middle = assignment(epoch=2, index=1, of=3, layers=(2, 4))
    assert tell(worker, Assigned(assignment=middle)) == [UnloadStage(epoch=1), LoadStage(assignment=middle)]


def test_a_newer_assignment_waits_for_the_compute_thread(worker):
    tell(worker, arrived(1), arrived(2))
    assert tell(worker, Assigned(assignment=OTHER_PART)) == [DropStep(epoch=1, step=2)]
    assert tell(worker, computed(1)) == [
        DropStep(epoch=1, step=1),
        UnloadStage(epoch=1),
        LoadStage(assignment=OTHER_PART),
    ]
    tell(worker, LoadFinished(epoch=2))
    assert tell(worker, arrived(1, epoch=2)) == [ComputeStep(epoch=2, step=1), AckStep(epoch=2, step=1)]


def test_a_newer_assignment_waits_for_the_load():
    worker = WorkerState()
    tell(worker, Assigned(assignment=FIRST_OF_TWO))
    assert tell(worker, Assigned(assignment=OTHER_PART)) == []
    newest = assignment(epoch=3, index=1, of=2, layers=(2, 4))
    assert tell(worker, Assigned(assignment=newest)) == []
    assert tell(worker, LoadFailed(epoch=1, reason="corrupt")) == [LoadStage(assignment=newest)]


def test_an_assignment_that_waits_can_be_released(worker):
    tell(worker, arrived(1), Assigned(assignment=OTHER_PART), Released(epoch=2))
    assert tell(worker, computed(1)) == [DropStep(epoch=1, step=1), UnloadStage(epoch=1)]


def test_an_older_or_equal_assignment_is_ignored(worker):
    assert tell(worker, Assigned(assignment=FIRST_OF_TWO)) == []
    tell(worker, Assigned(assignment=assignment(epoch=5)))
    assert tell(worker, Assigned(assignment=assignment(epoch=4))) == []
    assert worker.last_epoch == 5


def test_results_that_nobody_waits_for_are_dropped(worker):
    assert tell(worker, computed(1)) == [DropStep(epoch=1, step=1)]
    assert tell(worker, errored(4)) == [DropStep(epoch=1, step=4)]
    assert tell(worker, LoadFinished(epoch=9), LoadFailed(epoch=1, reason="late")) == []
    assert worker.phase is StagePhase.READY


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, 8), max_size=60))
def test_no_order_of_events_breaks_an_invariant(choices):
    """Any events, in any order: at most one step computes, nothing is unloaded under it, steps leave in order."""
    worker = WorkerState()
    epoch = last_step = 0
    computing: list[tuple[int, int]] = []
    loading: list[int] = []
    left: list[tuple[int, int]] = []
    for choice in choices:
        match choice:
            case 0:
                epoch += 1
                event = Assigned(assignment=assignment(epoch=epoch, layers=(0, 1 + epoch % 2)))
                last_step = 0
            case 1 if loading:
                event = LoadFinished(epoch=loading.pop())
            case 2 if loading:
                event = LoadFailed(epoch=loading.pop(), reason="corrupt")
            case 3 if computing:
                event = StepComputed(epoch=computing[0][0], step=computing.pop()[1])
            case 4 if computing:
                event = StepErrored(epoch=computing[0][0], step=computing.pop()[1], reason="broken")
            case 5:
                event = Released(epoch=epoch)
            case 6:
                event = NextLinkLost(epoch=epoch, reason="gone")
            case 7:
                event = StepArrived(epoch=epoch, step=last_step + 2)
            case _:
                last_step += 1
                event = StepArrived(epoch=epoch, step=last_step)
        for effect in tell(worker, event):
            match effect:
                case ComputeStep():
                    assert not computing
                    assert not loading
                    computing.append((effect.epoch, effect.step))
                case LoadStage():
                    assert not computing
                    assert not loading
                    loading.append(effect.assignment.epoch)
                case UnloadStage():
                    assert not computing
                    assert not loading
                case ForwardStep() | PublishTokens():
                    left.append((effect.epoch, effect.step))
                case RefuseStep() if choice != 7 and effect.epoch == epoch:
                    last_step -= 1
    assert left == sorted(set(left))
