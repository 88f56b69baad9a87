"""Says in sentences what bounds a pipeline, and which changes would help most, by the model of `prediction.py`.

Nothing here measures and nothing is guessed: a change is only told where everything that its prediction needs was
measured, and only when it promises more than `LEAST_GAIN`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from shardwright.core.best_cut import best_cut
from shardwright.core.placement import Placement, place
from shardwright.core.placement_costs import StageWeights
from shardwright.core.prediction import (
    MASTER,
    Cluster,
    Cut,
    Figures,
    LinkSpeed,
    Part,
    PartKind,
    StageOn,
    StepPrediction,
    WorkerSpeed,
    Workload,
    predict,
)
from shardwright.errors import PlacementError
from shardwright.types import ModelCosts, WorkerCapacity, WorkerId

LEAST_GAIN = 0.05
"""A change has to promise so much more: times are not measured better than a few percent."""

MOST_CHANGES = 3

_LARGE_LINK = 0.25
"""A link that takes this part of a step has a sentence of its own."""


_MOST_OF = 0.8
"""Who has this part of something is named alone."""


# --- what bounds -------------------------------------------------------------------------------------

_WORDS = {
    PartKind.MEMORY: "reading weights",
    PartKind.MATRIX: "arithmetic",
    PartKind.OVERHEAD: "work of each layer that is neither reading nor arithmetic (Python, starting kernels, waking "
    "threads)",
    PartKind.HEAD: "the output head and sampling",
    PartKind.OFFLOAD: "waiting for weights that are not kept in memory",
    PartKind.HAND_OVER: "handing steps over between links and compute threads",
    PartKind.LINK: "links",
    PartKind.COMPUTE: "computing",
    PartKind.QUEUE: "waiting behind other steps",
    PartKind.SERIALISE: "turning tensors into bytes and back",
    PartKind.SEND: "getting rid of results",
}


def prediction_sentences(what: str, step: StepPrediction) -> list[str]:
    """What bounds steps of this kind, as predicted; `what` names them, as "Decode of 8 sequences"."""
    busiest = step.busiest
    if busiest is None:
        return bound_sentences(what, step.parts)
    stage = [part for part in step.parts if part.worker_id == busiest.worker_id and part.kind in _OF_COMPUTE]
    largest = max(stage, key=lambda part: part.seconds)
    share = largest.seconds / sum(part.seconds for part in stage)
    name, count = worker_name(busiest.worker_id), step.steps_in_flight
    sentence = f"{what} is bound by {name}, which computes all the time while {count} steps are in flight: "
    return [f"{sentence}{share:.0%} of it goes into {_WORDS[largest.kind]}."]


_OF_COMPUTE = (PartKind.MEMORY, PartKind.MATRIX, PartKind.OVERHEAD, PartKind.HEAD, PartKind.OFFLOAD)


def bound_sentences(what: str, parts: Sequence[Part]) -> list[str]:
    """The kind of part that takes most of a step, with who has it, and each link that takes much of it."""
    total = sum(part.seconds for part in parts)
    if not total:
        return []
    by_kind = dict.fromkeys((part.kind for part in parts), 0.0)
    for part in parts:
        by_kind[part.kind] += part.seconds
    kind, seconds = max(by_kind.items(), key=lambda item: item[1])
    holders = sorted((part for part in parts if part.kind is kind), key=lambda part: -part.seconds)
    largest = holders[0]
    share = f"{seconds / total:.0%} of a step"
    links = [part for part in parts if part.kind is PartKind.LINK]
    large = [part for part in links if part.seconds >= _LARGE_LINK * total]
    if kind is PartKind.LINK:
        sentences = [f"{what} is bound by {_WORDS[kind]} ({share})."]
        large = large or [largest]
    elif largest.seconds >= _MOST_OF * seconds:
        sentences = [f"{what} is bound by {_WORDS[kind]} on {worker_name(largest.worker_id)} ({share})."]
    else:
        each = ", ".join(f"{worker_name(part.worker_id)} {part.seconds / total:.0%}" for part in holders)
        sentences = [f"{what} is bound by {_WORDS[kind]} ({share}: {each})."]
    for link in large:
        name = link_name(link.sender, link.worker_id)
        sentences.append(f"The link {name} takes {milliseconds(link.seconds)} of a {milliseconds(total)} step.")
    return sentences


def link_name(sender: WorkerId, receiver: WorkerId) -> str:
    """As "from a to b"."""
    if sender == MASTER:
        return f"to {worker_name(receiver)}"
    return f"from {worker_name(sender)} to {worker_name(receiver)}"


def worker_name(worker_id: WorkerId) -> str:
    """A worker in a sentence."""
    return "the master" if worker_id == MASTER else f"worker {worker_id}"


def milliseconds(seconds: float) -> str:
    """Two digits at least, as "0.31 ms", "4.2 ms" or "140 ms"."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


# --- what would help ---------------------------------------------------------------------------------


class ChangeKind(enum.Enum):
    """What is changed."""

    LEAVE_OUT = "leave out"
    ORDER = "order"
    CUT = "cut"
    REQUESTS = "requests"
    STEPS = "steps in flight"
    LINK = "link"
    DTYPE = "dtype"
    THREADS = "threads"
    MEMORY = "memory"
    ADD = "add"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something to do, and what it would give."""

    kind: ChangeKind
    workers: tuple[WorkerId, ...]  # that it is about
    sentence: str  # what to do
    gain: float  # of the workload's new tokens a second: 0.18 is 18 % more
    figures: Figures
    cut: Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What else was measured, for the changes that need it."""

    bfloat16: tuple[ModelCosts, Mapping[WorkerId, WorkerSpeed]] | None = None  # where another dtype is used now
    more_threads: Mapping[WorkerId, tuple[int, WorkerSpeed]] = field(default_factory=dict)
    most_requests: int = 64  # that may run at once
    kv_tokens: int = 65536  # positions that fit


def cut_of(placement: Placement) -> Cut:
    """A placement as the prediction takes it."""
    return tuple(
        StageOn(
            worker_id=stage.worker_id,
            start=stage.layers.start,
            end=stage.layers.end,
            offloaded_bytes=stage.offloaded_bytes,
        )
        for stage in placement.stages
    )


def cut_words(cut: Cut) -> str:
    """As "a 0-11, b 12-29"."""
    return ", ".join(f"{stage.worker_id} {stage.start}-{stage.end - 1}" for stage in cut)


def all_changes(
    cluster: Cluster,
    capacities: Sequence[WorkerCapacity],
    cut: Cut,
    workload: Workload,
    alternatives: Alternatives | None = None,
) -> tuple[Change, ...]:
    """Every change that promises more than `LEAST_GAIN`, the best first.

    `capacities` are what the planner is told; `cut` is the present placement.
    """
    now = predict(cluster, cut, workload)
    search = _Changes(cluster, capacities, cut, workload, now)
    found = [
        *search.fewer_or_otherwise(),
        *search.links(),
        *search.steps(),
        *search.requests(alternatives or Alternatives()),
        *search.dtype(alternatives or Alternatives()),
        *search.threads(alternatives or Alternatives()),
        *search.memory(),
        *search.one_more(),
    ]
    worth = [change for change in found if change.gain >= LEAST_GAIN]
    return tuple(sorted(worth, key=lambda change: -change.gain))


def best_changes(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The first few, no two of which are the same change with other words."""
    chosen: list[Change] = []
    for change in changes:
        same = [each for each in chosen if each.cut == change.cut and each.figures == change.figures]
        if not same and len(chosen) < MOST_CHANGES:
            chosen.append(change)
    return tuple(chosen)


class _Changes:
    """The candidates, each computed anew with the same model."""

    def __init__(
        self,
        cluster: Cluster,
        capacities: Sequence[WorkerCapacity],
        cut: Cut,
        workload: Workload,
        now: Figures,
    ) -> None:
        self._cluster = cluster
        self._capacities = [each for each in capacities if each.worker_id in cluster.workers]
        self._cut = cut
        self._workload = workload
        self._now = now

    def _change(
        self,
        kind: ChangeKind,
        sentence: str,
        cut: Cut,
        *,
        workers: Sequence[WorkerId] = (),
        cluster: Cluster | None = None,
        workload: Workload | None = None,
    ) -> Change:
        figures = predict(cluster or self._cluster, cut, workload or self._workload)
        gain = figures.new_tokens_per_s / self._now.new_tokens_per_s - 1
        return Change(kind=kind, workers=tuple(workers), sentence=sentence, gain=gain, figures=figures, cut=cut)

    def _planned(self, capacities: Sequence[WorkerCapacity], cluster: Cluster) -> Cut | None:
        """What the planner would do with these workers; None when the model fits nowhere, or a link is not known."""
        try:
            cut = cut_of(place(cluster.costs, capacities, cluster.placement))
        except PlacementError:
            return None
        ends = [MASTER, *(stage.worker_id for stage in cut), MASTER]
        known = all(cluster.link(sender, receiver) for sender, receiver in pairwise(ends))
        return cut if known else None

    def fewer_or_otherwise(self) -> Iterator[Change]:
        """Without one worker, as the planner would place the rest; and the best of all sets, orders and cuts."""
        used = {stage.worker_id for stage in self._cut}
        without: list[Change] = []
        for capacity in self._capacities:
            rest = [each for each in self._capacities if each is not capacity]
            if capacity.worker_id not in used or not rest:
                continue
            cut = self._planned(rest, self._cluster)
            if cut is not None:
                without.append(self._without(cut))
        yield from sorted(without, key=lambda change: -change.gain)[:1]
        known = [self._cut, *(change.cut for change in without)]
        found = best_cut(self._cluster, self._capacities, self._workload, known=known)
        if found is None or found.cut in known:
            return
        order = tuple(stage.worker_id for stage in found.cut)
        instead = f"{cut_words(found.cut)} instead of {cut_words(self._cut)}"
        if used - set(order):
            yield self._without(found.cut)
        elif order == tuple(stage.worker_id for stage in self._cut):
            yield self._change(ChangeKind.CUT, f"cut the layers otherwise: {instead}", found.cut, workers=order)
        else:
            yield self._change(
                ChangeKind.ORDER, f"put the workers in another order: {instead}", found.cut, workers=order
            )

    def _without(self, cut: Cut) -> Change:
        """A placement that lacks some of the present one's workers."""
        kept = {stage.worker_id for stage in cut}
        lacking = [stage.worker_id for stage in self._cut if stage.worker_id not in kept]
        words = f"leave out {_and([worker_name(each) for each in lacking])}: {cut_words(cut)}"
        return self._change(ChangeKind.LEAVE_OUT, words, cut, workers=lacking)

    def links(self) -> Iterator[Change]:
        """Each link of the pipeline as fast as the fastest that was measured."""
        links = [link for link in self._cluster.links.values() if link.transfers]
        if len(links) < 2:
            return
        size = max(prompt.num_bytes for chunk in self._now.prompt.chunks for prompt in chunk.links)
        fastest = min(links, key=lambda link: link.seconds(size) + link.latency_s * self._workload.new_tokens)
        ends = [MASTER, *(stage.worker_id for stage in self._cut)]
        for sender, receiver in pairwise(ends):
            if self._cluster.link(sender, receiver) is fastest:
                continue
            faster = {**self._cluster.links, (sender, receiver): fastest, (receiver, sender): fastest}
            words = f"make the link {link_name(sender, receiver)} as fast as the fastest here ({link_words(fastest)})"
            cluster = replace(self._cluster, links=faster)
            yield self._change(ChangeKind.LINK, words, self._cut, workers=(sender, receiver), cluster=cluster)

    def steps(self) -> Iterator[Change]:
        """The number of steps in flight left to the scheduler, where it is fixed."""
        fixed = self._cluster.steps_in_flight
        if fixed is None:
            return
        cluster = replace(self._cluster, steps_in_flight=None)
        change = self._change(ChangeKind.STEPS, "", self._cut, cluster=cluster)
        chosen = change.figures.many.steps_in_flight
        count = "1 step" if chosen == 1 else f"{chosen} steps"
        words = f"have {count} in flight instead of {fixed}: --steps-in-flight 0 lets the scheduler choose"
        yield replace(change, sentence=words)

    def requests(self, alternatives: Alternatives) -> Iterator[Change]:
        """Twice as many requests at once, where there is room."""
        count = 2 * self._workload.num_sequences
        tokens = count * (self._workload.prompt_tokens + self._workload.new_tokens)
        if count > alternatives.most_requests or tokens > alternatives.kv_tokens:
            return
        workload = replace(self._workload, num_sequences=count)
        words = f"answer {count} requests at once instead of {self._workload.num_sequences}"
        yield self._change(ChangeKind.REQUESTS, words, self._cut, workload=workload)

    def dtype(self, alternatives: Alternatives) -> Iterator[Change]:
        """Everything in bfloat16, where it is not and the workers were measured with it."""
        if alternatives.bfloat16 is None:
            return
        costs, workers = alternatives.bfloat16
        cluster = replace(self._cluster, costs=costs, workers={**self._cluster.workers, **workers})
        words = "compute in bfloat16 (--dtype bfloat16): half the bytes to read and to send; its tokens may differ"
        yield self._change(ChangeKind.DTYPE, words, self._cut, cluster=cluster)

    def threads(self, alternatives: Alternatives) -> Iterator[Change]:
        """More threads for a worker whose speed with them was measured."""
        for worker_id, (count, speed) in alternatives.more_threads.items():
            if worker_id not in {stage.worker_id for stage in self._cut}:
                continue
            cluster = replace(self._cluster, workers={**self._cluster.workers, worker_id: speed})
            words = f"give {worker_name(worker_id)} {count} threads (shardwright worker --threads {count})"
            yield self._change(ChangeKind.THREADS, words, self._cut, workers=(worker_id,), cluster=cluster)

    def memory(self) -> Iterator[Change]:
        """Memory for all that is offloaded now."""
        short = [stage for stage in self._cut if stage.offloaded_bytes]
        if not short:
            return
        weights = StageWeights(self._cluster.costs, self._cluster.placement)
        each = [
            f"{worker_name(stage.worker_id)} {weights.needed(stage.start, stage.end) / 2**30:.1f} GiB"
            for stage in short
        ]
        words = f"give {_and(each)} of memory for its stage, so that no weights have to come anew for each step"
        cut = tuple(replace(stage, offloaded_bytes=0) for stage in self._cut)
        yield self._change(ChangeKind.MEMORY, words, cut, workers=[stage.worker_id for stage in short])

    def one_more(self) -> Iterator[Change]:
        """One more machine like that of the fastest worker, on links like that worker's own."""
        known = {each.worker_id: each for each in self._capacities}
        used = [stage.worker_id for stage in self._cut]
        fastest = max(used, key=lambda worker_id: self._cluster.workers[worker_id].read_bandwidth)
        if fastest not in known or len(self._capacities) >= self._cluster.costs.num_layers:
            return
        name = f"one more like {fastest}"
        capacity = replace(known[fastest], worker_id=name, host_id=name)
        speed = replace(self._cluster.workers[fastest], worker_id=name, host_id=name, slowdown=0.0)
        links: dict[tuple[WorkerId, WorkerId], LinkSpeed] = dict(self._cluster.links)
        for (sender, receiver), link in self._cluster.links.items():
            if fastest in (sender, receiver):
                ends = (name if sender == fastest else sender, name if receiver == fastest else receiver)
                links[ends] = link
                other = receiver if sender == fastest else sender
                if other != MASTER:  # from the fastest itself to its like, as to its slowest neighbour
                    slowest = links.get((fastest, name))
                    if slowest is None or link.seconds(1 << 16) > slowest.seconds(1 << 16):
                        links[fastest, name] = link
        cluster = replace(self._cluster, workers={**self._cluster.workers, name: speed}, links=links)
        cut = self._planned([*self._capacities, capacity], cluster)
        if cut is None:
            return
        words = f"add a worker on another machine as fast as {worker_name(fastest)}: {cut_words(cut)}"
        yield self._change(ChangeKind.ADD, words, cut, workers=(fastest,), cluster=cluster)


def link_words(link: LinkSpeed) -> str:
    """As "0.31 ms one way, 112 MB/s"."""
    rate = link.bytes_per_s
    return f"{milliseconds(link.latency_s)} one way" + ("" if rate is None else f", {rate / 1e6:.0f} MB/s")


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
