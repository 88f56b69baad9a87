"""How many steps in flight pay: measured step times and link delays in, a number out.

A step's time at a stage is t(b, x): b sequences, and x prompt tokens beyond one for each of them (in effective tokens,
see `step_budget.py`). It is kept as two measured tables, t(b, 0) and what x tokens add to it. Let l_i be the delay of
the link into stage i. With m steps in flight, a step's trip takes sum(t_i + l_i), and in the time in which every step
is back once, each stage computes all m of them. So all of them are back after

    cycle = max( longest trip of a step: sum over stages (t_i + l_i),  busiest stage: sum over steps t_i )

and m is worth (what the m steps compute) / cycle. For decodes alone that is B / cycle tokens a second. Where t is flat
in b (decode bound by memory) more than one step never pays; where t grows with b or with prompt tokens, up to about
S (1 + l/t) steps gain in proportion.

Prompts without decodes beside them are thought to be all that there is, at an idle pipeline: it also has to fill and to
drain. They are worth what all of them need, over the time until all of them went through, in as many rounds of m steps
as their chunks take. (More may come, and then the pipeline was fuller than that; the more rounds there are, the less it
matters.)

Stages on one device (one machine's cores, one GPU) slow each other down when they compute at the same time, and how
much only a measurement tells: work that waits for memory halves its speed, work that waits for the interpreter keeps
it. So their times are kept by concurrency, the number of them that compute at once: min(m, stages on the device).

What was never measured is taken at its best and so is tried once; the measurement decides from then on. At best: a
smaller step takes in proportion less, but no less than half of the smallest that was measured (so sizes are tried by
halves); more stages computing at once don't slow each other down; fewer of them gain all that they shared, almost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

from shardwright.types import StepTiming

MOST_STEPS = 64
"""More steps in flight than this are never considered: it bounds the queues along the pipeline."""

WORTHWHILE = 1.03
"""More steps in flight have to promise this factor: measured times are not better than a few percent."""

_MOST_WORSE = 4
"""After so many candidates in a row that bring nothing, no more are looked at."""

_REPORTS_KEPT = 5
"""The median of so many reports is a shape's time: one that something else disturbed doesn't show, a drift does."""

_MANY_STEPS = 8
"""In a mean over so many steps, the first one doesn't show much."""

_UNSEEN_SMALLER = 0.5
"""A step smaller than all that were measured is hoped to take this part of the smallest's time at best."""

_UNSEEN_ALONE = 1.1
"""Where a stage was measured only beside others on its device, it is thought to gain their shares but for a tenth."""

_UNTRIED_TOKENS = 64
"""Before anything was measured, prompts are split over steps only with so many tokens in each. So many are also what
a prompt's worth is measured by at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What there is to compute: sequences that lack one token, and those that lack more."""

    num_decodes: int
    num_prompts: int = 0
    prompt_tokens: int = 0  # that the prompts lack together

    def __post_init__(self) -> None:
        assert self.num_decodes >= 0, f"{self.num_decodes=}"
        assert 0 <= self.num_prompts <= self.prompt_tokens, f"{self.num_prompts=} {self.prompt_tokens=}"

    @property
    def num_sequences(self) -> int:
        """All of them."""
        return self.num_decodes + self.num_prompts


@dataclass(slots=True, eq=False)
class _Shape:
    """The last reports on steps of one shape: (sequences, prompt tokens, mean seconds)."""

    reports: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=_REPORTS_KEPT))
    was_seen: bool = False
    is_cold: bool = False  # the only report is the first, and on few steps

    def add(self, timing: StepTiming, extra: float) -> None:
        """Take a report on steps with `extra` prompt tokens.

        The first step of a shape may prepare kernels and buffers, so a first report on few steps is forgotten with the
        next one.
        """
        if self.is_cold:
            self.reports.clear()
        self.is_cold = not self.was_seen and timing.count < _MANY_STEPS
        self.was_seen = True
        self.reports.append((timing.num_sequences, extra, timing.mean_s))


@dataclass(frozen=True, slots=True)
class _Curve:
    """A rising line through measured points."""

    sizes: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def through(cls, points: Mapping[float, float]) -> _Curve:
        """Made to rise where noise makes it fall: a smaller step is not slower than a larger one."""
        sizes = sorted(points)
        times = [points[size] for size in sizes]
        for index in range(len(times) - 2, -1, -1):
            times[index] = min(times[index], times[index + 1])
        return cls(tuple(sizes), tuple(times))

    def between(self, size: float) -> float:
        """For a size from the smallest to the largest."""
        right = bisect_left(self.sizes, size)
        if self.sizes[right] == size:
            return self.times[right]
        left = right - 1
        part = (size - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        return self.times[left] + part * (self.times[right] - self.times[left])

    def of_sequences(self, size: float, *, hopeful: bool) -> float:
        """Time by number of sequences: below the smallest as hoped or as there, above the largest as there."""
        if size < self.sizes[0]:
            return self.times[0] * max(size / self.sizes[0], _UNSEEN_SMALLER) if hopeful else self.times[0]
        return self.times[-1] if size > self.sizes[-1] else self.between(size)

    def of_tokens(self, size: float) -> float:
        """Time by prompt tokens: in proportion below the smallest and above the largest."""
        for edge in (0, -1):
            if (size < self.sizes[edge]) if edge == 0 else (size > self.sizes[edge]):
                return self.times[edge] * size / self.sizes[edge]
        return self.between(size)


class StepTimes:
    """One stage's measured times by concurrency, number of sequences and prompt tokens."""

    def __init__(self) -> None:
        self._decodes: dict[int, dict[int, _Shape]] = {}  # by concurrency and sequences
        self._prompts: dict[int, dict[int, _Shape]] = {}  # by concurrency and octave of prompt tokens
        self._decode_curves: dict[int, _Curve] = {}
        self._prompt_curves: dict[int, _Curve] = {}

    def add(self, timings: Iterable[StepTiming], *, cost_of: Callable[[int], float] = float) -> None:
        """Take a report's means. Those of no step are passed over.

        `cost_of` tells how many effective tokens that many prompt tokens of the steps reported on were.
        """
        for timing in timings:
            if timing.count < 1 or not 1 <= timing.num_sequences <= timing.num_tokens:
                continue
            extra = timing.num_tokens - timing.num_sequences
            if extra:
                shapes, key = self._prompts, octave(extra)
            else:
                shapes, key = self._decodes, timing.num_sequences
            shape = shapes.setdefault(timing.concurrency, {}).setdefault(key, _Shape())
            shape.add(timing, cost_of(extra) if extra else 0.0)
        self._draw()

    def _draw(self) -> None:
        decodes = {
            concurrency: {
                float(size): median_low(mean_s for _, _, mean_s in shape.reports)
                for size, shape in shapes.items()
                if not shape.is_cold
            }
            for concurrency, shapes in self._decodes.items()
        }
        self._decode_curves = {key: _Curve.through(points) for key, points in decodes.items() if points}
        prompts = {
            concurrency: dict(self._prompt_point(shape, concurrency) for shape in _warm(shapes.values()))
            for concurrency, shapes in self._prompts.items()
        }
        self._prompt_curves = {key: _Curve.through(points) for key, points in prompts.items() if points}

    def _prompt_point(self, shape: _Shape, concurrency: int) -> tuple[float, float]:
        """Prompt tokens, and what they add to a step: the middle one of the reports.

        All of the step's time where decodes were not measured yet.
        """
        costs = []
        for num_sequences, extra, mean_s in shape.reports:
            base_s = self._decode(num_sequences, concurrency) or 0.0
            costs.append((max(mean_s - base_s, 0.0) / extra, extra))
        token_s, _ = median_low(costs)
        tokens = median_low(extra for _, extra in costs)
        return tokens, token_s * tokens

    def at(
        self, num_sequences: float, prompt_tokens: float = 0.0, *, concurrency: int = 1, hopeful: bool = True
    ) -> float | None:
        """The time of a step of so many sequences and, beyond one token of each, prompt tokens; in seconds.

        None when nothing like it was measured: no decode step, or with prompt tokens no step with prompt tokens.
        Between two measured sizes on the line through them; what else was not measured at its best, as the module's
        docstring says, or, if not `hopeful`, as if splitting up and computing at once brought nothing.
        """
        base_s = self._decode(num_sequences, concurrency, hopeful=hopeful)
        if prompt_tokens <= 0:
            return base_s
        added_s = _beside(
            self._prompt_curves, concurrency, lambda curve: curve.of_tokens(prompt_tokens), hopeful=hopeful
        )
        return None if added_s is None else (base_s or 0.0) + added_s

    def _decode(self, num_sequences: float, concurrency: int, *, hopeful: bool = True) -> float | None:
        if num_sequences <= 0:
            return 0.0
        return _beside(
            self._decode_curves,
            concurrency,
            lambda curve: curve.of_sequences(num_sequences, hopeful=hopeful),
            hopeful=hopeful,
        )

    @property
    def most_prompt_tokens(self) -> float:
        """The most prompt tokens of a step that was measured, at any concurrency; 0 for none."""
        return max((curve.sizes[-1] for curve in self._prompt_curves.values()), default=0.0)


def _warm(shapes: Collection[_Shape]) -> Collection[_Shape]:
    """Those known by more than their first steps; all where there are none: prompts may well be thought too slow."""
    return [shape for shape in shapes if not shape.is_cold] or shapes


def octave(num_tokens: int) -> int:
    """Steps whose prompt tokens lie within a factor of two are of one shape."""
    return num_tokens.bit_length()


def _beside(
    curves: Mapping[int, _Curve], concurrency: int, read: Callable[[_Curve], float], *, hopeful: bool
) -> float | None:
    """Read the curve of this concurrency, or what is to be hoped for, or feared, from another's."""
    if concurrency in curves:
        return read(curves[concurrency])
    fewer = max((key for key in curves if key < concurrency), default=None)
    if fewer is not None:
        return read(curves[fewer]) * (1.0 if hopeful else concurrency / fewer)
    more = min(curves, default=None)
    if more is None:
        return None
    return read(curves[more]) * (min(_UNSEEN_ALONE * concurrency / more, 1.0) if hopeful else 1.0)


class Pace(Protocol):
    """What the choice needs to know of one stage: measured step by step, or predicted (`prediction.py`)."""

    @property
    def link_delay_s(self) -> float:
        """One way, into this stage; the last token's way back to the master is in the first's."""
        ...

    def step_s(self, shape: StepShape, *, num_steps: int, hopeful: bool = True) -> float | None:
        """The stage's time for such a step with so many steps in flight; None while it is not known."""
        ...

    def link_s(self, shape: StepShape) -> float:
        """How long the link into this stage is taken by such a step, apart from its delay."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePace:
    """A stage's pace, as its steps were measured."""

    num_sharing: int  # stages on its device, itself included
    times: StepTimes
    link_delay_s: float = 0.0  # one way, into this stage; the last token's way back to the master is in the first's
    link_token_s: float = 0.0  # what the link into this stage takes for a token's activation

    def step_s(self, shape: StepShape, *, num_steps: int, hopeful: bool = True) -> float | None:
        """The stage's time for such a step with so many steps in flight."""
        concurrency = min(num_steps, self.num_sharing)
        return self.times.at(shape.num_sequences, shape.prompt_tokens, concurrency=concurrency, hopeful=hopeful)

    def link_s(self, shape: StepShape) -> float:
        """How long the link into this stage is taken by such a step, apart from its delay."""
        return self.link_token_s * (shape.num_sequences + shape.prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A step's size: sequences, and prompt tokens beyond one for each of them."""

    num_sequences: int
    prompt_tokens: float = 0.0


Shapes = Mapping[StepShape, int]
"""The steps in flight: how many there are of each shape."""

TokensPerStep = Callable[[int], float]
"""Most prompt tokens of one step when so many steps are in flight."""


def split(mix: Mix, *, num_steps: int, chunk_tokens: float) -> Shapes:
    """Share the mix out evenly over so many steps, none with more prompt tokens than `chunk_tokens`.

    Where the prompts' tokens don't fit, the prompts that come first are computed and the others wait.
    """
    shapes: Counter[StepShape] = Counter()
    for index in range(num_steps):
        decodes = (mix.num_decodes + index) // num_steps
        prompts = (mix.num_prompts + num_steps - 1 - index) // num_steps  # where there is a decode less
        tokens = 0.0
        if prompts:
            each = mix.prompt_tokens / mix.num_prompts
            tokens = min(prompts * each, chunk_tokens)
            prompts = min(prompts, -int(-tokens // each))
        shapes[StepShape(num_sequences=decodes + prompts, prompt_tokens=max(tokens - prompts, 0.0))] += 1
    return shapes


@dataclass(frozen=True, slots=True)
class _Passage:
    """What it takes to bring steps through all stages."""

    longest_trip_s: float  # of one of them, alone
    busiest_s: float  # of all of them, at the stage or link that is taken by them longest
    largest_there_s: float  # of the one that takes the longest there


def _passage(stages: Sequence[Pace], shapes: Shapes, *, hopeful: bool) -> _Passage | None:
    """None when a stage is not measured."""
    num_steps = sum(shapes.values())
    trips = dict.fromkeys(shapes, 0.0)
    busiest_s = largest_s = 0.0
    for stage in stages:
        times: list[float] = []
        wires: list[float] = []
        for shape, count in shapes.items():
            step_s = stage.step_s(shape, num_steps=num_steps, hopeful=hopeful)
            if step_s is None:
                return None
            link_s = stage.link_s(shape)
            trips[shape] += step_s + link_s + stage.link_delay_s
            times += [step_s] * count
            wires += [link_s] * count
        for taken in (times, wires):
            if sum(taken) > busiest_s:
                busiest_s, largest_s = sum(taken), max(taken)
    return _Passage(max(trips.values()), busiest_s, largest_s)


def cycle_s(stages: Sequence[Pace], shapes: Shapes, *, hopeful: bool = True) -> float | None:
    """Seconds until each of these steps is back once, with all of them in flight; None when a stage is not measured."""
    passage = _passage(stages, shapes, hopeful=hopeful)
    return None if passage is None else max(passage.busiest_s, passage.longest_trip_s)


def all_through_s(stages: Sequence[Pace], shapes: Shapes, *, num_rounds: float = 1.0) -> float | None:
    """Seconds until these steps went so many times through an empty pipeline, which fills and drains.

    None as `cycle_s`.
    """
    passage = _passage(stages, shapes, hopeful=True)
    if passage is None:
        return None
    once_s = passage.longest_trip_s + passage.busiest_s - passage.largest_there_s
    return once_s + (num_rounds - 1) * max(passage.busiest_s, passage.longest_trip_s)


def choose_steps_in_flight(stages: Sequence[Pace], mix: Mix, *, chunk_tokens: TokensPerStep, current: int = 1) -> int:
    """The fewest steps in flight that no larger number beats by a margin, for what there is to compute.

    `chunk_tokens` is asked for the prompt tokens that one step may have, 0 where it can't have any. With a `current`
    choice, one that was made before for such a mix, the larger number has to be beaten itself before it is given up, so
    that the noise of measurements does not make the choice swing. Before the stages are measured: one step for decodes,
    so that they are measured alone; for prompts one for each stage, since their time grows with their tokens. Nothing
    is tried while decodes have prompts beside them.
    """
    most = min(mix.num_sequences, MOST_STEPS)
    if most < 2 or not stages:
        return 1
    worth = _Worth.of(stages, mix, max(chunk_tokens(1), _UNTRIED_TOKENS))
    if worth is None:
        return min(len(stages), most, max(mix.prompt_tokens // _UNTRIED_TOKENS, 1))
    is_mixed = mix.num_decodes > 0 and mix.num_prompts > 0
    best_steps, best_rate = 1, 0.0
    num_worse = 0
    for num_steps in _candidates(mix):
        if num_worse > _MOST_WORSE:
            break
        shapes = split(mix, num_steps=num_steps, chunk_tokens=chunk_tokens(num_steps))
        if mix.num_decodes:
            seconds, value = cycle_s(stages, shapes, hopeful=not is_mixed), worth.of_steps(mix, shapes)
        else:
            num_rounds = max(mix.prompt_tokens / _num_tokens(shapes), 1.0)
            seconds, value = all_through_s(stages, shapes, num_rounds=num_rounds), worth.of_prompts(mix)
        rate = value / seconds if seconds else 0.0  # times of zero promise nothing
        num_worse += 1
        if rate > best_rate * (1.0 if num_steps == current else WORTHWHILE):
            best_steps, best_rate, num_worse = num_steps, rate, 0
    return best_steps


def _num_tokens(shapes: Shapes) -> float:
    return sum(count * (shape.num_sequences + shape.prompt_tokens) for shape, count in shapes.items())


def _candidates(mix: Mix) -> list[int]:
    """The fewest steps in flight for each size that their largest may have: more for the same size bring nothing."""
    counts = (mix.num_sequences, mix.num_decodes, mix.num_prompts)
    steps = {-(-count // size) for count in counts for size in range(1, count + 1)}
    return sorted(number for number in steps if number <= MOST_STEPS)


@dataclass(frozen=True, slots=True)
class _Worth:
    """What tokens are worth: the time that all stages would take for them, one step after the other.

    A prompt's token is worth little where a step hardly notices it and much where it is what the step's time is.
    """

    decodes_s: float  # one token of each decode
    prompt_token_s: float

    @classmethod
    def of(cls, stages: Sequence[Pace], mix: Mix, chunk_tokens: float) -> _Worth | None:
        """None when a stage was not measured for such a mix."""
        (shape,) = split(mix, num_steps=1, chunk_tokens=chunk_tokens)
        tokens = shape.num_sequences - mix.num_decodes + shape.prompt_tokens
        decodes_s = whole_s = 0.0
        for stage in stages:
            alone_s = stage.step_s(StepShape(num_sequences=mix.num_decodes), num_steps=1)
            step_s = stage.step_s(shape, num_steps=1)
            if step_s is None:
                return None
            decodes_s += alone_s or 0.0
            whole_s += step_s
        return cls(decodes_s, max(whole_s - decodes_s, 0.0) / tokens if tokens else 0.0)

    def of_steps(self, mix: Mix, shapes: Shapes) -> float:
        """All that these steps compute."""
        return self.decodes_s + self.prompt_token_s * (_num_tokens(shapes) - mix.num_decodes)

    def of_prompts(self, mix: Mix) -> float:
        """All of the prompts."""
        return self.prompt_token_s * mix.prompt_tokens
