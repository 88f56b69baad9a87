"""The simulation finds bugs that are planted in the core: what it lets pass means something."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import simulated_cluster
from simulated_cluster import play

from shardwright.core import scheduler
from shardwright.core.block_pool import BlockPool, PrefixKey
from shardwright.core.events import StepArrived, TokensSampled
from shardwright.core.master import MasterState
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
    failure = first_failure(200, master_class=CredulousMaster)
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
