"""How many prompt tokens a step may take, so that decodes never starve behind prompts. Knows times, no sequences.

A prompt's tokens cost more the longer the prefix that they attend to. They are counted in *effective tokens*: one is
the cost of a token at the start of a prompt. So a budget of effective tokens keeps a step's time about constant, and
the chunk shrinks as the prefix grows.

While no sequence decodes, a step takes what a whole chunk of `token_budget` tokens at the start of a prompt costs.
While some do, the gap between two tokens of each of them is to stay below a number of times the gap that they would
have without prompts. Steps pass each stage and each link in their order. While they follow each other evenly, with m
of them in flight that carry x prompt tokens each, a gap is a cycle of `step_times.py`:

    max( own way: sum over stages (t_i + link_i),  m times the longest t_i or link_i )

When such steps come to a pipeline that computed decodes alone, the last of them waits for more, once: a step that is
behind another at one stage has that wait behind it at the next. Its way then takes at most

    own way  +  (m - 1) times the longest t_i or link_i

So the first chunks are as large as the second formula allows, and those of the next rounds grow up to what the first
does. A step without a chunk, or with a small one, makes the flow uneven: the steps behind it begin anew. A chunk's time
on a link is in it as its time at a stage is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwright.core.step_times import (
    MOST_STEPS,
    Mix,
    StagePace,
    StepShape,
    choose_steps_in_flight,
    cycle_s,
    split,
)

UNMEASURED_TOKENS = 32
"""Prompt tokens of a step beside decodes before both were measured."""

LEAST_TOKENS = 8
"""A step takes as many tokens of a prompt, whatever they cost: prompts always advance."""

_RAMP = 2.0
"""A step takes at most so many times the prompt tokens that were measured: its time may grow faster than theirs."""

_LEAST_SHARE = 0.125
"""Chunks are not held back below this part of what the measurements allow."""

_RECOVERY = 1.1
"""Held back chunks grow by this factor with each step that keeps the promise again."""

_CLEARLY = 0.95
"""It keeps it where its gap is below so much of the promised one: near that, chunks stay as they are."""

_GROWTH = 1.25
"""A step takes at most so many times the prompt tokens of each step of the round before, unless fewer fit at once."""


@dataclass(frozen=True, slots=True)
class ContextCost:
    """What attention adds to a prompt's tokens: pairs of (window, cost of one attended position for a token), with a
    token's linear part as the unit, as in `ModelCosts.context_costs`.
    """

    terms: tuple[tuple[int, float], ...] = ()

    def effective(self, num_tokens: int, *, prefix: int) -> float:
        """The cost of so many tokens behind so many positions, in tokens without context."""
        total = float(num_tokens)
        for window, cost in self.terms:
            rising = min(max(window - prefix, 0), num_tokens)  # tokens that still see all before them
            attended = rising * prefix + rising * (rising + 1) // 2 + (num_tokens - rising) * window
            total += cost * attended
        return total

    def most_tokens(self, effective: float, *, prefix: int, at_most: int) -> int:
        """The most tokens behind this prefix that cost no more than so many effective tokens."""
        low, high = 0, max(at_most, 0)
        while low < high:
            middle = (low + high + 1) // 2
            if self.effective(middle, prefix=prefix) <= effective:
                low = middle
            else:
                high = middle - 1
        return low


class PromptBudget:
    """One step's allowance of prompt tokens. Ask `grant`, then tell with `spend` what was taken."""

    def __init__(self, context: ContextCost, *, effective: float, tokens: int) -> None:
        self._context = context
        self._effective = effective  # left
        self._tokens = tokens  # left of the step's hard token budget
        self._is_untouched = True

    def grant(self, *, prefix: int, wanted: int) -> int:
        """How many of a sequence's next tokens the step may take, up to `wanted`; 0 when it has enough.

        The first sequence gets `LEAST_TOKENS` whatever they cost; a later one as many at least, or none: crumbs of
        many prompts cost more than they bring.
        """
        wanted = min(wanted, self._tokens)
        least = min(wanted, LEAST_TOKENS)
        count = self._context.most_tokens(self._effective, prefix=prefix, at_most=wanted)
        if count >= least:
            return count
        return least if self._is_untouched else 0

    def spend(self, *, prefix: int, count: int) -> None:
        """So many tokens behind so many positions were put into the step."""
        assert 0 <= count <= self._tokens, f"{count} tokens of {self._tokens}"
        self._tokens -= count
        self._effective -= self._context.effective(count, prefix=prefix)
        self._is_untouched = False


@dataclass(frozen=True, slots=True)
class ChunkLimit:
    """The most effective prompt tokens of each of so many steps in flight beside so many decodes.

    0 where the promise can't be kept with `LEAST_TOKENS`.
    """

    at_once: float  # when the pipeline has computed decodes alone
    evenly: float  # when it is full of such steps


def chunk_limit(
    stages: Sequence[StagePace], *, num_decodes: int, num_steps: int, most_tokens: float, most_gap_s: float | None
) -> ChunkLimit:
    """As said above. `most_gap_s` is the promise, None while it is not known.

    `most_tokens` while nothing decodes, and never more; `UNMEASURED_TOKENS` before decodes and prompts were measured.
    """
    known = min((stage.times.most_prompt_tokens for stage in stages), default=0.0)
    if num_decodes == 0:
        return ChunkLimit(most_tokens, most_tokens)
    if not known or most_gap_s is None:
        unmeasured = min(UNMEASURED_TOKENS, most_tokens)
        return ChunkLimit(unmeasured, unmeasured)
    own = -(-num_decodes // num_steps)
    highest = int(min(most_tokens, max(_RAMP * known, UNMEASURED_TOKENS)))

    def fits(tokens: int, *, is_even: bool) -> bool:
        # The prompt's first token counts as one more sequence.
        shape = StepShape(num_sequences=own + 1, prompt_tokens=tokens - 1)
        return gap_beside(stages, shape, num_steps=num_steps, is_even=is_even) <= most_gap_s

    evenly = _most(highest, lambda tokens: fits(tokens, is_even=True))
    at_once = evenly if num_steps == 1 else _most(evenly, lambda tokens: fits(tokens, is_even=False))
    return ChunkLimit(float(at_once), float(evenly))


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `LEAST_TOKENS` to `highest` that fits, if those below it do; 0 when none does."""
    low, high = 0, highest
    if high < LEAST_TOKENS or not fits(LEAST_TOKENS):
        return 0
    low = LEAST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def gap_beside(stages: Sequence[StagePace], shape: StepShape, *, num_steps: int, is_even: bool) -> float:
    """The gap when all steps in flight are of this shape: in an even flow, or at most when they come to decodes alone.

    The stages are measured.
    """
    own_s = longest_s = 0.0
    for stage in stages:
        step_s = stage.step_s(shape, num_steps=num_steps, hopeful=False)
        assert step_s is not None, f"no time for {shape}"
        link_s = stage.link_s(shape)
        own_s += step_s + link_s + stage.link_delay_s
        longest_s = max(longest_s, step_s, link_s)
    return max(own_s, num_steps * longest_s) if is_even else own_s + (num_steps - 1) * longest_s


def decode_gap_s(stages: Sequence[StagePace], *, num_decodes: int) -> float | None:
    """The gap between two tokens of a sequence without prompts, in as many steps in flight as are best then."""
    mix = Mix(num_decodes=num_decodes)
    num_steps = choose_steps_in_flight(stages, mix, chunk_tokens=lambda _: 0.0)
    return cycle_s(stages, split(mix, num_steps=num_steps, chunk_tokens=0.0))


class ChunkRamp:
    """Remembers what the last steps took, so that chunks beside decodes grow round by round."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._taken: deque[float] = deque(maxlen=MOST_STEPS)

    def sent(self, *, num_steps: int, prompt_tokens: float) -> None:
        """A step was sent with so many effective prompt tokens while so many steps are meant to be in flight."""
        if num_steps != self._num_steps:
            self._num_steps = num_steps
            self._taken.clear()
        self._taken.append(prompt_tokens)

    def is_fewer(self, num_steps: int) -> bool:
        """Whether more steps than these were meant to be in flight until now.

        The decodes of the next step have then waited until those were back, and shall not have a chunk beside them.
        """
        return num_steps < self._num_steps

    def allowed(self, limit: ChunkLimit, *, num_steps: int) -> float:
        """Effective tokens that the next step may have: growing from the fewest that a step of the last round had."""
        grown = 0.0
        if num_steps == self._num_steps and len(self._taken) >= num_steps:
            grown = _GROWTH * min(itertools.islice(reversed(self._taken), num_steps))
        return min(limit.evenly, max(limit.at_once, grown))


class GapWatch:
    """Holds chunks back while decodes beside them wait longer than promised.

    Stages report their times by shape, as means, about once a second. What a machine that has become slower, or an
    attention dearer than it was counted, does to gaps shows here at once. One slow step is none of these: it takes two.
    """

    def __init__(self) -> None:
        self.share = 1.0
        """Of what the measurements allow a chunk may have so much."""
        self._before = 0.0  # the last step's gap over the promised one
        self._num_underway = 0  # steps that were sent before the share became less

    def took(self, gap_s: float, *, most_s: float, num_steps: int) -> None:
        """A step with decodes and a chunk is back, with so many meant to be in flight; call it in their order."""
        if most_s <= 0.0:  # decodes took no time that a clock could tell
            return
        ratio = gap_s / most_s
        excess, self._before = min(ratio, self._before), ratio
        if self._num_underway:
            self._num_underway -= 1
        elif excess > 1.0:
            self.share = max(self.share / excess, _LEAST_SHARE)
            self._num_underway = num_steps - 1
        elif ratio < _CLEARLY:
            self.share = min(self.share * _RECOVERY, 1.0)

    def held_back(self, limit: ChunkLimit) -> ChunkLimit:
        """What is left of a limit."""
        return ChunkLimit(at_once=limit.at_once * self.share, evenly=limit.evenly * self.share)
