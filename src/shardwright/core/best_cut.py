"""Finds the placement that computes a workload soonest, by the model of `prediction.py`: workers, order and cut.

The planner (`placement.py`) uses all workers and knows no links. This search may leave workers out and knows what each
link takes, so it tells what a placement by hand would gain.

For a set of workers and a number of steps in flight, all that counts adds up along the pipeline or is a maximum over
it: the prompt's trip, a decode step's trip, the busiest stage or link. The search goes from the first layer on. It
drops a beginning that can't end better than what is known, with the layers that are left on the best of the workers,
and one that is in no part better than another with the same workers, last worker and layers. Steps are thought to be
of equal size. So it is exact but for `_TOLERANCE`, unless it is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from shardwright.core.placement_costs import StageWeights
from shardwright.core.prediction import (
    MASTER,
    Cluster,
    Cut,
    StageOn,
    Workload,
    decode_load,
    link_seconds,
    predict,
    prompt_loads,
    stage_seconds,
)
from shardwright.types import WorkerCapacity, WorkerId

MOST_WORKERS = 8
"""With more workers than these nothing is searched."""

_TOLERANCE = 0.005
"""What is not better by this part is not looked at: measurements are not that good."""

_MOST_STATES = 100_000
"""So many beginnings are looked at, a second or two; with more the search is given up and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestCut:
    """The best placement that was found."""

    cut: Cut
    workload_s: float
    is_exact: bool  # False: the search was given up before all were looked at


def best_cut(
    cluster: Cluster,
    capacities: Sequence[WorkerCapacity],
    workload: Workload,
    *,
    known: Sequence[Cut] = (),
    use_all: bool = False,
) -> BestCut | None:
    """The best of all sets, orders and cuts that fit in memory and whose links are known; None if none is.

    `known` are placements that are possible; nothing that is no better than them is looked at. `use_all`: only those
    with every worker.
    """
    best: BestCut | None = None
    for cut in known:
        best = _better(best, cluster, cut, workload)
    usable = [capacity for capacity in capacities if capacity.worker_id in cluster.workers]
    if len(usable) > MOST_WORKERS:
        return best
    search = _Search(cluster, workload, limit_s=best.workload_s if best is not None else float("inf"))
    most = min(len(usable), cluster.costs.num_layers)
    for count in range(len(usable) if use_all else 1, most + 1):
        for chosen in combinations(usable, count):
            for num_steps in _step_counts(cluster, workload):
                search.run(chosen, num_steps)
    if search.best is not None:
        best = _better(best, cluster, search.best, workload)
    return None if best is None else replace(best, is_exact=not search.is_given_up)


def _better(best: BestCut | None, cluster: Cluster, cut: Cut, workload: Workload) -> BestCut:
    seconds = predict(cluster, cut, workload).workload_s
    if best is not None and best.workload_s <= seconds:
        return best
    return BestCut(cut=cut, workload_s=seconds, is_exact=False)


def _step_counts(cluster: Cluster, workload: Workload) -> list[int]:
    """Numbers of steps in flight that share the sequences out evenly."""
    count = workload.num_sequences
    if cluster.steps_in_flight is not None:
        return [min(cluster.steps_in_flight, count)]
    return [number for number in range(1, count + 1) if count % number == 0]


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a part of a pipeline amounts to."""

    prompt_s: float = 0.0  # all chunks of one prompt
    trip_s: float = 0.0  # of one decode step
    busiest_s: float = 0.0  # stage or link, of one decode step

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.prompt_s + other.prompt_s, self.trip_s + other.trip_s, max(self.busiest_s, other.busiest_s))

    def covers(self, other: _Sums) -> bool:
        """Whether it is in no part worse."""
        return self.prompt_s <= other.prompt_s and self.trip_s <= other.trip_s and self.busiest_s <= other.busiest_s


class _Search:
    """Looks at one set of workers and one number of steps after the other, and keeps the best of all."""

    def __init__(self, cluster: Cluster, workload: Workload, *, limit_s: float) -> None:
        self.best: Cut | None = None
        self.is_given_up = False
        self._limit_s = limit_s
        self._cluster = cluster
        self._workload = workload
        self._weights = StageWeights(cluster.costs, cluster.placement)
        self._num_layers = cluster.costs.num_layers
        self._chunks = prompt_loads(cluster, workload.prompt_tokens)
        self._states_left = _MOST_STATES

    def run(self, chosen: Sequence[WorkerCapacity], num_steps: int) -> None:
        """Look at all orders and cuts of these workers, each of which gets a layer at least."""
        self._chosen = chosen
        self._num_steps = num_steps
        self._load = decode_load(-(-self._workload.num_sequences // num_steps), context=self._workload.context)
        speeds = [self._cluster.workers[capacity.worker_id] for capacity in chosen]
        self._slowdowns = [
            1 + speed.slowdown * (min(num_steps, sum(other.place == speed.place for other in speeds)) - 1)
            for speed in speeds
        ]
        self._limits: dict[tuple[str, str], int] = {}
        for capacity in chosen:
            key = (capacity.host_id, capacity.device)
            most = max(capacity.shared_memory_bytes, capacity.memory_bytes)
            self._limits[key] = max(self._limits.get(key, 0), most)
        self._stages: dict[tuple[int, int, int], _Sums] = {}
        self._links: dict[tuple[WorkerId, WorkerId], _Sums | None] = {}
        self._seen: dict[tuple[int, frozenset[int], int], list[_Sums]] = {}
        self._path: list[tuple[int, int]] = []  # (worker, end)
        self._rests = self._least_rests()
        self._is_tight = any(self._may_run_out(capacity) for capacity in chosen)
        self._extend(0, frozenset(), -1, _Sums())

    def _value(self, sums: _Sums) -> float:
        """Seconds of the workload, as `Figures.workload_s` counts them."""
        cycle_s = max(sums.trip_s, self._num_steps * sums.busiest_s)
        return self._workload.num_sequences * sums.prompt_s + self._workload.new_tokens * cycle_s

    def _extend(self, start: int, used: frozenset[int], last: int, sums: _Sums) -> None:
        if self.is_given_up:
            return
        self._states_left -= 1
        if self._states_left < 0:
            self.is_given_up = True
            return
        if start == self._num_layers:
            self._end(last, sums)
            return
        left = [index for index in range(len(self._chosen)) if index not in used]
        sender = self._chosen[last].worker_id if last >= 0 else MASTER
        for index in left:
            link = self._link(sender, self._chosen[index].worker_id)
            if link is None:
                continue
            stages_after = len(left) - 1
            first_end = start + 1 if stages_after else self._num_layers
            for end in range(first_end, self._num_layers - stages_after + 1):
                if not self._fits(index, start, end):
                    break  # more layers never need less
                reached = sums + link + self._stage(index, start, end)
                if self._is_hopeless(reached, end, stages_after, index, used | {index}):
                    continue
                self._path.append((index, end))
                self._extend(end, used | {index}, index, reached)
                self._path.pop()

    def _end(self, last: int, sums: _Sums) -> None:
        back = self._link(self._chosen[last].worker_id, MASTER)
        if back is None:
            return
        value = self._value(sums + back)
        if value >= self._limit_s:
            return
        self._limit_s = value
        ends = [0, *(end for _, end in self._path)]
        self.best = tuple(
            StageOn(worker_id=self._chosen[index].worker_id, start=start, end=end)
            for (index, _), (start, end) in zip(self._path, pairwise(ends), strict=True)
        )

    def _is_hopeless(self, sums: _Sums, end: int, stages_after: int, last: int, used: frozenset[int]) -> bool:
        """Whether nothing that begins so can be better than what is known, or than another beginning."""
        least = sums + self._rests[end]
        if stages_after:  # the longest of the stages to come takes at least their mean
            least += _Sums(busiest_s=self._rests[end].trip_s / stages_after)
        if self._value(least) >= self._limit_s * (1 - _TOLERANCE):
            return True
        if self._is_tight:
            return False  # what is held decides too, and it is no part of the state
        seen = self._seen.setdefault((end, used, last), [])
        if any(other.covers(sums) for other in seen):
            return True
        seen.append(sums)
        return False

    def _least_rests(self) -> list[_Sums]:
        """By first layer: less than this the layers from it on and the head can't take, whoever has them."""
        speeds = [self._cluster.workers[capacity.worker_id] for capacity in self._chosen]
        best = replace(
            speeds[0],
            read_bandwidth=max(speed.read_bandwidth for speed in speeds),
            matrix_rate=max(speed.matrix_rate for speed in speeds),
            prompt_rate=max(speed.prompt_rate or speed.matrix_rate for speed in speeds),
            layer_overheads=(),
            head_overheads=(),
            hand_over_s=0.0,
        )
        rests = []
        for start in range(self._num_layers):
            rest = StageOn(worker_id=best.worker_id, start=start, end=self._num_layers)
            prompt_s = sum(stage_seconds(self._weights, best, rest, load=load).compute_s for load in self._chunks)
            trip_s = stage_seconds(self._weights, best, rest, load=self._load).compute_s
            layers = self._num_layers - start
            prompt_s += layers * min(sum(speed.layer_s(load) for load in self._chunks) for speed in speeds)
            trip_s += layers * min(speed.layer_s(self._load) for speed in speeds)
            rests.append(_Sums(prompt_s, trip_s))
        return [*rests, _Sums()]

    def _stage(self, index: int, start: int, end: int) -> _Sums:
        found = self._stages.get((index, start, end))
        if found is None:
            worker = self._cluster.workers[self._chosen[index].worker_id]
            slowdown = self._slowdowns[index]
            stage = StageOn(worker_id=worker.worker_id, start=start, end=end)
            decode = stage_seconds(self._weights, worker, stage, load=self._load, slowdown=slowdown)
            prompts = [stage_seconds(self._weights, worker, stage, load=load) for load in self._chunks]
            prompt_s = sum(prompt.compute_s + prompt.hand_over_s for prompt in prompts)
            found = _Sums(prompt_s, decode.compute_s + decode.hand_over_s, decode.compute_s)
            self._stages[index, start, end] = found
        return found

    def _link(self, sender: WorkerId, receiver: WorkerId) -> _Sums | None:
        if (sender, receiver) not in self._links:
            found = None
            if self._cluster.link(sender, receiver) is not None:
                decode = link_seconds(self._cluster, sender, receiver, load=self._load)
                prompts = [link_seconds(self._cluster, sender, receiver, load=load) for load in self._chunks]
                busiest_s = decode.transfer_s if receiver != MASTER else 0.0
                found = _Sums(sum(link.seconds for link in prompts), decode.seconds, busiest_s)
            self._links[sender, receiver] = found
        return self._links[sender, receiver]

    def _may_run_out(self, capacity: WorkerCapacity) -> bool:
        """Whether the memory under this worker may be too little for all that share it."""
        key = (capacity.host_id, capacity.device)
        sharing = sum((other.host_id, other.device) == key for other in self._chosen)
        costs = self._weights.costs
        whole = self._weights.needed(0, self._num_layers) + (costs.embedding_bytes if costs.tied_embedding else 0)
        return sharing > 1 and whole + (sharing - 1) * self._weights.settings.workspace_bytes > self._limits[key]

    def _fits(self, index: int, start: int, end: int) -> bool:
        """Whether the stage fits beside those of its device that the path has already."""
        capacity = self._chosen[index]
        need = self._weights.needed(start, end)
        if need > capacity.memory_bytes:
            return False
        key = (capacity.host_id, capacity.device)
        before = [0, *(each for _, each in self._path)]
        for (other, _), (first, behind) in zip(self._path, pairwise(before), strict=True):
            holder = self._chosen[other]
            if (holder.host_id, holder.device) == key:
                need += self._weights.needed(first, behind)
        return need <= self._limits[key]
