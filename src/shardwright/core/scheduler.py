"""Chooses what the next step computes. Knows sequences and block counts; nothing of tensors, workers or time.

There is no prefill phase and no decode phase: every sequence has computed tokens that catch up with its known
tokens, under one token budget, running sequences first. Those that lack one token take it before the others share what
is left and what the pace allows, so that no decode waits long behind prompts. Chunked prefill, prefix reuse, preemption
by recomputation and replay after a failure are all that one loop. A sequence is in at most one step in flight.

Two things make a waiting sequence wait longer although there is room. One whose next block is just what a running
sequence computes waits until that block is there: n answers to one prompt compute it once. And the rows of logits
that score prompts are few in each step, because each is as long as the vocabulary. Neither holds up who came later.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Protocol

from shardwright.core.block_pool import BlockPool, PrefixKey
from shardwright.core.sequence import Sequence, SequenceStatus
from shardwright.core.settings import CoreSettings
from shardwright.core.step_budget import ContextCost, PromptBudget
from shardwright.core.step_times import Mix
from shardwright.types import (
    BlockId,
    Epoch,
    FinishReason,
    PromptScores,
    SeqId,
    SequenceSlice,
    StepId,
    StepInput,
    TokenOut,
    TokenScore,
)

_MOST_HELD = 64
"""Waiting sequences that one step looks past, so that a long queue of them costs each step little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A sequence that is over, and why."""

    sequence: Sequence
    reason: FinishReason
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A sequence that got scores of its prompt, or a token, or both, and whether that was its last token."""

    sequence: Sequence
    scores: tuple[TokenScore, ...]
    token: TokenOut | None
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """One sequence's share of a step in flight."""

    sequence: Sequence
    start: int
    num_tokens: int
    table: tuple[BlockId, ...]
    samples: bool
    num_scored: int  # tokens of the prompt whose scores come back: those after the part's own, from the first on


class BudgetFor(Protocol):
    """Gives one step its allowance of prompt tokens, as `Pacing.prompt_budget` does."""

    def __call__(self, *, num_decodes: int, num_steps: int, tokens: int) -> PromptBudget:
        """`num_decodes` sequences lack one token, in this step or another; `tokens` are left of the step's budget."""


def whole_budget(*, num_decodes: int, num_steps: int, tokens: int) -> PromptBudget:  # noqa: ARG001  as `BudgetFor`
    """All that the token budget leaves, whatever it costs."""
    return PromptBudget(ContextCost(), effective=float(tokens), tokens=tokens)


@dataclass(slots=True)
class _Room:
    """What one step may still take."""

    tokens: int  # of the token budget
    rows: int  # of logits that score prompts
    num_steps: int  # that shall be in flight
    budget_for: BudgetFor
    prompts: PromptBudget | None = None  # asked for when the decodes have taken theirs


def _arrival(sequence: Sequence) -> SeqId:
    return sequence.seq_id


def _urgency(sequence: Sequence) -> tuple[bool, int, SeqId]:
    """Sequences that lack one token come first, longest untouched first; then longer ones in order of arrival.

    So a long prompt's chunks take what is left of the budget and hold up nobody's next token, and when the budget
    is smaller than the number of sequences they take turns.
    """
    if sequence.is_decode:
        return False, sequence.last_turn, sequence.seq_id
    return True, 0, sequence.seq_id


def _num_scored(sequence: Sequence, start: int, count: int) -> int:
    """How many scores of the prompt so many tokens from `start` on bring."""
    if not sequence.has_unscored or start < sequence.next_scored - 1:
        return 0
    return min(start + count, sequence.num_prompt_tokens - 1) - start


def _wrong_scores(part: StepPart, scores: PromptScores) -> str | None:
    """What in these scores was not asked for, if anything."""
    sequence = part.sequence
    first = part.start + 1
    wanted = sequence.tokens[first : first + part.num_scored]
    given = [score.token_id for score in scores.scores]
    if scores.first_position != first or given != wanted:
        return (
            f"scores of {len(given)} prompt tokens of sequence {sequence.seq_id} from position"
            f" {scores.first_position}, expected its {len(wanted)} from position {first}"
        )
    most = sequence.num_prompt_logprobs or 0
    if any(len(score.top) > most for score in scores.scores):
        return f"more than {most} alternatives to a prompt token of sequence {sequence.seq_id}"
    return None


class Scheduler:
    """Waiting and running sequences, the block pool, and the steps in flight of one pipeline after another."""

    def __init__(self, settings: CoreSettings, *, max_context: int) -> None:
        self._settings = settings
        self.context_limit = min(max_context, settings.max_model_len or max_context)
        self.pool = self._new_pool(0)
        self.waiting: list[Sequence] = []  # in order of arrival
        self.running: list[Sequence] = []  # in order of arrival
        self.in_flight: dict[StepId, tuple[StepPart, ...]] = {}  # in order of their numbers
        self.num_new = 0  # waiting sequences that never ran: those that the queue's bound counts
        self._dropped: list[SeqId] = []  # sequences that the last stage keeps a setup of and need not any more
        self._last_turn = 0
        self.total_preemptions = 0
        self.total_prompt_tokens = 0  # of sequences that ran: so many were looked up in the prefix cache
        self.total_cached_tokens = 0  # of these, those that were there

    def _new_pool(self, num_blocks: int) -> BlockPool:
        settings = self._settings
        return BlockPool(num_blocks=num_blocks, block_size=settings.block_size, prefix_cache=settings.prefix_cache)

    # --- sequences come and go ---------------------------------------------------------------------

    def add(self, sequence: Sequence) -> Ended | None:
        """Queue a new sequence, unless it can never be served or the queue is full."""
        ended = self._judge(sequence)
        most = self._settings.max_waiting
        if ended is None and most is not None and self.num_new >= most:
            message = f"the queue is full: {most} requests wait already; come again later"
            ended = Ended(sequence=sequence, reason=FinishReason.REJECTED, message=message)
        if ended is None:
            insort(self.waiting, sequence, key=_arrival)
            self.num_new += 1
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
            self.num_new -= not sequence.has_run
        elif sequence.status is SequenceStatus.RUNNING:
            self._remove_running(sequence)
            self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release(self, sequence: Sequence) -> None:
        if sequence.is_set_up:
            self._dropped.append(sequence.seq_id)
            sequence.is_set_up = False
        self.pool.free(sequence.block_table, in_flight=sequence.num_in_flight > 0)
        sequence.block_table = []

    def _remove_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.seq_id, key=_arrival)]

    def restart(self, num_blocks: int) -> list[Ended]:
        """Begin with an empty pool of a new pipeline: every sequence waits again and will be computed anew.

        Returns those that can't be served any more.
        """
        self.in_flight.clear()
        self._dropped.clear()  # the new pipeline's last stage knows nobody
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

    def schedule(
        self, *, epoch: Epoch, step: StepId, num_groups: int, prompt_budget: BudgetFor = whole_budget
    ) -> StepInput | None:
        """The next step, or None when nothing can be computed before a step in flight is back.

        `num_groups` is how many steps shall be in flight: each takes its share of the decodes and its share of the
        prompts, so that steps take about as long as each other.
        """
        room = _Room(
            tokens=self._settings.token_budget,
            rows=self._settings.prompt_logprob_tokens,
            num_steps=num_groups,
            budget_for=prompt_budget,
        )
        num_decodes = sum(sequence.is_decode for sequence in self.running)
        num_prompts = len(self.running) - num_decodes
        chosen, left = self._continue_running(room, -(-num_decodes // num_groups), -(-num_prompts // num_groups))
        if left is not None:
            num_prompts += min(len(self.waiting), self._settings.max_running - len(self.running))
            self._admit(chosen, left, -(-num_prompts // num_groups))
        if not chosen:
            return None
        for sequence, _ in sorted(chosen, key=lambda pair: pair[0].last_turn):
            self._last_turn += 1
            sequence.last_turn = self._last_turn
        parts = tuple(self._launch(sequence, count) for sequence, count in chosen)
        self.in_flight[step] = parts
        slices = tuple(self._slice(part) for part in parts)
        return StepInput(epoch=epoch, step=step, slices=slices, steps_in_flight=num_groups, dropped=self.take_dropped())

    def take_dropped(self) -> tuple[SeqId, ...]:
        """The sequences that the next step has to name as dropped. Call when that step is sure to be sent."""
        dropped = tuple(self._dropped)
        self._dropped.clear()
        return dropped

    def mix(self) -> Mix:
        """What there is to compute: of the sequences that run and of those that are next to."""
        num_decodes = num_prompts = prompt_tokens = 0
        for sequence in chain(self.running, islice(self.waiting, self._settings.max_running - len(self.running))):
            if sequence.is_decode:
                num_decodes += 1
            else:
                num_prompts += 1
                prompt_tokens += len(sequence.tokens) - sequence.num_computed_tokens
        return Mix(num_decodes=num_decodes, num_prompts=num_prompts, prompt_tokens=prompt_tokens)

    def _take(self, room: _Room, sequence: Sequence, start: int) -> int:
        """How many tokens from `start` on the sequence shall compute in the step; takes them out of its room.

        0: none in this step; never for the first that asks. A slice whose scores are wanted begins where they begin:
        what comes before is computed in one of its own.
        """
        count = min(len(sequence.tokens) - start, room.tokens)
        if sequence.has_unscored:
            before = sequence.next_scored - 1 - start
            count = min(count, before if before > 0 else room.rows)
        if count > 1:
            if room.prompts is None:
                num_decodes = sum(s.is_decode for s in self.running)
                room.prompts = room.budget_for(num_decodes=num_decodes, num_steps=room.num_steps, tokens=room.tokens)
            count = room.prompts.grant(prefix=start, wanted=count)
            if count:
                room.prompts.spend(prefix=start, count=count)
        room.tokens -= count
        room.rows -= _num_scored(sequence, start, count)
        return count

    def _is_being_computed(self) -> set[PrefixKey]:
        """The next block of each running sequence that has all tokens for it: these are sure to be known soon."""
        pool = self.pool
        size = pool.block_size
        keys: set[PrefixKey] = set()
        for sequence in self.running:
            begin = sequence.num_registered_blocks * size
            if begin + size <= len(sequence.tokens):
                keys.add(pool.key(sequence.prefix_node, sequence.tokens[begin : begin + size]))
        return keys

    def _continue_running(
        self, whole: _Room, most_decodes: int, most_prompts: int
    ) -> tuple[list[tuple[Sequence, int]], _Room | None]:
        """Tokens for running sequences, most urgent first; blocks in order of arrival.

        Waiting ones don't count in the shares: if they find no room, the running ones still share out evenly. The
        second value is what is left for them; None when none may be admitted: in a step that had to take blocks away.
        """
        ready = [sequence for sequence in self.running if not sequence.num_in_flight]
        preemptions = self.total_preemptions
        blocked = False
        granted: list[tuple[Sequence, int]] = []
        room = whole
        while ready and not granted:
            room = replace(whole)
            urgent = sorted(ready, key=_urgency)
            num_decodes = sum(sequence.is_decode for sequence in urgent)  # they come first
            asked = urgent[: min(num_decodes, most_decodes)] + urgent[num_decodes : num_decodes + most_prompts]
            wanted = [(s, count) for s in asked if (count := self._take(room, s, s.num_computed_tokens))]
            assert wanted, "the first that asks gets something"
            wanted.sort(key=lambda pair: pair[0].seq_id)
            for sequence, count in wanted:
                if sequence.status is not SequenceStatus.RUNNING:
                    continue  # an earlier one took its blocks
                found = self._make_room(sequence, count)
                if found:
                    granted.append((sequence, found))
                else:
                    blocked = True
            # Those that found no room keep their blocks and wait for a step in flight; others may go on.
            passed = {sequence.seq_id for sequence, _ in wanted}
            ready = [s for s in ready if s.seq_id not in passed and s.status is SequenceStatus.RUNNING]
        return granted, None if blocked or self.total_preemptions != preemptions else room

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Give the sequence blocks for up to `count` more tokens; how many they are for, 0 for not now.

        Preempts the latest arrival, never one that came before this sequence, and never one with a step in
        flight: its blocks would not be free before that step is back anyway.
        """
        pool = self.pool
        held = len(sequence.block_table)
        if sequence.num_computed_tokens + count <= held * pool.block_size:
            return count
        while True:
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
        victim.num_preemptions += 1
        insort(self.waiting, victim, key=_arrival)
        self.total_preemptions += 1

    def _admit(self, chosen: list[tuple[Sequence, int]], room: _Room, most_prompts: int) -> None:
        """Start waiting sequences in order of arrival, as long as budget, places and blocks last.

        Those that wait for another's block, or for rows of scores, keep their place while later ones pass.
        """
        awaitable: set[PrefixKey] | None = None
        held = 0
        num_prompts = sum(not sequence.is_decode for sequence, _ in chosen)
        while held < min(len(self.waiting), _MOST_HELD) and room.tokens and num_prompts < most_prompts:
            if len(self.running) >= self._settings.max_running or not self.pool.num_free:
                return
            sequence = self.waiting[held]
            if awaitable is None and self.pool.prefix_cache:
                awaitable = self._is_being_computed()
            if (sequence.has_unscored and not room.rows) or (awaitable and sequence.awaited in awaitable):
                held += 1
                continue
            cached, node = self.pool.find_prefix(sequence.tokens, sequence.num_reusable_tokens)
            sequence.awaited = self._next_key(sequence, len(cached), node)
            if awaitable and sequence.awaited in awaitable:
                held += 1
                continue
            # Room for all its known tokens: one that gets in for a chunk only would be preempted soon.
            missing = self.pool.blocks_for(sequence.num_tokens) - len(cached)
            if missing + self.pool.num_idle(cached) > self.pool.num_free:
                return
            count = self._take(room, sequence, len(cached) * self.pool.block_size)
            if not count:
                return
            del self.waiting[held]
            self._begin(sequence, cached, node)
            if awaitable is not None and sequence.awaited is not None:
                awaitable.add(sequence.awaited)
            found = self._make_room(sequence, count)
            assert found == count, "admission counted the blocks"
            chosen.append((sequence, count))
            num_prompts += 1

    def _next_key(self, sequence: Sequence, num_cached: int, node: int) -> PrefixKey | None:
        """The block after the cached ones, if the sequence could reuse it."""
        begin = num_cached * self.pool.block_size
        end = begin + self.pool.block_size
        if end > sequence.num_reusable_tokens or not self.pool.prefix_cache:
            return None
        return self.pool.key(node, sequence.tokens[begin:end])

    def _begin(self, sequence: Sequence, cached: list[BlockId], node: int) -> None:
        """Make a sequence that was taken out of the waiting ones a running one, with these blocks."""
        self.pool.share(cached)
        sequence.block_table = cached
        sequence.prefix_node = node
        sequence.num_registered_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * self.pool.block_size
        sequence.status = SequenceStatus.RUNNING
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            self.num_new -= 1
            self.total_prompt_tokens += sequence.num_prompt_tokens
            self.total_cached_tokens += sequence.num_cached_tokens
        insort(self.running, sequence, key=_arrival)

    def _launch(self, sequence: Sequence, count: int) -> StepPart:
        start = sequence.num_computed_tokens
        num_scored = _num_scored(sequence, start, count)
        sequence.num_in_flight = count
        return StepPart(
            sequence=sequence,
            start=start,
            num_tokens=count,
            table=tuple(sequence.block_table),
            samples=start + count == sequence.num_tokens,
            num_scored=num_scored,
        )

    def _slice(self, part: StepPart) -> SequenceSlice:
        sequence = part.sequence
        end = part.start + part.num_tokens
        setup = None
        if part.samples and sequence.has_setup and not sequence.is_set_up:
            setup = sequence.setup()
            sequence.is_set_up = True
        return SequenceSlice(
            seq_id=sequence.seq_id,
            start_position=part.start,
            token_ids=tuple(sequence.tokens[part.start : end]),
            block_table=part.table,
            sampling=sequence.sampling if part.samples else None,
            setup=setup,
            num_prompt_logprobs=sequence.num_prompt_logprobs if part.num_scored else None,
            next_token_id=sequence.tokens[end] if part.num_scored and end < sequence.num_prompt_tokens else None,
        )

    # --- a step is back ----------------------------------------------------------------------------

    def mismatch(
        self, step: StepId, tokens: tuple[TokenOut, ...], prompt_scores: tuple[PromptScores, ...] = ()
    ) -> str | None:
        """Why this answer can't be the next one, or None when it fits. Steps come back in order."""
        expected = next(iter(self.in_flight), None)
        if step != expected:
            return f"step {step} came back, expected {'none' if expected is None else f'step {expected}'}"
        asked = [part.sequence.seq_id for part in self.in_flight[step] if part.samples]
        answered = [token.seq_id for token in tokens]
        if asked != answered:
            return f"step {step} came back with tokens for sequences {answered}, expected {asked}"
        scored = [part for part in self.in_flight[step] if part.num_scored]
        if not scored and not prompt_scores:
            return None
        wanted = [part.sequence.seq_id for part in scored]
        given = [scores.seq_id for scores in prompt_scores]
        if wanted != given:
            return f"step {step} came back with prompt scores for sequences {given}, expected {wanted}"
        for part, scores in zip(scored, prompt_scores, strict=True):
            if (what := _wrong_scores(part, scores)) is not None:
                return f"step {step} came back with {what}"
        return None

    def complete(
        self, step: StepId, tokens: tuple[TokenOut, ...], prompt_scores: tuple[PromptScores, ...] = ()
    ) -> list[Advance]:
        """Take a step's answer, which `mismatch` let pass. What is for sequences that ended meanwhile is dropped."""
        parts = self.in_flight.pop(step)
        answers = iter(tokens)
        all_scores = iter(prompt_scores)
        advances: list[Advance] = []
        for part in parts:
            token = next(answers) if part.samples else None
            scores = next(all_scores).scores if part.num_scored else ()
            sequence = part.sequence
            sequence.num_in_flight = 0
            if sequence.status is SequenceStatus.FINISHED:
                self.pool.drained(part.table)
                continue
            sequence.num_computed_tokens += part.num_tokens
            sequence.next_scored += part.num_scored
            self._register(sequence)
            finish = sequence.append(token.token_id) if token is not None else None
            if token is not None or scores:
                advances.append(Advance(sequence=sequence, scores=scores, token=token, finish=finish))
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
        num_new = sum(not sequence.has_run for sequence in self.waiting)
        assert self.num_new == num_new, f"{num_new} sequences wait for the first time, counted {self.num_new}"
        most_new = self._settings.max_waiting
        assert most_new is None or num_new <= most_new, f"{num_new} sequences wait for the first time"
        self.pool.check(sequence.block_table for sequence in self.running)
        carried: dict[SeqId, StepId] = {}
        for step, parts in self.in_flight.items():
            total = sum(part.num_tokens for part in parts)
            assert 0 < total <= self._settings.token_budget, f"step {step} has {total} tokens"
            num_scored = sum(part.num_scored for part in parts)
            assert num_scored <= self._settings.prompt_logprob_tokens, f"step {step} scores {num_scored} tokens"
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
