"""The simulation finds bugs that are planted in the core: what it lets pass means something."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import simulated_cluster
from simulated_cluster import play

from shardwright.core import master, scheduler
from shardwright.core.block_pool import BlockPool, PrefixKey
from shardwright.core.events import StepArrived, TokensSampled
from shardwright.core.master import MasterState
from shardwright.core.request_times import Deadlines
from shardwright.core.scheduler import Scheduler
from shardwright.core.worker import WorkerState


class UncheckedMaster(MasterState):
    """Checks no invariant: the clients' answers alone have to tell."""

    def check(self) -> None:
        pass


class ForgetfulPool(BlockPool):
    """Frees blocks at once, although a step in flight still writes them."""

    def free(self, blocks: Sequence[int], *, in_flight: bool) -> None:
        super().free(blocks, in_flight=False)

    def drained(self, blocks: Sequence[int]) -> None:
        pass


class DoublePool(BlockPool):
    """Gives a block that is free to two who ask."""

    def _take_free(self) -> int:
        block = super()._take_free()
        if block % 5 == 3:
            self._blank.insert(0, block)
        return block


class CollidingPool(BlockPool):
    """Names a block's content by its first token, as if a hash had collided."""

    def key(self, parent: int, tokens: Sequence[int]) -> PrefixKey:
        return parent, (tokens[0],)


class OrphaningPool(BlockPool):
    """Finds a block's content without regard to what stands before it."""

    def key(self, parent: int, tokens: Sequence[int]) -> PrefixKey:
        return 0, tuple(tokens)


class HastyPool(BlockPool):
    """Offers the very last prompt token for reuse, so that nothing is left to compute."""

    def find_prefix(self, tokens: Sequence[int], most_tokens: int | None = None) -> tuple[list[int], int]:
        return super().find_prefix(tokens, len(tokens))


class CredulousMaster(MasterState):
    """Takes an old epoch's answer for one of the current epoch."""

    def _on_tokens(self, event: TokensSampled, now: float) -> list:
        return super()._on_tokens(replace(event, epoch=self._epoch), now)


class SlackWorker(WorkerState):
    """Takes steps of any epoch and after any gap."""

    def _on_step_arrived(self, event: StepArrived) -> list:
        if self.assignment is not None and not self._queue and self._computing is None:
            self._last_arrived = event.step - 1
        return super()._on_step_arrived(event)


class TrustingScheduler(Scheduler):
    """Thinks that the last stage still knows a sequence that was preempted."""

    def _preempt(self, victim: Sequence) -> None:
        was_set_up = victim.is_set_up
        super()._preempt(victim)
        victim.is_set_up = was_set_up


class StaleScheduler(Scheduler):
    """Never tells the last stage what it may forget."""

    def take_dropped(self) -> tuple[int, ...]:
        return ()


class EagerScheduler(Scheduler):
    """Has the last stage forget sequences that it never heard of."""

    def _release(self, sequence: Sequence) -> None:
        sequence.is_set_up = sequence.has_setup
        super()._release(sequence)


class ChattyScheduler(Scheduler):
    """Sends a sequence's setup with each of its tokens."""

    def _slice(self, part: scheduler.StepPart) -> object:
        part.sequence.is_set_up = False
        return super()._slice(part)


class HoldingScheduler(Scheduler):
    """Never lets a sequence go that once waited for another's block."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._ever: set[PrefixKey] = set()

    def _is_being_computed(self) -> set[PrefixKey]:
        self._ever |= super()._is_being_computed()
        return self._ever


class RepeatingScheduler(Scheduler):
    """Asks for all scores of a prompt again after a preemption."""

    def _preempt(self, victim: Sequence) -> None:
        super()._preempt(victim)
        victim.next_scored = 1


class ReusingScheduler(Scheduler):
    """Lets a prompt whose tokens are to be scored begin after what the prefix cache has of it."""

    def _admit(self, *args: object) -> None:
        for sequence in self.waiting:
            if sequence.has_unscored:
                found, _ = self.pool.find_prefix(sequence.tokens)
                sequence.next_scored = max(sequence.next_scored, len(found) * self.pool.block_size + 1)
        super()._admit(*args)


class SharingMaster(MasterState):
    """Its probes write a block that sequences use too."""

    def _probe_block(self) -> int:
        return 0


class SleepyDeadlines(Deadlines):
    """Forgets to wake the shell up."""

    def next(self) -> float | None:
        return None


def first_failure(seeds: int, *, master_class: type[MasterState] = MasterState) -> str | None:
    for seed in range(seeds):
        try:
            play(seed, master_class=master_class)
        except AssertionError as exc:
            return str(exc)
    return None


def test_finds_blocks_that_are_freed_while_a_step_in_flight_writes_them(monkeypatch):
    monkeypatch.setattr(scheduler, "BlockPool", ForgetfulPool)
    failure = first_failure(60)
    assert failure is not None
    assert "is free while step" in failure


def test_finds_an_old_epochs_answer_that_is_accepted():
    failure = first_failure(300, master_class=CredulousMaster)
    assert failure is not None
    assert "TokensSampled" in failure or "is not the beginning of" in failure


def test_finds_a_block_that_is_given_twice(monkeypatch):
    monkeypatch.setattr(scheduler, "BlockPool", DoublePool)
    assert first_failure(20) is not None


@pytest.mark.parametrize("pool", [CollidingPool, OrphaningPool])
def test_finds_wrong_blocks_by_their_wrong_tokens_alone(monkeypatch, pool):
    """No invariant is checked here: the fake stages read what others wrote, and the answers show it."""
    monkeypatch.setattr(scheduler, "BlockPool", pool)
    failure = first_failure(60, master_class=UncheckedMaster)
    assert failure is not None
    assert "is not the beginning of" in failure


def test_finds_a_prompt_of_which_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(scheduler, "BlockPool", HastyPool)
    assert first_failure(100) is not None


@pytest.mark.parametrize(
    ("planted", "messages"),
    [
        (TrustingScheduler, ["has penalties and no setup", "is not the beginning of", "of which nothing is kept"]),
        (StaleScheduler, ["are kept", "is set up twice"]),
        (EagerScheduler, ["of which nothing is kept"]),
        (ChattyScheduler, ["is set up twice"]),
        (HoldingScheduler, ["are open", "never ended", "its deadline was"]),
        (RepeatingScheduler, ["wrong scores", "EmitPromptScores"]),
        (ReusingScheduler, ["scores"]),
    ],
)
def test_finds_wrong_setups_and_scores_and_endless_waiting_by_what_others_see(monkeypatch, planted, messages):
    """No invariant of the scheduler is checked here: the fake last stage and the clients have to tell."""

    class Unchecked(planted):
        def check(self, sequences: object) -> None:
            pass

    monkeypatch.setattr(master, "Scheduler", Unchecked)
    failure = first_failure(100)
    assert failure is not None
    assert any(message in failure for message in messages), failure


def test_finds_a_probe_that_writes_into_a_sequences_block():
    failure = first_failure(60, master_class=SharingMaster)
    assert failure is not None
    assert "is a probe in a sequence's block" in failure


def test_finds_a_deadline_that_passes_unseen(monkeypatch):
    monkeypatch.setattr(master, "Deadlines", SleepyDeadlines)
    failure = first_failure(60)
    assert failure is not None
    assert "its deadline was" in failure


def test_finds_a_worker_that_takes_steps_out_of_turn(monkeypatch):
    """A worker that was started again in the same place takes the old process's late steps for its own."""
    monkeypatch.setattr(simulated_cluster, "WorkerState", SlackWorker)
    monkeypatch.setattr(simulated_cluster.Simulation, "_send", reordering(simulated_cluster.Simulation._send))
    failure = first_failure(100)
    assert failure is not None


def reordering(send):
    """A network that now and then swaps two messages of one link."""

    def swapped(self, link, call, *args, worker=None):
        if self.rng.random() < 0.1:
            self._send_unordered(call, *args, worker=worker)
        else:
            send(self, link, call, *args, worker=worker)

    return swapped
