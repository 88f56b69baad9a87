"""Chooses what the next step computes. Knows sequences and block counts; nothing of tensors, workers or time.

There is no prefill phase and no decode phase: every sequence has computed tokens that catch up with its known
tokens, under one token budget, running sequences first. Chunked prefill, prefix reuse, preemption by
recomputation and replay after a failure are all that one loop. A sequence is in at most one step in flight.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from shardwright.core.block_pool import BlockPool
from shardwright.core.sequence import Sequence, SequenceStatus
from shardwright.core.settings import CoreSettings
from shardwright.types import (
    BlockId,
    Epoch,
    FinishReason,
    SeqId,
    SequenceSlice,
    StepId,
    StepInput,
    TokenOut,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A sequence that is over, and why."""

    sequence: Sequence
    reason: FinishReason
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A sequence that got a token, and whether that was its last one."""

    sequence: Sequence
    token: TokenOut
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """One sequence's share of a step in flight."""

    sequence: Sequence
    start: int
    num_tokens: int
    table: tuple[BlockId, ...]
    samples: bool


def _arrival(sequence: Sequence) -> SeqId:
    return sequence.seq_id


def _urgency(sequence: Sequence) -> tuple[bool, int, SeqId]:
    """Sequences that lack one token come first, longest untouched first; then longer ones in order of arrival.

    So a long prompt's chunks take what is left of the budget and hold up nobody's next token, and when the budget
    is smaller than the number of sequences they take turns.
    """
    if sequence.num_missing_tokens == 1:
        return False, sequence.last_turn, sequence.seq_id
    return True, 0, sequence.seq_id


class Scheduler:
    """Waiting and running sequences, the block pool, and the steps in flight of one pipeline after another."""

    def __init__(self, settings: CoreSettings, *, max_context: int) -> None:
        self._settings = settings
        self.context_limit = min(max_context, settings.max_model_len or max_context)
        self.pool = self._new_pool(0)
        self.waiting: list[Sequence] = []  # in order of arrival
        self.running: list[Sequence] = []  # in order of arrival
        self.in_flight: dict[StepId, tuple[StepPart, ...]] = {}  # in order of their numbers
        self._last_turn = 0
        self.total_preemptions = 0
        self.total_cached_tokens = 0

    def _new_pool(self, num_blocks: int) -> BlockPool:
        settings = self._settings
        return BlockPool(num_blocks=num_blocks, block_size=settings.block_size, prefix_cache=settings.prefix_cache)

    # --- sequences come and go ---------------------------------------------------------------------

    def add(self, sequence: Sequence) -> Ended | None:
        """Queue a new sequence, unless it can never be served."""
        ended = self._judge(sequence)
        if ended is None:
            insort(self.waiting, sequence, key=_arrival)
        else:
            sequence.status = SequenceStatus.FINISHED
        return ended

    def _judge(self, sequence: Sequence) -> Ended | None:
        """Set the sequence's limit; say so when it can never be served with the blocks that there are.

        Before the first pipeline (no block known) only the context is judged.
        """
        limit = self.context_limit
        num_prompt = sequence.num_prompt_tokens
        message = ""
        if num_prompt == 0:
            message = "the prompt is empty; give at least one token"
        elif num_prompt > limit:
            message = f"the prompt has {num_prompt} tokens, but the model's context holds {limit}"
        elif self.pool.num_blocks:
            capacity = self.pool.num_blocks * self.pool.block_size
            if sequence.num_tokens > capacity:
                what = "prompt has" if sequence.num_tokens == num_prompt else "prompt and its answer so far have"
                message = (
                    f"the {what} {sequence.num_tokens} tokens, but all {self.pool.num_blocks} KV blocks"
                    f" of {self.pool.block_size} hold {capacity}"
                )
            limit = min(limit, capacity)
        if message:
            return Ended(sequence=sequence, reason=FinishReason.ERROR, message=message)
        # A prompt that fills the limit still gets one token: its own K and V need no room.
        sequence.max_tokens = min(num_prompt + sequence.stop.max_new_tokens, max(limit, num_prompt + 1))
        if sequence.num_tokens >= sequence.max_tokens:
            return Ended(sequence=sequence, reason=FinishReason.LENGTH)
        return None

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out before its time. Blocks that a step in flight uses drain until it is back."""
        if sequence.status is SequenceStatus.WAITING:
            del self.waiting[bisect_left(self.waiting, sequence.seq_id, key=_arrival)]
        elif sequence.status is SequenceStatus.RUNNING:
            self._remove_running(sequence)
            self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table, in_flight=sequence.num_in_flight > 0)
        sequence.block_table = []

    def _remove_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.seq_id, key=_arrival)]

    def restart(self, num_blocks: int) -> list[Ended]:
        """Begin with an empty pool of a new pipeline: every sequence waits again and will be computed anew.

        Returns those that can't be served any more.
        """
        self.in_flight.clear()
        self.pool = self._new_pool(num_blocks)
        sequences = sorted([*self.waiting, *self.running], key=_arrival)
        for sequence in sequences:
            sequence.forget_computed()
        self.running.clear()
        self.waiting = sequences
        ended = [verdict for sequence in sequences if (verdict := self._judge(sequence)) is not None]
        for verdict in ended:
            self.end(verdict.sequence)
        return ended

    # --- the next step -----------------------------------------------------------------------------

    def schedule(self, *, epoch: Epoch, step: StepId, num_groups: int) -> StepInput | None:
        """The next step, or None when nothing can be computed before a step in flight is back.

        `num_groups` is how many steps shall be in flight: each takes its share of the sequences.
        """
        chosen, may_admit = self._continue_running(-(-len(self.running) // num_groups))
        if may_admit:
            num_sequences = min(self._settings.max_running, len(self.running) + len(self.waiting))
            self._admit(chosen, -(-num_sequences // num_groups))
        if not chosen:
            return None
        for sequence, _ in sorted(chosen, key=lambda pair: pair[0].last_turn):
            self._last_turn += 1
            sequence.last_turn = self._last_turn
        parts = tuple(self._launch(sequence, count) for sequence, count in chosen)
        self.in_flight[step] = parts
        slices = tuple(
            SequenceSlice(
                seq_id=part.sequence.seq_id,
                start_position=part.start,
                token_ids=tuple(part.sequence.tokens[part.start : part.start + part.num_tokens]),
                block_table=part.table,
                sampling=part.sequence.sampling if part.samples else None,
            )
            for part in parts
        )
        return StepInput(epoch=epoch, step=step, slices=slices, steps_in_flight=num_groups)

    def _continue_running(self, most_parts: int) -> tuple[list[tuple[Sequence, int]], bool]:
        """Tokens for running sequences, most urgent first; blocks in order of arrival.

        Waiting ones don't count in `most_parts`: if they find no room, the running ones still share out evenly. The
        second value tells whether new ones may be admitted: not in a step that had to take blocks away.
        """
        ready = [sequence for sequence in self.running if not sequence.num_in_flight]
        preemptions = self.total_preemptions
        blocked = False
        granted: list[tuple[Sequence, int]] = []
        while ready and not granted:
            budget = self._settings.token_budget
            wanted: list[tuple[Sequence, int]] = []
            for sequence in sorted(ready, key=_urgency)[:most_parts]:
                count = min(sequence.num_missing_tokens, budget)
                if count == 0:
                    break
                budget -= count
                wanted.append((sequence, count))
            wanted.sort(key=lambda pair: pair[0].seq_id)
            for sequence, count in wanted:
                if sequence.status is not SequenceStatus.RUNNING:
                    continue  # an earlier one took its blocks
                room = self._make_room(sequence, count)
                if room:
                    granted.append((sequence, room))
                else:
                    blocked = True
            # Those that found no room keep their blocks and wait for a step in flight; others may go on.
            asked = {sequence.seq_id for sequence, _ in wanted}
            ready = [s for s in ready if s.seq_id not in asked and s.status is SequenceStatus.RUNNING]
        return granted, not blocked and self.total_preemptions == preemptions

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Give the sequence blocks for up to `count` more tokens; how many they are for, 0 for not now.

        Preempts the latest arrival, never one that came before this sequence, and never one with a step in
        flight: its blocks would not be free before that step is back anyway.
        """
        pool = self.pool
        while True:
            held = len(sequence.block_table)
            room = (held + pool.num_free) * pool.block_size - sequence.num_computed_tokens
            if room > 0:
                count = min(count, room)
                blocks = pool.allocate(max(0, pool.blocks_for(sequence.num_computed_tokens + count) - held))
                assert blocks is not None, "there was room"
                sequence.block_table += blocks
                return count
            victim = self.running[-1]
            if victim is sequence or victim.num_in_flight:
                return 0
            self._preempt(victim)

    def _preempt(self, victim: Sequence) -> None:
        self._remove_running(victim)
        self._release(victim)
        victim.forget_computed()
        insort(self.waiting, victim, key=_arrival)
        self.total_preemptions += 1

    def _admit(self, chosen: list[tuple[Sequence, int]], most_parts: int) -> None:
        """Start waiting sequences in order of arrival, as long as budget, places and blocks last."""
        pool = self.pool
        budget = self._settings.token_budget - sum(count for _, count in chosen)
        while self.waiting and budget and len(chosen) < most_parts and len(self.running) < self._settings.max_running:
            sequence = self.waiting[0]
            cached, node = pool.find_prefix(sequence.tokens)
            # Room for all its known tokens: one that gets in for a chunk only would be preempted soon.
            missing = pool.blocks_for(sequence.num_tokens) - len(cached)
            if missing + pool.num_idle(cached) > pool.num_free:
                return
            del self.waiting[0]
            pool.share(cached)
            sequence.block_table = cached
            sequence.prefix_node = node
            sequence.num_registered_blocks = len(cached)
            sequence.num_computed_tokens = len(cached) * pool.block_size
            sequence.status = SequenceStatus.RUNNING
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
                self.total_cached_tokens += sequence.num_cached_tokens
            insort(self.running, sequence, key=_arrival)
            count = self._make_room(sequence, min(budget, sequence.num_missing_tokens))
            assert count, "admission counted the blocks"
            budget -= count
            chosen.append((sequence, count))

    def _launch(self, sequence: Sequence, count: int) -> StepPart:
        start = sequence.num_computed_tokens
        sequence.num_in_flight = count
        return StepPart(
            sequence=sequence,
            start=start,
            num_tokens=count,
            table=tuple(sequence.block_table),
            samples=start + count == sequence.num_tokens,
        )

    # --- a step is back ----------------------------------------------------------------------------

    def mismatch(self, step: StepId, tokens: tuple[TokenOut, ...]) -> str | None:
        """Why this answer can't be the next one, or None when it fits. Steps come back in order."""
        expected = next(iter(self.in_flight), None)
        if step != expected:
            return f"step {step} came back, expected {'none' if expected is None else f'step {expected}'}"
        asked = [part.sequence.seq_id for part in self.in_flight[step] if part.samples]
        answered = [token.seq_id for token in tokens]
        if asked != answered:
            return f"step {step} came back with tokens for sequences {answered}, expected {asked}"
        return None

    def complete(self, step: StepId, tokens: tuple[TokenOut, ...]) -> list[Advance]:
        """Take a step's answer, which `mismatch` let pass. Tokens of sequences that ended meanwhile are dropped."""
        parts = self.in_flight.pop(step)
        answers = iter(tokens)
        advances: list[Advance] = []
        for part in parts:
            token = next(answers) if part.samples else None
            sequence = part.sequence
            sequence.num_in_flight = 0
            if sequence.status is SequenceStatus.FINISHED:
                self.pool.drained(part.table)
                continue
            sequence.num_computed_tokens += part.num_tokens
            self._register(sequence)
            if token is None:
                continue
            finish = sequence.append(token.token_id)
            advances.append(Advance(sequence=sequence, token=token, finish=finish))
            if finish is not None:
                self.end(sequence)
        return advances

    def _register(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full, now that their K and V are known to be written."""
        size = self.pool.block_size
        for index in range(sequence.num_registered_blocks, sequence.num_computed_tokens // size):
            content = sequence.tokens[index * size : (index + 1) * size]
            sequence.prefix_node = self.pool.register(sequence.prefix_node, content, sequence.block_table[index])
            sequence.num_registered_blocks = index + 1

    # --- invariants --------------------------------------------------------------------------------

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert every invariant; `sequences` are all that are open."""
        for sequence in sequences:
            sequence.check(self.pool.block_size)
        for queue, status in ((self.waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            ids = [sequence.seq_id for sequence in queue]
            assert all(a < b for a, b in pairwise(ids)), f"{status.value} out of order: {ids}"
            assert all(sequence.status is status for sequence in queue), f"{status.value}: {ids}"
        assert len(self.running) <= self._settings.max_running
        self.pool.check(sequence.block_table for sequence in self.running)
        carried: dict[SeqId, StepId] = {}
        for step, parts in self.in_flight.items():
            total = sum(part.num_tokens for part in parts)
            assert 0 < total <= self._settings.token_budget, f"step {step} has {total} tokens"
            for part in parts:
                self._check_part(step, part, carried)
        busy = [s.seq_id for s in self.running if s.num_in_flight]
        assert all(seq_id in carried for seq_id in busy), f"sequences {busy} wait for steps that are not in flight"

    def _check_part(self, step: StepId, part: StepPart, carried: dict[SeqId, StepId]) -> None:
        sequence = part.sequence
        seq_id = sequence.seq_id
        assert seq_id not in carried, f"sequence {seq_id} is in steps {carried[seq_id]} and {step}"
        carried[seq_id] = step
        assert sequence.num_in_flight == part.num_tokens, f"sequence {seq_id} in step {step}"
        for block in part.table:
            assert not self.pool.is_free(block), f"block {block} is free while step {step} uses it"
        size = self.pool.block_size
        written = part.table[part.start // size : -(-(part.start + part.num_tokens) // size)]
        mine = 1 if sequence.status is SequenceStatus.RUNNING else 0
        for block in written:
            names = self.pool.num_references(block)
            assert names == mine, f"step {step} writes block {block} of sequence {seq_id}, which {names} tables name"
