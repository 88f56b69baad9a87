"""How many steps in flight pay: measured step times and link delays in, a number out.

Let t_i(b) be stage i's time for a step of b sequences, l_i the delay of the link into it, B the sequences there are.
With m steps in flight of B/m sequences each, a step's trip takes sum(t_i(B/m) + l_i), and in that time every stage
must compute m steps. So

    tokens/s = B / max( sum over stages (t_i(B/m) + l_i),  m * max over stages t_i(B/m) )

Where t is flat in b (decode bound by memory) more than one step never pays; where t grows with b, up to about
S (1 + l/t) steps gain in proportion.

Stages on one device (one machine's cores, one GPU) slow each other down when they compute at the same time, and how
much only a measurement tells: work that waits for memory halves its speed, work that waits for the interpreter keeps
it. So their times are kept by concurrency, the number of them that compute at once: min(m, stages on the device).

A table that knows only whole batches, or only one step at a time, can't tell what two would bring. So two steps are
put in flight until half batches were seen under them: that costs little, and the formula decides from then on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardwright.types import StepTiming

MOST_STEPS = 64
"""More steps in flight than this are never considered: it bounds the queues along the pipeline."""

WORTHWHILE = 1.03
"""One more step in flight has to promise this factor: measured times are not better than a few percent."""

_NEW_WEIGHT = 0.25
"""Weight of a new report against what is known: times drift with load and temperature."""


@dataclass(slots=True, eq=False)
class StepTimes:
    """One stage's measured decode times by concurrency and number of sequences."""

    mean_s: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, timings: Iterable[StepTiming]) -> None:
        """Take a report's means. Only pure decode steps count (one token for each sequence), and no step alone.

        A step alone may be the first of its shape, which prepares kernels and buffers: the probe is such a one.
        """
        for timing in timings:
            if timing.count < 2 or timing.num_tokens != timing.num_sequences or timing.num_sequences < 1:
                continue
            table = self.mean_s.setdefault(timing.concurrency, {})
            known = table.get(timing.num_sequences)
            if known is None:
                table[timing.num_sequences] = timing.mean_s
            else:
                table[timing.num_sequences] += _NEW_WEIGHT * (timing.mean_s - known)

    def knows(self, num_sequences: int, *, concurrency: int = 1) -> bool:
        """Whether a step of at most so many sequences was measured at this concurrency."""
        return any(size <= num_sequences for size in self.mean_s.get(concurrency, ()))

    def at(self, num_sequences: int, *, concurrency: int = 1) -> float | None:
        """The time for a step of so many sequences, in seconds; None when nothing was measured at this concurrency.

        Between two measured sizes on the line through them; outside them as at the nearest, so that splitting or
        joining promises nothing that was not seen. Never falls with the size: a smaller step is not slower.
        """
        table = self.mean_s.get(concurrency)
        if not table:
            return None
        sizes = sorted(table)
        times = [table[size] for size in sizes]
        for index in range(len(times) - 2, -1, -1):
            times[index] = min(times[index], times[index + 1])
        right = bisect_left(sizes, num_sequences)
        if right == len(sizes):
            return times[-1]
        if right == 0 or sizes[right] == num_sequences:
            return times[right]
        part = (num_sequences - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return times[right - 1] + part * (times[right] - times[right - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePace:
    """What the choice needs to know of one stage."""

    num_sharing: int  # stages on its device, itself included
    times: StepTimes
    link_delay_s: float  # one way, into this stage

    def concurrency(self, num_steps: int) -> int:
        """Stages on its device that compute at once with so many steps in flight."""
        return min(num_steps, self.num_sharing)


def tokens_per_second(stages: Sequence[StagePace], *, num_sequences: int, num_steps: int) -> float | None:
    """The formula above; None when a stage was not measured yet."""
    trip_s = longest_s = 0.0
    for stage in stages:
        time_s = stage.times.at(-(-num_sequences // num_steps), concurrency=stage.concurrency(num_steps))
        if time_s is None:
            return None
        trip_s += time_s + stage.link_delay_s
        longest_s = max(longest_s, time_s)
    slowest_s = max(trip_s, num_steps * longest_s)
    return num_sequences / slowest_s if slowest_s > 0 else None


def choose_steps_in_flight(stages: Sequence[StagePace], *, num_sequences: int) -> int:
    """The fewest steps in flight that no larger number beats by a margin.

    1 while a stage is not measured at all; 2 where only the time of half as many sequences under two steps is missing.
    """
    best_steps = 1
    best_rate = tokens_per_second(stages, num_sequences=num_sequences, num_steps=1) if stages else None
    if best_rate is None or num_sequences < 2:
        return 1
    half = -(-num_sequences // 2)
    if len(stages) > 1 and not all(s.times.knows(half, concurrency=s.concurrency(2)) for s in stages):
        return 2
    for num_steps in range(2, min(num_sequences, MOST_STEPS) + 1):
        rate = tokens_per_second(stages, num_sequences=num_sequences, num_steps=num_steps)
        if rate is not None and rate > best_rate * WORTHWHILE:
            best_steps, best_rate = num_steps, rate
    return best_steps
