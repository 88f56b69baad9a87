"""One pipeline's pace: takes what its workers and its steps' trips measured, and answers the scheduler's questions.

How many steps shall be in flight for what there is to compute (`steps_in_flight`), and how many prompt tokens may the
next one take (`prompt_budget`). One object lives as long as an epoch. Answers are kept until the next measurement, so
asking costs little.

Links are measured by the steps themselves. A step that was sent while none was in flight waits for nobody, so its trip
from the master through all stages and back is their compute time and what the links took: delay, transfer, and the
time in which messages are read and written. The delays' sum is all that the choice needs, whichever link they are of;
a transfer's time is thought to be on one link, where it does the most harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from shardwright.core.step_budget import (
    ChunkLimit,
    ChunkRamp,
    ContextCost,
    GapWatch,
    PromptBudget,
    chunk_limit,
    decode_gap_s,
)
from shardwright.core.step_times import (
    MOST_STEPS,
    Mix,
    StagePace,
    StepShape,
    StepTimes,
    choose_steps_in_flight,
    octave,
)
from shardwright.types import StageAssignment, StepId, StepInput, StepTiming, WorkerId

MAX_GAP_RATIO = 1.75
"""A decode's gap under prompts may be so many times its gap without: below the 3 that are promised."""

_TRIPS_KEPT = 15

_LEAST_TRIPS = 3
"""So many trips tell a delay: one of them may have met a first step or a slow moment."""

_TRIP_ERROR = 0.03
"""A difference of this part of a trip is not a delay: measured times are not better."""

_MANY_TOKENS = 64
"""A step with so many tokens tells what a link takes for a token; one with fewer tells the delay."""


_CONTEXTS_KEPT = 8
"""Of so many steps of one shape is known what their prompt tokens cost with their context."""

_CHOICES_KEPT = 4096

_BARE_EVERY = 64
"""Of so many steps with decodes, one has no prompts beside them, so that the time of decodes alone stays known."""

_BARE_EVERY_UNKNOWN = 2
"""The same while it is not known yet."""


@dataclass(frozen=True, slots=True)
class _Trip:
    """A step that met no other on its way."""

    shape: StepShape
    num_tokens: int
    num_steps: int  # meant to be in flight
    seconds: float


@dataclass(frozen=True, slots=True)
class _Sent:
    """A step under way."""

    at: float
    num_steps: int  # meant to be in flight
    most_gap_s: float | None  # promised to its decodes; None where it has none beside prompts, or nothing is known
    trip: _Trip | None  # without its time; None where it is behind another


class Pacing:
    """Measurements of one pipeline and the choices that follow from them."""

    def __init__(
        self,
        stages: Sequence[StageAssignment],
        *,
        context: ContextCost,
        token_budget: int,
        max_gap_ratio: float = MAX_GAP_RATIO,
    ) -> None:
        self._stages = tuple(stages)
        self._context = context
        self._token_budget = token_budget
        self._max_gap_ratio = max_gap_ratio
        self._whole_chunk = context.effective(token_budget, prefix=0)
        self._times = {stage.worker_id: StepTimes() for stage in stages}
        self._underway: dict[StepId, _Sent] = {}
        self._contexts: dict[int, deque[float]] = {}  # effective over real prompt tokens, by octave of these
        self._small: deque[_Trip] = deque(maxlen=_TRIPS_KEPT)
        self._large: deque[_Trip] = deque(maxlen=_TRIPS_KEPT)
        self._paces = self._measured_paces()
        self._heard: set[WorkerId] = set()  # since the choices were last made anew
        self._gaps: dict[int, float | None] = {}  # by number of decodes
        self._limits: dict[tuple[int, int], ChunkLimit] = {}  # by number of decodes and steps in flight
        self._ramp = ChunkRamp()
        self._watch = GapWatch()
        self._promised_s: float | None = None  # to the decodes of the step that is being made
        self._num_mixed = 0  # steps since the last one of decodes alone
        self._choices: dict[Mix, int] = {}
        self._last_choices: dict[Mix, int] = {}  # before the last measurement

    # --- measurements ------------------------------------------------------------------------------

    def heard(self, worker_id: WorkerId, timings: Iterable[StepTiming]) -> None:
        """A worker of this epoch reported step times. Others are ignored.

        Choices are made anew when every worker was heard, or one twice: once in a heartbeat's interval.
        """
        times = self._times.get(worker_id)
        if times is None:
            return
        times.add(timings, cost_of=self._cost_of)
        is_again = worker_id in self._heard
        self._heard.add(worker_id)
        if is_again or len(self._heard) == len(self._times):
            self._heard.clear()
            self._refresh()

    def _refresh(self) -> None:
        self._paces = self._measured_paces()
        self._gaps.clear()
        self._limits.clear()
        self._last_choices |= self._choices
        if len(self._last_choices) > _CHOICES_KEPT:
            self._last_choices = self._choices
        self._choices = {}

    def _cost_of(self, prompt_tokens: int) -> float:
        """Effective tokens of so many, as in the steps of that size that were sent last."""
        ratios = self._contexts.get(octave(prompt_tokens))
        return prompt_tokens * (median(ratios) if ratios else 1.0)

    def sent(self, step: StepInput, now: float) -> None:
        """The master sent a step; call it in the order in which they are sent."""
        num_sequences = len(step.slices)
        extra = step.num_tokens - num_sequences
        chunks = [part for part in step.slices if part.num_tokens > 1]
        effective = sum(self._context.effective(part.num_tokens, prefix=part.start_position) for part in chunks)
        beyond = effective - len(chunks)
        if chunks:
            self._contexts.setdefault(octave(extra), deque(maxlen=_CONTEXTS_KEPT)).append(beyond / extra)
        self._ramp.sent(num_steps=step.steps_in_flight, prompt_tokens=effective)
        is_mixed = 0 < len(chunks) < num_sequences
        if not chunks:
            self._num_mixed = 0
        elif is_mixed:
            self._num_mixed += 1
        shape = StepShape(num_sequences=num_sequences, prompt_tokens=beyond)
        trip = None if self._underway else _Trip(shape, step.num_tokens, step.steps_in_flight, 0.0)
        self._underway[step.step] = _Sent(now, step.steps_in_flight, self._promised_s if is_mixed else None, trip)

    def back(self, step: StepId, now: float) -> None:
        """The step's answer has come. Unknown steps are ignored."""
        sent = self._underway.pop(step, None)
        if sent is None:
            return
        if sent.most_gap_s is not None:
            self._watch.took(now - sent.at, most_s=sent.most_gap_s, num_steps=sent.num_steps)
        if sent.trip is not None:
            trips = self._large if sent.trip.num_tokens >= _MANY_TOKENS else self._small
            trips.append(replace(sent.trip, seconds=now - sent.at))

    def _measured_paces(self) -> list[StagePace]:
        bare = [StagePace(num_sharing=s.num_sharing, times=self._times[s.worker_id]) for s in self._stages]
        delay_s = _left_over(bare, self._small)
        token_s = 0.0
        large_s = _left_over(bare, self._large)
        if large_s is not None:
            tokens = median(trip.num_tokens for trip in self._large)
            if delay_s is None:
                delay_s = large_s
            token_s = max(large_s - delay_s, 0.0) / tokens
        return [
            StagePace(
                num_sharing=pace.num_sharing,
                times=pace.times,
                link_delay_s=0.0 if index else delay_s or 0.0,
                link_token_s=0.0 if index else token_s,
            )
            for index, pace in enumerate(bare)
        ]

    @property
    def link_delay_s(self) -> float:
        """What a small step's trip takes beside the stages' time, all links together; 0 while not known."""
        return sum(pace.link_delay_s for pace in self._paces)

    @property
    def link_token_s(self) -> float:
        """What a further token adds to that."""
        return sum(pace.link_token_s for pace in self._paces)

    # --- choices -----------------------------------------------------------------------------------

    def steps_in_flight(self, mix: Mix) -> int:
        """How many steps shall be in flight to compute this."""
        mix = _rounded(mix, self._token_budget)
        chosen = self._choices.get(mix)
        if chosen is None:
            chosen = choose_steps_in_flight(
                self._paces,
                mix,
                chunk_tokens=lambda num_steps: min(self._limit(mix.num_decodes, num_steps).evenly, self._token_budget),
                current=self._last_choices.get(mix, 1),
            )
            self._choices[mix] = chosen
        return chosen

    def prompt_budget(self, *, num_decodes: int, num_steps: int, tokens: int) -> PromptBudget:
        """The prompt tokens that one step may take.

        `num_decodes` counts all sequences that lack one token, also those in steps in flight; `tokens` is what is left
        of the step's token budget after its own decodes.
        """
        limit = self._limit(num_decodes, num_steps)
        self._promised_s = self._most_gap(num_decodes)
        if num_decodes == 0:
            return PromptBudget(self._context, effective=limit.evenly, tokens=tokens)
        if tokens < self._token_budget:  # there are decodes in this step
            every = _BARE_EVERY_UNKNOWN if self._promised_s is None else _BARE_EVERY
            if self._num_mixed + 1 >= every or self._ramp.is_fewer(num_steps):
                return PromptBudget(self._context, effective=0.0, tokens=0)
        allowed = self._ramp.allowed(self._watch.held_back(limit), num_steps=num_steps)
        return PromptBudget(self._context, effective=allowed, tokens=tokens)

    def _limit(self, num_decodes: int, num_steps: int) -> ChunkLimit:
        limit = self._limits.get((num_decodes, num_steps))
        if limit is None:
            limit = chunk_limit(
                self._paces,
                num_decodes=num_decodes,
                num_steps=num_steps,
                most_tokens=self._whole_chunk,
                most_gap_s=self._most_gap(num_decodes),
            )
            self._limits[num_decodes, num_steps] = limit
        return limit

    def _most_gap(self, num_decodes: int) -> float | None:
        if num_decodes not in self._gaps:
            gap_s = decode_gap_s(self._paces, num_decodes=num_decodes)
            self._gaps[num_decodes] = None if gap_s is None else gap_s * self._max_gap_ratio
        return self._gaps[num_decodes]


def _left_over(stages: Sequence[StagePace], trips: Sequence[_Trip]) -> float | None:
    """What these trips took beside the stages' time, without what may be an error; None while too little is known."""
    rests = []
    for trip in trips:
        times = [stage.step_s(trip.shape, num_steps=trip.num_steps) for stage in stages]
        if None in times:
            return None
        rests.append(trip.seconds - sum(time_s for time_s in times if time_s is not None))
    if len(rests) < _LEAST_TRIPS:
        return None
    return max(median(rests) - _TRIP_ERROR * median(trip.seconds for trip in trips), 0.0)


def _rounded(mix: Mix, token_budget: int) -> Mix:
    """With the prompts' tokens rounded up to three leading bits: few different mixes, few choices to make."""
    most = MOST_STEPS * token_budget  # more can't be under way
    tokens = min(mix.prompt_tokens, max(most, mix.num_prompts))
    shift = max(tokens.bit_length() - 3, 0)
    tokens = -(-tokens >> shift) << shift
    return Mix(num_decodes=mix.num_decodes, num_prompts=mix.num_prompts, prompt_tokens=tokens)
