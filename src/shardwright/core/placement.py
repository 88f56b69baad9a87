"""Decides which worker holds which layers. Knows what a model's parts weigh and what workers measured of themselves.

The question. Cut the layers, in order, into stages; give each stage to a worker of its own; choose also the order
of the workers. Of all cuts and orders that fit in memory take one that (1) uses the most workers, then (2) has the
lowest bottleneck, then (3) the lowest latency, then (4) the most even stages. What is left of ties goes to the
workers' input order, so equal workers keep the order of the registry.

What a stage costs.
  memory     its layers' weights, the embedding on the first stage, norm and head on the last (tied to the embedding:
             held once where both are one stage), KV of `min_kv_tokens` positions, and `workspace_bytes`
  step time  one token of one sequence: weights streamed once, limited by bandwidth or by arithmetic (two operations
             for each weight), whichever is slower. The embedding is a lookup and costs no time. The head does.
  latency    all stages' step times and their workers' link delays: one step, alone in the pipeline
  bottleneck the longest time that a stage needs its share of a device for a step, with the pipeline full

Workers that share a device (same `host_id` and `device`: the CPU of one machine, one GPU given to two workers).
Each measured itself alone. Their memory is one: what they hold together must fit in the device's
(`shared_memory_bytes`, or the largest `memory_bytes` among them). Their speed is one too: a single step finds them
idle but for one, so that its latency is as measured; but a full pipeline keeps all k of them busy, so each has 1/k of
the speed and counts k times towards the bottleneck. k counts the workers that were given and can hold a layer.
A stage of one of k such workers therefore gets about 1/k of what it would get alone, and equal peers split evenly.

How. Equal workers form a queue; a state is (next layer, how far each queue is used, bytes held on each device whose
shared memory may run out). A memoised search over these states is exact; it runs twice, for the lowest bottleneck
and then, with no stage above that, for the rest. Where the states are too many (many unlike workers), the order is
fixed instead and only the cut is exact: the best of four orders (as given, slowest first, fastest first, largest
memory first). Times are whole attoseconds, so that sums don't round and equal is equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from shardwright.errors import PlacementError
from shardwright.types import LayerRange, ModelCosts, WorkerCapacity, WorkerId

_ATTO = 10**18
_MIB = 1024**2
_GIB = 1024**3
_MAX_TRANSITIONS = 600_000
"""Transitions that one exact search may look at, about half a second; beyond it the order is fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What a placement must leave room for."""

    block_size: int = 16
    max_kv_tokens: int = 65536  # most KV positions, whatever memory there is
    min_kv_tokens: int = 1024  # KV headroom: a placement with room for fewer positions is refused
    workspace_bytes: int = 128 * _MIB  # kept free on each worker for activations

    def __post_init__(self) -> None:
        assert self.block_size >= 1, f"block_size is {self.block_size}"
        assert 1 <= self.min_kv_tokens <= self.max_kv_tokens, f"{self.min_kv_tokens=} {self.max_kv_tokens=}"
        assert self.workspace_bytes >= 0, f"workspace_bytes is {self.workspace_bytes}"

    @property
    def min_blocks(self) -> int:
        """Blocks that `min_kv_tokens` positions take."""
        return -(-self.min_kv_tokens // self.block_size)

    @property
    def max_blocks(self) -> int:
        """Blocks that `max_kv_tokens` positions fill, and never fewer than `min_blocks`."""
        return max(self.max_kv_tokens // self.block_size, self.min_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One worker's share of the model and what it is predicted to cost."""

    worker_id: WorkerId
    layers: LayerRange
    weight_bytes: int  # embedding, norm and head included where the stage holds them
    kv_bytes: int  # of all of the placement's blocks
    step_s: float  # predicted: one decode step of one sequence, with the device to itself
    is_first: bool
    is_last: bool
    reason: str  # why this many layers, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A worker that holds no stage, and why."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The stages in pipeline order, and the size of the one block pool that serves them all."""

    stages: tuple[PlannedStage, ...]
    num_blocks: int
    bottleneck_s: float  # predicted time between two steps, with the pipeline full
    latency_s: float  # predicted time of one step through all stages and links
    left_out: tuple[LeftOut, ...]
    is_exact: bool  # False: the order of the workers was fixed, see above; the cut is the best for that order


def place(costs: ModelCosts, workers: Sequence[WorkerCapacity], settings: PlacementSettings) -> Placement:
    """Give each layer to a worker, as the module's docstring says.

    The same arguments always give the same placement. Raises `PlacementError` when there is no worker or when the
    model fits nowhere; the message says what it needs, what there is, and what would help.
    """
    assert costs.num_layers >= 1, f"{costs.name} has no layers"
    assert len({w.worker_id for w in workers}) == len(workers), "two workers have the same id"
    if not workers:
        raise PlacementError(f"there is no worker to hold {costs.name}; register one, or start some on this machine")
    weights = _Weights(costs, settings)
    usable, left_out = _sort_out(weights, workers)
    found = _best(weights, usable)
    if found is None:
        raise PlacementError(_misfit(weights, workers, usable))
    return _describe(weights, usable, left_out, found)


# --- what things weigh -------------------------------------------------------------------------------


class _Weights:
    """Bytes of any stage [start, end) in constant time, from running sums over the layers."""

    def __init__(self, costs: ModelCosts, settings: PlacementSettings) -> None:
        assert len(costs.layer_kv_bytes_per_token) == costs.num_layers, "one KV size for each layer"
        self.costs = costs
        self.settings = settings
        self.num_layers = costs.num_layers
        self._layer_sum = [0, *accumulate(costs.layer_bytes)]
        self._kv_sum = [0, *accumulate(n * settings.block_size for n in costs.layer_kv_bytes_per_token)]

    def held(self, start: int, end: int) -> int:
        """Weights that the stage keeps in memory."""
        layers = self._layer_sum[end] - self._layer_sum[start]
        costs = self.costs
        is_last = end == self.num_layers
        if start == 0 and is_last and costs.tied_embedding:
            return layers + max(costs.embedding_bytes, costs.head_bytes)
        return layers + (costs.embedding_bytes if start == 0 else 0) + (costs.head_bytes if is_last else 0)

    def streamed(self, start: int, end: int) -> int:
        """Weights that one decode step reads: all but the embedding."""
        layers = self._layer_sum[end] - self._layer_sum[start]
        return layers + (self.costs.head_bytes if end == self.num_layers else 0)

    def kv_per_block(self, start: int, end: int) -> int:
        """Bytes of one block in all of the stage's layers."""
        return self._kv_sum[end] - self._kv_sum[start]

    def needed(self, start: int, end: int) -> int:
        """The least memory with which a worker can hold the stage."""
        kv = self.kv_per_block(start, end) * self.settings.min_blocks
        return self.held(start, end) + kv + self.settings.workspace_bytes

    @property
    def smallest_need(self) -> int:
        """The least memory with which a worker is of any use."""
        return min(self.needed(i, i + 1) for i in range(self.num_layers))


@dataclass(frozen=True, slots=True)
class _Worker:
    """A worker as the search sees it. Equal `kind` means interchangeable."""

    order: int  # in the input
    capacity: WorkerCapacity
    atto_per_byte: int  # alone
    atto_link: int
    sharing: int  # usable workers on its device, itself included
    device_limit: int  # memory of that device
    tracked: int  # which of the devices whose shared memory may run out it is on; -1: none

    @property
    def kind(self) -> tuple[int, ...]:
        memory = self.capacity.memory_bytes
        return (memory, self.atto_per_byte, self.atto_link, self.sharing, self.device_limit, self.tracked)


def _sort_out(weights: _Weights, workers: Sequence[WorkerCapacity]) -> tuple[list[_Worker], list[LeftOut]]:
    """Split the workers into those that can hold some layer and those that can't, and see who shares what."""
    usable: list[tuple[int, WorkerCapacity]] = []
    left_out: list[LeftOut] = []
    smallest = weights.smallest_need
    for order, worker in enumerate(workers):
        if not (worker.read_bandwidth > 0 and worker.matrix_rate > 0):
            left_out.append(LeftOut(worker_id=worker.worker_id, reason="it measured no speed"))
        elif worker.memory_bytes < smallest:
            reason = (
                f"it can't hold even one layer: that takes {_gib(smallest)} with KV for "
                f"{weights.settings.min_kv_tokens} tokens and workspace, it has {_gib(worker.memory_bytes)}"
            )
            left_out.append(LeftOut(worker_id=worker.worker_id, reason=reason))
        else:
            usable.append((order, worker))
    groups: dict[tuple[str, str], list[WorkerCapacity]] = {}
    for _, worker in usable:
        groups.setdefault((worker.host_id, worker.device), []).append(worker)
    limits = {key: max(max(w.shared_memory_bytes, w.memory_bytes) for w in group) for key, group in groups.items()}
    # A device that could hold the whole model for all of its workers can't run out, and needs no tracking.
    whole = weights.needed(0, weights.num_layers) + (
        weights.costs.embedding_bytes if weights.costs.tied_embedding else 0
    )
    tight = [
        key
        for key, group in groups.items()
        if len(group) > 1 and whole + (len(group) - 1) * weights.settings.workspace_bytes > limits[key]
    ]
    found = []
    for order, worker in usable:
        key = (worker.host_id, worker.device)
        seconds_per_byte = max(1 / worker.read_bandwidth, 2 / weights.costs.element_bytes / worker.matrix_rate)
        found.append(
            _Worker(
                order=order,
                capacity=worker,
                atto_per_byte=max(round(seconds_per_byte * _ATTO), 1),
                atto_link=round(worker.link_delay_s * _ATTO),
                sharing=len(groups[key]),
                device_limit=limits[key],
                tracked=tight.index(key) if key in tight else -1,
            )
        )
    return found, left_out


# --- the search --------------------------------------------------------------------------------------

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
class _Found:
    """The result of a search: each stage with its worker, in pipeline order."""

    stages: tuple[tuple[_Worker, int, int], ...]
    bottleneck: int
    is_exact: bool


class _Search:
    """An exact search over the cuts of the layers and over the orders that a set of queues allows.

    Each queue's workers are taken from its front. `may_skip` lets a queue's unlike workers be passed over.
    `num_stages`, when given, is known to be possible, and `cap` a bottleneck known to be possible with it.
    """

    def __init__(
        self,
        weights: _Weights,
        queues: Sequence[Sequence[_Worker]],
        *,
        may_skip: bool,
        num_stages: int | None,
        cap: int,
    ) -> None:
        self._weights = weights
        self._queues = queues
        self._may_skip = may_skip
        self._num_stages = num_stages
        self._cap = cap
        limits = {w.tracked: w.device_limit for queue in queues for w in queue if w.tracked >= 0}
        self._device_limits = tuple(limit for _, limit in sorted(limits.items()))
        self._device_index = {tracked: index for index, tracked in enumerate(sorted(limits))}
        self._options: dict[tuple[tuple[int, ...], int], list[_Option]] = {}
        self._memo: dict[_State, tuple[_Value, _Choice | None] | None] = {}
        # Layer bytes that the workers from each position of a queue on can read in one attosecond, devices shared.
        self._speeds = [
            [*accumulate((1 / (w.atto_per_byte * w.sharing) for w in reversed(queue)), initial=0.0)][::-1]
            for queue in queues
        ]
        self._transitions = 0
        self._wants_bottleneck = True

    def run(self, *, is_exact: bool) -> _Found | None:
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
        return _Found(tuple(self._walk(start)), self._cap, is_exact)

    def _walk(self, state: _State) -> Iterator[tuple[_Worker, int, int]]:
        while state[0] < self._weights.num_layers:
            entry = self._memo[state]
            assert entry is not None
            assert entry[1] is not None
            (layer, taken, _), (queue, end) = state, entry[1]
            worker = self._queues[queue][taken[queue]]
            if end > layer:
                yield worker, layer, end
            state = self._after(state, queue, worker, end)

    def _after(self, state: _State, queue: int, worker: _Worker, end: int) -> _State:
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
        if self._weights.streamed(layer, num_layers) > self._cap * speed * (1 + 1e-9):  # room for float's rounding
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
        if self._transitions > _MAX_TRANSITIONS:
            raise _TooManyStatesError
        self._memo[state] = best
        return best

    def _stage_options(self, worker: _Worker, start: int) -> list[_Option]:
        """The stages that this worker can hold from a layer on, shortest first."""
        key = (worker.kind, start)
        options = self._options.get(key)
        if options is None:
            options = self._options[key] = []
            for end in range(start + 1, self._weights.num_layers + 1):
                need = self._weights.needed(start, end)
                alone = self._weights.streamed(start, end) * worker.atto_per_byte
                share = alone * worker.sharing
                if need > worker.capacity.memory_bytes or share > self._cap:
                    break  # one more layer never makes a stage smaller or faster
                options.append((end, share, alone + worker.atto_link, need))
        return options


def _best(weights: _Weights, workers: Sequence[_Worker]) -> _Found | None:
    """The best placement, or with too many states the best for a fixed order; None if nothing fits."""
    if not _could_fit(weights, workers):
        return None
    incumbent = _best_of_fixed_orders(weights, workers)
    queues: dict[tuple[int, ...], list[_Worker]] = {}
    for worker in workers:
        queues.setdefault(worker.kind, []).append(worker)
    most = min(len(workers), weights.num_layers)
    num_stages, cap = None, _NO_CAP
    if incumbent is not None and len(incumbent.stages) == most:
        if len(queues) == 1 and workers[0].tracked < 0:
            return dataclasses.replace(incumbent, is_exact=True)  # equal workers have one order only
        num_stages, cap = most, incumbent.bottleneck
    try:
        search = _Search(weights, list(queues.values()), may_skip=False, num_stages=num_stages, cap=cap)
        return search.run(is_exact=True)
    except _TooManyStatesError:
        return incumbent


def _could_fit(weights: _Weights, workers: Sequence[_Worker]) -> bool:
    """Whether all memory together is enough; a quick answer before a long search."""
    devices: dict[tuple[str, str], int] = {}
    limits: dict[tuple[str, str], int] = {}
    for worker in workers:
        key = (worker.capacity.host_id, worker.capacity.device)
        devices[key] = devices.get(key, 0) + worker.capacity.memory_bytes
        limits[key] = worker.device_limit
    return sum(min(total, limits[key]) for key, total in devices.items()) >= weights.needed(0, weights.num_layers)


def _best_of_fixed_orders(weights: _Weights, workers: Sequence[_Worker]) -> _Found | None:
    """The best of four orders of the workers, each cut exactly."""
    orders = [
        list(workers),
        sorted(workers, key=lambda w: -w.atto_per_byte * w.sharing),
        sorted(workers, key=lambda w: w.atto_per_byte * w.sharing),
        sorted(workers, key=lambda w: -w.capacity.memory_bytes),
    ]
    most = min(len(workers), weights.num_layers)
    best: _Found | None = None
    for index, order in enumerate(orders):
        kinds = [w.kind for w in order]
        if any(kinds == [w.kind for w in earlier] for earlier in orders[:index]):
            continue
        cap = best.bottleneck if best is not None and len(best.stages) == most else _NO_CAP
        found = _cut(weights, order, cap)
        if found is not None and (best is None or _rank(weights, found) < _rank(weights, best)):
            best = found
    return best


def _cut(weights: _Weights, order: Sequence[_Worker], cap: int) -> _Found | None:
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


def _cut_into(weights: _Weights, order: Sequence[_Worker], num_stages: int | None, cap: int) -> _Found | None:
    search = _Search(weights, [order], may_skip=num_stages is None, num_stages=num_stages, cap=cap)
    return search.run(is_exact=False)


def _likely_cap(weights: _Weights, workers: Sequence[_Worker]) -> int:
    """Twice the bottleneck that there would be if layers could be divided at will, each worker having at least one."""
    speed = sum(1 / (w.atto_per_byte * w.sharing) for w in workers)
    one_layer = max(weights.costs.layer_bytes) * max(w.atto_per_byte * w.sharing for w in workers)
    return 2 * max(round(weights.streamed(0, weights.num_layers) / speed), one_layer)


def _with_split_memory(workers: Sequence[_Worker]) -> list[_Worker]:
    """The same workers, each of which owns an equal part of a device's memory that may run out."""
    split = []
    for worker in workers:
        capacity = worker.capacity
        if worker.tracked >= 0:
            memory = min(capacity.memory_bytes, worker.device_limit // worker.sharing)
            capacity = dataclasses.replace(capacity, memory_bytes=memory)
        split.append(dataclasses.replace(worker, capacity=capacity, tracked=-1))
    return split


def _rank(weights: _Weights, found: _Found) -> tuple[int, int, int]:
    return -len(found.stages), found.bottleneck, _latency(weights, found)


def _latency(weights: _Weights, found: _Found) -> int:
    return sum(weights.streamed(start, end) * w.atto_per_byte + w.atto_link for w, start, end in found.stages)


# --- the answer in words -----------------------------------------------------------------------------


def _describe(weights: _Weights, usable: Sequence[_Worker], left_out: Sequence[LeftOut], found: _Found) -> Placement:
    num_blocks = _num_blocks(weights, found)
    stages = []
    for worker, start, end in found.stages:
        alone = weights.streamed(start, end) * worker.atto_per_byte
        stages.append(
            PlannedStage(
                worker_id=worker.capacity.worker_id,
                layers=LayerRange(start, end),
                weight_bytes=weights.held(start, end),
                kv_bytes=weights.kv_per_block(start, end) * num_blocks,
                step_s=alone / _ATTO,
                is_first=start == 0,
                is_last=end == weights.num_layers,
                reason=_reason(weights, worker, start, end, is_slowest=alone * worker.sharing == found.bottleneck),
            )
        )
    used = {worker.order for worker, _, _ in found.stages}
    too_many = len(found.stages) == weights.num_layers
    reason = "every layer has a worker already" if too_many else "no placement that includes it too fits in memory"
    unused = [LeftOut(worker_id=w.capacity.worker_id, reason=reason) for w in usable if w.order not in used]
    return Placement(
        stages=tuple(stages),
        num_blocks=num_blocks,
        bottleneck_s=found.bottleneck / _ATTO,
        latency_s=_latency(weights, found) / _ATTO,
        left_out=(*left_out, *unused),
        is_exact=found.is_exact,
    )


def _num_blocks(weights: _Weights, found: _Found) -> int:
    """Blocks that the stage, or the device under several stages, with the least room has room for."""
    workspace = weights.settings.workspace_bytes
    room: list[tuple[int, int]] = []  # bytes left, bytes of a block
    devices: dict[tuple[str, str], tuple[int, int]] = {}
    for worker, start, end in found.stages:
        weight, block = weights.held(start, end) + workspace, weights.kv_per_block(start, end)
        room.append((worker.capacity.memory_bytes - weight, block))
        key = (worker.capacity.host_id, worker.capacity.device)
        left, blocks = devices.get(key, (worker.device_limit, 0))
        devices[key] = (left - weight, blocks + block)
    room.extend(devices.values())
    return min([left // block for left, block in room if block > 0] + [weights.settings.max_blocks])


def _reason(weights: _Weights, worker: _Worker, start: int, end: int, *, is_slowest: bool) -> str:
    parts = [
        f"{_mib(weights.streamed(start, end))} to read for each token at {_ATTO / worker.atto_per_byte / 1e9:.1f} GB/s"
    ]
    if worker.sharing > 1:
        parts.append(f"one of {worker.sharing} workers on its {worker.capacity.device}")
    extras = [name for name, held in (("embedding", start == 0), ("head", end == weights.num_layers)) if held]
    if extras:
        parts.append("with the " + " and the ".join(extras))
    if is_slowest:
        parts.append("the slowest stage")
    wider = [(start, end + 1)] if end < weights.num_layers else []
    wider += [(start - 1, end)] if start > 0 else []
    if wider and all(weights.needed(*stage) > worker.capacity.memory_bytes for stage in wider):
        parts.append("its memory holds no further layer")
    return ", ".join(parts)


def _misfit(weights: _Weights, workers: Sequence[WorkerCapacity], usable: Sequence[_Worker]) -> str:
    """Why nothing fits and what would help: the message of the `PlacementError`."""
    costs, settings = weights.costs, weights.settings
    whole = weights.needed(0, costs.num_layers)
    devices = {(w.host_id, w.device): 0 for w in workers}
    for w in workers:
        key = (w.host_id, w.device)
        devices[key] = max(devices[key], w.memory_bytes, w.shared_memory_bytes)
    largest = max(workers, key=lambda w: w.memory_bytes)
    count = f"{len(workers)} workers" if len(workers) > 1 else "1 worker"
    have = f"the largest ({largest.worker_id}) offers {_gib(largest.memory_bytes)}"
    have += f", the {count} together {_gib(sum(devices.values()))}"
    return (
        f"{costs.name} needs {_gib(whole)} ({_gib(weights.held(0, costs.num_layers))} of weights, KV for "
        f"{settings.min_kv_tokens} tokens, and workspace) and a layer can't be divided; {have}. "
        f"Add a worker with at least {_gib(_enough(weights, usable))}, or use a smaller dtype, model or context"
    )


def _enough(weights: _Weights, usable: Sequence[_Worker]) -> int:
    """Memory of one more worker with which the model would fit: the first of a few sizes that is enough."""
    whole = weights.needed(0, weights.num_layers)
    fastest = WorkerCapacity(
        worker_id="", host_id="", device="", memory_bytes=whole, read_bandwidth=1e12, matrix_rate=1e15
    )
    for part in range(1, 8):
        memory = whole * part // 8
        if memory < weights.smallest_need:
            continue
        one_more = _Worker(
            order=-1,
            capacity=dataclasses.replace(fastest, memory_bytes=memory),
            atto_per_byte=1,
            atto_link=0,
            sharing=1,
            device_limit=memory,
            tracked=-1,
        )
        if _best(weights, [*usable, one_more]) is not None:
            return memory
    return whole


def _gib(num_bytes: int) -> str:
    """Rounded up, so that what a message asks for is enough."""
    return f"{math.ceil(num_bytes / _GIB * 100) / 100:.2f} GiB"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.0f} MiB"
