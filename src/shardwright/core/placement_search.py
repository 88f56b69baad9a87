"""Finds the best cut of the layers and the best order of the workers, as `placement` defines best.

Equal workers form a queue; a state is (next layer, how far each queue is used, bytes held on each device whose
shared memory may run out). A memoised search over these states is exact; it runs twice, for the lowest bottleneck
and then, with no stage above that, for the rest. Where the states are too many (many unlike workers), the order is
fixed instead and only the cut is exact: the best of four orders (as given, slowest first, fastest first, largest
memory first). Where even then the states are too many, which takes several devices with several workers each and
hardly enough memory, such a device's memory is split evenly among its workers. Times are whole attoseconds, so that
sums don't round and equal is equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from shardwright.core.placement_costs import Offload, StageWeights
from shardwright.types import WorkerCapacity

ATTO = 10**18
"""Attoseconds in a second."""

_MAX_TRANSITIONS = 600_000
"""Transitions that the exact search may look at, about half a second; beyond it the order is fixed."""

_MAX_CUT_TRANSITIONS = 100_000
"""The same for the cut of one fixed order, where shared memory makes its states many."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the search sees it. Equal `kind` means interchangeable."""

    order: int  # in the input
    capacity: WorkerCapacity
    atto_per_byte: int  # of a decode step, alone
    pace_per_byte: int  # of the request that stages are balanced for: of the layers, alone, in attoseconds
    pace_per_head_byte: int  # and of the head; at most that of the layers
    atto_link: int
    sharing: int  # usable workers on its device, itself included
    device_limit: int  # memory of that device
    tracked: int  # which of the devices whose shared memory may run out it is on; -1: none
    offload_limit: int = 0  # bytes of weights that it may keep beside its memory; 0: none
    offload_atto_per_byte: int = 0  # that these take to come, with the way to itself
    offload_sharing: int = 1  # workers on that way, itself included

    @property
    def kind(self) -> tuple[int, ...]:
        """All that the search reads of a worker."""
        memory = self.capacity.memory_bytes
        times = (self.atto_per_byte, self.pace_per_byte, self.pace_per_head_byte, self.atto_link)
        offload = (self.offload_limit, self.offload_atto_per_byte, self.offload_sharing)
        return (memory, *times, self.sharing, self.device_limit, self.tracked, *offload)

    def offload(self, weights: StageWeights, start: int, end: int) -> Offload | None:
        """What of the stage it would keep beside its memory; None if it can't hold the stage."""
        return weights.offload(start, end, memory_bytes=self.capacity.memory_bytes, limit_bytes=self.offload_limit)

    def share(self, weights: StageWeights, start: int, end: int, offloaded: int = 0) -> int:
        """The stage's time towards the bottleneck: the request's, on its share of the device, in attoseconds.

        Of each step, the prompt's and those of the answer, computing and the coming of offloaded weights go on at the
        same time, so the longer of the two counts.
        """
        alone = weights.of_layers(start, end) * self.pace_per_byte
        head = weights.costs.head_bytes * self.pace_per_head_byte if end == weights.num_layers else 0
        if not offloaded:
            return (alone + head) * self.sharing
        settings = weights.settings
        decode = weights.of_layers(start, end) * self.pace_per_head_byte
        transfer = offloaded * self.offload_atto_per_byte * self.offload_sharing
        prompt_s = max((alone - decode) * self.sharing, transfer if settings.prompt_tokens else 0)
        decode_s = max((decode + head) * self.sharing, round(transfer * settings.new_tokens / settings.num_sequences))
        return prompt_s + decode_s

    def alone(self, weights: StageWeights, start: int, end: int, offloaded: int = 0) -> int:
        """A decode step of one sequence, with device and offload tier to itself, in attoseconds."""
        return max(weights.streamed(start, end) * self.atto_per_byte, offloaded * self.offload_atto_per_byte)


_Value: TypeAlias = tuple[int, int, int]
"""What is minimised over the rest of the pipeline, in this order: (-stages, bottleneck, 0) in the first pass,
(-stages, latency, sum of squared times) in the second. Both passes may choose the best rest for each state."""

_Option: TypeAlias = tuple[int, int, int, int]
"""A stage from some layer on: (end, time towards the bottleneck, time towards latency, memory needed)."""

_State: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(next layer, workers taken from each queue, bytes held on each tracked device)."""

_Choice: TypeAlias = tuple[int, int]
"""(queue, end of its next worker's stage); an end equal to the start leaves that worker out."""


_NO_CAP = 10**40
"""A bottleneck that nothing exceeds: longer than the age of the universe, in attoseconds."""


class _TooManyStatesError(Exception):
    """The search was given up."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: each stage with its worker, in pipeline order."""

    stages: tuple[tuple[Candidate, int, int], ...]
    bottleneck: int
    is_exact: bool


class _Search:
    """An exact search over the cuts of the layers and over the orders that a set of queues allows.

    Each queue's workers are taken from its front. `may_skip` lets a queue's unlike workers be passed over.
    `num_stages`, when given, is known to be possible, and `cap` a bottleneck known to be possible with it.
    """

    def __init__(
        self,
        weights: StageWeights,
        queues: Sequence[Sequence[Candidate]],
        *,
        may_skip: bool,
        num_stages: int | None,
        cap: int,
        limit: float,
    ) -> None:
        self._weights = weights
        self._queues = queues
        self._may_skip = may_skip
        self._num_stages = num_stages
        self._cap = cap
        self._limit = limit  # transitions; more raise `_TooManyStatesError`
        self._limit = limit
        limits = {w.tracked: w.device_limit for queue in queues for w in queue if w.tracked >= 0}
        self._device_limits = tuple(limit for _, limit in sorted(limits.items()))
        self._device_index = {tracked: index for index, tracked in enumerate(sorted(limits))}
        self._options: dict[tuple[tuple[int, ...], int], list[_Option]] = {}
        self._memo: dict[_State, tuple[_Value, _Choice | None] | None] = {}
        # Layer bytes that the workers from each position of a queue on can read in one attosecond, devices shared.
        self._speeds = [
            [*accumulate((1 / (w.pace_per_byte * w.sharing) for w in reversed(queue)), initial=0.0)][::-1]
            for queue in queues
        ]
        # The head as layer bytes of the same time, at the least.
        self._head_bytes = weights.costs.head_bytes * min(
            (w.pace_per_head_byte / w.pace_per_byte for queue in queues for w in queue), default=1.0
        )
        self._transitions = 0
        self._wants_bottleneck = True

    def run(self, *, is_exact: bool) -> Found | None:
        """Both passes; None if nothing fits. Raises `_TooManyStatesError`."""
        start: _State = (0, (0,) * len(self._queues), (0,) * len(self._device_limits))
        best = self._solve(start)
        if best is None:
            return None
        (negative_stages, self._cap, _), _ = best
        self._num_stages = None if self._may_skip else -negative_stages
        self._wants_bottleneck = False
        self._memo.clear()
        self._options.clear()
        best = self._solve(start)
        assert best is not None, "the second pass must find what the first one found"
        return Found(tuple(self._walk(start)), self._cap, is_exact)

    def _walk(self, state: _State) -> Iterator[tuple[Candidate, int, int]]:
        while state[0] < self._weights.num_layers:
            entry = self._memo[state]
            assert entry is not None
            assert entry[1] is not None
            (layer, taken, _), (queue, end) = state, entry[1]
            worker = self._queues[queue][taken[queue]]
            if end > layer:
                yield worker, layer, end
            state = self._after(state, queue, worker, end)

    def _after(self, state: _State, queue: int, worker: Candidate, end: int) -> _State:
        layer, taken, held = state
        if worker.tracked >= 0 and end > layer:
            at = self._device_index[worker.tracked]
            held = (*held[:at], held[at] + self._weights.needed(layer, end), *held[at + 1 :])
        return end, (*taken[:queue], taken[queue] + 1, *taken[queue + 1 :]), held

    def _solve(self, state: _State) -> tuple[_Value, _Choice | None] | None:
        """The best rest of the pipeline from a state on, or None if it can't be completed."""
        layer, taken, held = state
        num_layers = self._weights.num_layers
        if layer == num_layers:
            return (0, 0, 0), None
        if state in self._memo:
            return self._memo[state]
        speed = sum(speeds[position] for speeds, position in zip(self._speeds, taken, strict=True))
        bytes_left = self._weights.of_layers(layer, num_layers) + self._head_bytes
        if bytes_left > self._cap * speed * (1 + 1e-9):  # room for float's rounding
            return None  # not even layers divided at will would keep below the cap
        last_end = num_layers
        first_end = layer + 1
        if self._num_stages is not None:  # each stage still to come needs a layer, and the last one takes the rest
            stages_after = self._num_stages - sum(taken) - 1
            last_end = num_layers - stages_after
            first_end = num_layers if stages_after == 0 else first_end
        best: tuple[_Value, _Choice | None] | None = None
        for queue, workers in enumerate(self._queues):
            if taken[queue] == len(workers):
                continue
            worker = workers[taken[queue]]
            taken_after = (*taken[:queue], taken[queue] + 1, *taken[queue + 1 :])
            tracked = self._device_index[worker.tracked] if worker.tracked >= 0 else -1
            for end, share, cost, need in self._stage_options(worker, layer):
                if end > last_end:
                    break
                if end < first_end:
                    continue
                held_after = held
                if tracked >= 0:
                    total = held[tracked] + need
                    if total > self._device_limits[tracked]:
                        break
                    held_after = (*held[:tracked], total, *held[tracked + 1 :])
                self._transitions += 1
                rest = self._solve((end, taken_after, held_after))
                if rest is None:
                    continue
                stages, first, second = rest[0]
                if self._wants_bottleneck:
                    value = (stages - 1, max(share, first), 0)
                else:
                    value = (stages - 1, first + cost, second + share * share)
                if best is None or value < best[0]:
                    best = value, (queue, end)
            if self._may_skip:
                rest = self._solve((layer, taken_after, held))
                if rest is not None and (best is None or rest[0] < best[0]):
                    best = rest[0], (queue, layer)
        if self._transitions > self._limit:
            raise _TooManyStatesError
        self._memo[state] = best
        return best

    def _stage_options(self, worker: Candidate, start: int) -> list[_Option]:
        """The stages that this worker can hold from a layer on, shortest first."""
        key = (worker.kind, start)
        options = self._options.get(key)
        if options is None:
            options = self._options[key] = []
            for end in range(start + 1, self._weights.num_layers + 1):
                offload = worker.offload(self._weights, start, end)
                share = worker.share(self._weights, start, end, offload.num_bytes) if offload is not None else 0
                if offload is None or share > self._cap:
                    if worker.offload_limit:
                        continue  # with one more layer others are offloaded, and they may be smaller
                    break  # one more layer never makes a stage smaller or faster
                alone = worker.alone(self._weights, start, end, offload.num_bytes)
                need = self._weights.needed(start, end) - offload.saved
                options.append((end, share, alone + worker.atto_link, need))
        return options


def find_best(weights: StageWeights, workers: Sequence[Candidate]) -> Found | None:
    """The best placement, or with too many states the best for a fixed order; None if nothing fits."""
    if not _could_fit(weights, workers):
        return None
    incumbent = _best_of_fixed_orders(weights, workers)
    queues: dict[tuple[int, ...], list[Candidate]] = {}
    for worker in workers:
        queues.setdefault(worker.kind, []).append(worker)
    most = min(len(workers), weights.num_layers)
    num_stages, cap = None, _NO_CAP
    if incumbent is not None and len(incumbent.stages) == most:
        if len(queues) == 1 and workers[0].tracked < 0:
            return dataclasses.replace(incumbent, is_exact=True)  # equal workers have one order only
        num_stages, cap = most, incumbent.bottleneck
    if incumbent is not None and math.prod(len(queue) + 1 for queue in queues.values()) > _MAX_TRANSITIONS // 10:
        return incumbent  # an exact search would be given up
    try:
        kinds = list(queues.values())
        search = _Search(weights, kinds, may_skip=False, num_stages=num_stages, cap=cap, limit=_MAX_TRANSITIONS)
        return search.run(is_exact=True)
    except _TooManyStatesError:
        return incumbent


def _could_fit(weights: StageWeights, workers: Sequence[Candidate]) -> bool:
    """Whether all memory together is enough; a quick answer before a long search. What may be offloaded helps."""
    devices: dict[tuple[str, str], int] = {}
    limits: dict[tuple[str, str], int] = {}
    for worker in workers:
        key = (worker.capacity.host_id, worker.capacity.device)
        devices[key] = devices.get(key, 0) + worker.capacity.memory_bytes
        limits[key] = worker.device_limit
    memory = sum(min(total, limits[key]) for key, total in devices.items())
    return memory + sum(worker.offload_limit for worker in workers) >= weights.needed(0, weights.num_layers)


def _best_of_fixed_orders(weights: StageWeights, workers: Sequence[Candidate]) -> Found | None:
    """The best of four orders of the workers, each cut exactly."""
    orders = [
        list(workers),
        sorted(workers, key=lambda w: -w.pace_per_byte * w.sharing),
        sorted(workers, key=lambda w: w.pace_per_byte * w.sharing),
        sorted(workers, key=lambda w: -w.capacity.memory_bytes),
    ]
    most = min(len(workers), weights.num_layers)
    best: Found | None = None
    for index, order in enumerate(orders):
        kinds = [w.kind for w in order]
        if any(kinds == [w.kind for w in earlier] for earlier in orders[:index]):
            continue
        cap = best.bottleneck if best is not None and len(best.stages) == most else _NO_CAP
        found = _cut(weights, order, cap)
        if found is not None and (best is None or _rank(weights, found) < _rank(weights, best)):
            best = found
    return best


def _cut(weights: StageWeights, order: Sequence[Candidate], cap: int) -> Found | None:
    """The best cut for one order of the workers. With too many states a shared memory is split evenly instead.

    `cap`, unless it is `_NO_CAP`, is the bottleneck of another order that uses as many workers as can be used.
    """
    all_used = len(order) <= weights.num_layers
    for workers in (order, _with_split_memory(order)):
        try:
            # Most often every worker gets layers and none is twice as slow as the mean: quick to find.
            if all_used and (found := _cut_into(weights, workers, len(order), min(cap, _likely_cap(weights, workers)))):
                return found
            if all_used and (found := _cut_into(weights, workers, len(order), cap)):
                return found
            if cap != _NO_CAP and all_used:
                return None
            if found := _cut_into(weights, workers, None, cap):
                return found
        except _TooManyStatesError:
            continue
        return None
    return None


def _cut_into(weights: StageWeights, order: Sequence[Candidate], num_stages: int | None, cap: int) -> Found | None:
    # Without shared memory there are at most workers x layers states, and the search must not be given up.
    limit = _MAX_CUT_TRANSITIONS if any(worker.tracked >= 0 for worker in order) else math.inf
    search = _Search(weights, [order], may_skip=num_stages is None, num_stages=num_stages, cap=cap, limit=limit)
    return search.run(is_exact=False)


def _likely_cap(weights: StageWeights, workers: Sequence[Candidate]) -> int:
    """Twice the bottleneck that there would be if layers could be divided at will, each worker having at least one."""
    speed = sum(1 / (w.pace_per_byte * w.sharing) for w in workers)
    one_layer = max(weights.costs.layer_bytes) * max(w.pace_per_byte * w.sharing for w in workers)
    return 2 * max(round(weights.streamed(0, weights.num_layers) / speed), one_layer)


def _with_split_memory(workers: Sequence[Candidate]) -> list[Candidate]:
    """The same workers, each of which owns an equal part of a device's memory that may run out."""
    split = []
    for worker in workers:
        capacity = worker.capacity
        if worker.tracked >= 0:
            memory = min(capacity.memory_bytes, worker.device_limit // worker.sharing)
            capacity = dataclasses.replace(capacity, memory_bytes=memory)
        split.append(dataclasses.replace(worker, capacity=capacity, tracked=-1))
    return split


def _rank(weights: StageWeights, found: Found) -> tuple[int, int, int]:
    return -len(found.stages), found.bottleneck, latency(weights, found)


def latency(weights: StageWeights, found: Found) -> int:
    """Attoseconds of one step through all stages and links, with the devices to itself."""
    return sum(
        w.alone(weights, start, end, offloaded(weights, w, start, end)) + w.atto_link for w, start, end in found.stages
    )


def offloaded(weights: StageWeights, worker: Candidate, start: int, end: int) -> int:
    """Bytes of a stage that was found which its worker keeps beside its memory."""
    offload = worker.offload(weights, start, end)
    return offload.num_bytes if offload is not None else 0
