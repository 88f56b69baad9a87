"""A real master over workers of known speed, in simulated time: what it learns from its heartbeats and trips alone."""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random  # noqa: TID251 - seeded: the noise of measurements

from conversation import COSTS, bring_up, heartbeat, joined, settings, submit, tell
from timed_line import TrueStage

from shardwright.core.effects import EmitToken, SendStep
from shardwright.core.events import Deploy, TokensSampled
from shardwright.core.master import MasterState
from shardwright.runtime.telemetry import StepClock
from shardwright.types import StepInput, TokenOut

HEARTBEAT_S = 1.0


@dataclass(kw_only=True)
class TimedMaster:
    """Requests go in with `ask`, time passes in `run`; tokens' times by sequence come out in `times`."""

    line: Sequence[TrueStage]
    same_host: bool = False
    slowdown: Callable[[int], float] = lambda _: 1.0  # of stages that share a device, by concurrency
    noise: float = 0.03
    hindrance: Callable[[float, StepInput], float] = lambda _now, _step: 1.0  # what else makes a step so much longer
    changes: dict[str, object] = field(default_factory=dict)  # of the master's settings
    times: dict[int, list[float]] = field(default_factory=dict)
    choices: list[tuple[float, int]] = field(default_factory=list)  # steps in flight that steps were sent with

    def __post_init__(self) -> None:
        self.now = 0.0
        names = [f"w{index}" for index in range(len(self.line))]
        values = {"block_size": 16, "token_budget": 512, "max_kv_tokens": 65536, "heartbeat_timeout_s": 1e6}
        costs = replace(
            COSTS,
            max_context=8192,
            layer_bytes=(10**6,) * 2 * len(names),
            layer_kv_bytes_per_token=(8,) * 2 * len(names),
        )
        self.master = MasterState(settings(**(values | self.changes)), costs)
        for name in names:
            tell(self.master, joined(name, host_id="h" if self.same_host else "", memory_bytes=10**8))
        tell(self.master, Deploy())
        self.names = [stage.worker_id for stage in self.master.snapshot().stages]
        assert len(self.names) == len(self.line), "a stage for each"
        bring_up(self.master)
        self.clocks = [StepClock() for _ in self.line]
        self._dice = Random(7)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._free = [0.0] * len(self.line)
        self._links_free = [0.0] * len(self.line)
        self._seen: set[tuple[int, bool]] = set()
        for index in range(len(self.line)):
            self._at(HEARTBEAT_S * (1 + index / len(self.line)), lambda index=index: self._beat(index))

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._count), action))

    def _beat(self, index: int) -> None:
        self._tell(heartbeat(self.names[index], *self.clocks[index].take()))
        self._at(self.now + HEARTBEAT_S, lambda: self._beat(index))

    def _tell(self, event: object) -> None:
        for effect in self.master.handle(event, self.now):
            if isinstance(effect, SendStep):
                self.choices.append((self.now, effect.step.steps_in_flight))
                self._send(effect.step)
            elif isinstance(effect, EmitToken):
                self.times.setdefault(effect.seq_id, []).append(self.now)

    def _send(self, step: StepInput) -> None:
        """The step's way through the line, known at once: steps don't pass each other."""
        now = self.now
        concurrency = min(step.steps_in_flight, len(self.line)) if self.same_host else 1
        size = len(step.slices)
        for index, stage in enumerate(self.line):
            starts = max(now, self._links_free[index])
            self._links_free[index] = starts + stage.link_token_s * step.num_tokens
            arrives = self._links_free[index] + stage.delay_s
            seconds = stage.step_s(size, step.num_tokens - size) * self.slowdown(concurrency)
            seconds *= self.hindrance(self.now, step)
            seconds *= 1 + self._dice.uniform(-self.noise, self.noise)
            shape = (index, step.num_tokens > size)
            if shape not in self._seen:  # its first step prepares things
                self._seen.add(shape)
                seconds *= 3
            now = self._free[index] = max(arrives, self._free[index]) + seconds
            record = self.clocks[index].record
            self._at(
                now,
                lambda record=record, seconds=seconds: record(
                    num_sequences=size, num_tokens=step.num_tokens, seconds=seconds, concurrency=concurrency
                ),
            )
        tokens = tuple(TokenOut(seq_id=s.seq_id, token_id=9, logprob=-1.0) for s in step.slices if s.sampling)
        self._at(now, lambda: self._tell(TokensSampled(epoch=step.epoch, step=step.step, tokens=tokens)))

    def ask(self, seq_id: int, num_tokens: int, *, new: int) -> None:
        """A request now, with tokens that no other prompt has."""
        self._tell(submit(seq_id, tuple(range(seq_id * 10_000, seq_id * 10_000 + num_tokens)), new=new))

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        self.run_until(lambda: False, most_s=seconds)

    def run_until(self, done: Callable[[], bool], *, most_s: float = 10_000.0) -> None:
        """Until something is so."""
        end = self.now + most_s
        while self._due[0][0] <= end and not done():
            self.now, _, action = heapq.heappop(self._due)
            action()
        self.now = self.now if done() else end

    @property
    def num_tokens(self) -> int:
        """That came out so far."""
        return sum(len(times) for times in self.times.values())

    def busy(self) -> list[float]:
        """Compute time of each stage by its own clock."""
        return [clock.busy_s for clock in self.clocks]
