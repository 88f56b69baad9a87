"""A pipeline of known speed in simulated time: stages and links that handle steps in their order, and a master that
sends sequences again as soon as they are back. It knows none of the core's formulas: they are held against it.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardwright.core.step_times import StagePace, StepTimes
from shardwright.types import StepTiming


@dataclass(frozen=True, kw_only=True)
class TrueStage:
    """What a stage and the link into it really take."""

    base_s: float
    sequence_s: float = 0.0
    token_s: float = 0.0
    delay_s: float = 0.0
    link_token_s: float = 0.0

    def step_s(self, num_sequences: int, prompt_tokens: float) -> float:
        return self.base_s + self.sequence_s * num_sequences + self.token_s * prompt_tokens

    def measured(
        self, *, sizes: Sequence[int] = range(1, 65), tokens: Sequence[int] = (16, 64, 256, 1024)
    ) -> StagePace:
        """As known to the core after steps of these sizes."""
        times = StepTimes()
        times.add(
            StepTiming(num_sequences=size, num_tokens=size, mean_s=self.step_s(size, 0), count=9) for size in sizes
        )
        times.add(
            StepTiming(num_sequences=1, num_tokens=1 + count, mean_s=self.step_s(1, count), count=9) for count in tokens
        )
        return StagePace(num_sharing=1, times=times, link_delay_s=self.delay_s, link_token_s=self.link_token_s)


@dataclass
class Line:
    """The stages, and since when each of them and each link is free."""

    stages: Sequence[TrueStage]
    free: list[float] = field(default_factory=list)
    links_free: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [0.0] * len(self.stages)
        self.links_free = [0.0] * len(self.stages)

    def send(self, now: float, num_sequences: int, prompt_tokens: float = 0.0) -> float:
        """When the step is back. Steps don't pass each other, so a later one changes nothing."""
        for index, stage in enumerate(self.stages):
            starts = max(now, self.links_free[index])
            self.links_free[index] = starts + stage.link_token_s * (num_sequences + prompt_tokens)
            arrives = self.links_free[index] + stage.delay_s
            now = self.free[index] = max(arrives, self.free[index]) + stage.step_s(num_sequences, prompt_tokens)
        return now


@dataclass(kw_only=True)
class Run:
    """Decodes that go round in a line."""

    stages: Sequence[TrueStage]
    num_sequences: int
    num_steps: int
    chunk: Callable[[], float] = lambda: 0.0  # prompt tokens of the next step
    prompt_tokens: float = 0.0  # computed
    gaps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = 0.0
        self._line = Line(self.stages)
        self._ready = list(range(self.num_sequences))
        self._flying: list[tuple[float, int, list[int]]] = []
        self._last: dict[int, float] = {}
        self._sent = 0

    def _fill(self) -> None:
        while self._ready and len(self._flying) < self.num_steps:
            share = -(-self.num_sequences // self.num_steps)
            group, self._ready = self._ready[:share], self._ready[share:]
            count = len(group)
            tokens = self.chunk()
            self.prompt_tokens += tokens
            # a prompt's first token is one more sequence of the step
            shape = (count + 1, tokens - 1) if tokens else (count, 0.0)
            self._sent += 1
            heapq.heappush(self._flying, (self._line.send(self.now, *shape), self._sent, group))

    def advance(self, num_steps: int) -> None:
        """So many steps come back; gaps between a sequence's tokens are noted."""
        self._fill()
        for _ in range(num_steps):
            self.now, _, group = heapq.heappop(self._flying)
            for sequence in group:
                if sequence in self._last:
                    self.gaps.append(self.now - self._last[sequence])
                self._last[sequence] = self.now
            self._ready += group
            self._fill()

    def tokens_per_second(self, rounds: int = 30) -> float:
        """After a few rounds to become even."""
        self.advance(5 * self.num_steps)
        began, count = self.now, len(self.gaps)
        self.advance(rounds * self.num_steps)
        return (len(self.gaps) - count) / (self.now - began)
