"""Predicts what a placement gives, from what its workers and links measured: seconds by part, tokens a second.

A step of n tokens of b sequences takes a stage with the layers [s, e)

    layers   max( W / bandwidth + K / bandwidth,  2 (W / element) n' / rate )  +  (e - s) o(b)
    head     the same of the head's weights for the rows that are sampled, + h(b); on the last stage

    offload  what of  O / way  these don't cover

W are the layers' bytes, K the bytes of the K and V that decodes attend to, n' the tokens with what attention adds to
them (`step_budget.ContextCost`). The rate of a prompt is the one that this model's own products reach, if that was
measured. It is the roofline model (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009),
the same function that the planner costs stages with (`placement_costs.seconds_per_byte`), plus what is neither reading
nor arithmetic: o(b) is measured for a layer and a step of b sequences (Python, starting kernels, waking threads), h(b)
for the head (sampling among it). Where they were not measured they are 0, and the prediction is a bound from above.
O are the bytes of layers that are not kept in memory; each step they come anew, over a way that stages which compute at
the same time share, while other layers are computed.

A step's trip and how many of them go on at once are the scheduler's own model (`step_times.cycle_s`): with m steps in
flight of b = B / m sequences each, l the links,

    tokens/s = B / max( sum over stages of (t(b) + l),  m max t(b),  m times the longest transfer )

and m is what `step_times.choose_steps_in_flight` would choose with these times. A link takes one way its latency (half
the round trip of a small message) and the transfer of the message's bytes; the hand-over at a stage (from the link to
the compute thread and back) counts as the link's. Workers of one device that compute at the same time slow each other
down by a measured factor.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from shardwright.core.placement_costs import PlacementSettings, StageWeights, seconds_per_byte
from shardwright.core.step_budget import ContextCost, PromptBudget
from shardwright.core.step_times import Mix, StepShape, choose_steps_in_flight, cycle_s, split
from shardwright.types import LinkMeasures, ModelCosts, StageAssignment, WorkerId

MASTER: WorkerId = ""
"""The master as an end of a link."""

_STEP_BYTES = 96
"""Of a step's message beside its activation, and of an answer: epoch, numbers, what frames them."""

_SLICE_BYTES = 40
"""Of one sequence's slice in it, blocks included, or of one token in an answer."""

_TOKEN_BYTES = 2
"""Of a token's id in a slice."""


# --- what was measured -------------------------------------------------------------------------------


def between(points: Sequence[tuple[float, float]], size: float) -> float:
    """The value at `size` on the lines through points sorted by size; beyond them on the last line, below as the first.

    No point: 0.
    """
    if not points:
        return 0.0
    sizes = [x for x, _ in points]
    right = bisect_left(sizes, size)
    if right == 0:
        return points[0][1]
    if right == len(points):
        if len(points) == 1:
            return points[0][1]
        right -= 1
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """A way from one process to another."""

    latency_s: float  # one way, of a message of a few bytes
    transfers: tuple[tuple[float, float], ...] = ()
    """(bytes, seconds that they add to the latency), rising from (0, 0)."""

    @classmethod
    def measured(cls, measures: LinkMeasures) -> LinkSpeed:
        """From round trips: of each, one small message's way back is the latency, half a small round trip.

        Noise that makes a larger transfer quicker than a smaller one is smoothed out.
        """
        points = [(0.0, 0.0)]
        for size, seconds in sorted(measures.transfers):
            added = max(seconds - measures.round_trip_s, points[-1][1])
            if size > points[-1][0]:
                points.append((float(size), added))
        return cls(latency_s=measures.round_trip_s / 2, transfers=tuple(points))

    def transfer_s(self, num_bytes: float) -> float:
        """What so many bytes add to the latency: on the lines through the measured sizes."""
        return between(self.transfers, num_bytes) if len(self.transfers) > 1 else 0.0

    def seconds(self, num_bytes: float) -> float:
        """One way, all of the message."""
        return self.latency_s + self.transfer_s(num_bytes)

    @property
    def bytes_per_s(self) -> float | None:
        """Least squares through the transfers, each as important as the others; None where they take no time.

        With x bytes and y seconds, sum((y - x/v)^2 / y^2) is least for v = sum((x/y)^2) / sum(x/y).
        """
        rates = [size / seconds for size, seconds in self.transfers if seconds > 0]
        return sum(rate * rate for rate in rates) / sum(rates) if rates else None


Links: TypeAlias = Mapping[tuple[WorkerId, WorkerId], LinkSpeed]
"""By (sender, receiver); `MASTER` is one of them at either end. A way back that is absent is as the way there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpeed:
    """What one worker measured of itself, and its device's other workers of it."""

    worker_id: WorkerId
    host_id: str
    device: str
    read_bandwidth: float  # bytes/s
    matrix_rate: float  # operations/s of large products
    prompt_rate: float | None = None  # operations/s that this model's prompts reach; None: as large products
    layer_overheads: tuple[tuple[float, float], ...] = ()  # (sequences of a step, seconds of a layer beside the above)
    head_overheads: tuple[tuple[float, float], ...] = ()  # the same of the head, sampling included; may be below 0
    hand_over_s: float = 0.0  # of a step: off the link, to the compute thread, back, onto the next link
    slowdown: float = 0.0  # part by which each further worker that computes on the device at once prolongs a step
    offload: str = ""  # where weights are kept that its memory can't hold: one of `types.OFFLOADS`; empty: nowhere
    offload_bandwidth: float = 0.0  # bytes/s that they come from there with

    @property
    def way(self) -> tuple[str, str]:
        """What offloaded weights come through: equal for workers that share it, a host's disk or a device's bus."""
        return self.host_id, self.device if self.offload == "cpu" else ""

    @property
    def place(self) -> tuple[str, str]:
        """Equal for workers that share a device."""
        return self.host_id, self.device

    def rate(self, load: StepLoad) -> float:
        """Operations/s of such a step's layers."""
        is_prompt = load.num_tokens > load.num_sequences
        return self.prompt_rate or self.matrix_rate if is_prompt else self.matrix_rate

    def layer_s(self, load: StepLoad) -> float:
        """What a layer takes beside memory and arithmetic."""
        return max(between(self.layer_overheads, load.num_sequences), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOn:
    """A stage of a placement: who computes the layers from `start` to before `end`."""

    worker_id: WorkerId
    start: int
    end: int
    offloaded_bytes: int = 0  # of its layers: what comes anew for each step


Cut: TypeAlias = tuple[StageOn, ...]


def stage_on(assignment: StageAssignment, costs: ModelCosts) -> StageOn:
    """An assigned stage, as the prediction takes it."""
    return StageOn(
        worker_id=assignment.worker_id,
        start=assignment.layers.start,
        end=assignment.layers.end,
        offloaded_bytes=sum(costs.layer_bytes[layer] for layer in assignment.offloaded_layers),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A model and all that was measured of who might compute it."""

    costs: ModelCosts
    workers: Mapping[WorkerId, WorkerSpeed]
    links: Links
    token_budget: int = 512  # most tokens of a step
    steps_in_flight: int | None = None  # fixed by the user; None: chosen
    placement: PlacementSettings = field(default_factory=PlacementSettings)

    def link(self, sender: WorkerId, receiver: WorkerId) -> LinkSpeed | None:
        """The link one way; as the other way where only that was measured; None without either."""
        return self.links.get((sender, receiver)) or self.links.get((receiver, sender))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the cluster is asked: so many requests at once, each with a prompt and an answer of so many tokens."""

    num_sequences: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 128
    context: int = 128  # positions that a decode attends to, on average


# --- what is predicted -------------------------------------------------------------------------------


class PartKind(enum.Enum):
    """What a part of a step's time is spent on."""

    MEMORY = "memory"  # reading weights and KV
    MATRIX = "matrix"  # arithmetic
    OVERHEAD = "overhead"  # a layer's Python, kernel starts, waking threads
    HEAD = "head"  # the output head and sampling
    OFFLOAD = "offload"  # waiting for weights that are not kept in memory
    HAND_OVER = "hand-over"  # between a link and the compute thread
    LINK = "link"
    COMPUTE = "compute"  # measured as one
    QUEUE = "queue"
    SERIALISE = "serialise"
    SEND = "send"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a step's trip."""

    kind: PartKind
    worker_id: WorkerId  # of a link: who receives; empty for the master
    seconds: float
    sender: WorkerId = MASTER  # of a link


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """One stage's time for one step, by what it goes into; of memory and arithmetic only the one that is waited for."""

    worker_id: WorkerId
    start: int
    end: int
    memory_s: float
    matrix_s: float
    overhead_s: float
    head_s: float
    hand_over_s: float
    offload_s: float = 0.0  # that offloaded weights take longer than all the rest

    @property
    def compute_s(self) -> float:
        """Time of the compute thread."""
        return self.memory_s + self.matrix_s + self.overhead_s + self.head_s + self.offload_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPrediction:
    """One link's time for one step."""

    sender: WorkerId
    receiver: WorkerId
    num_bytes: int
    latency_s: float
    transfer_s: float

    @property
    def seconds(self) -> float:
        """One way."""
        return self.latency_s + self.transfer_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """Steps of one shape that follow each other."""

    num_sequences: int  # of all steps in flight together
    num_tokens: int  # the same
    steps_in_flight: int
    stages: tuple[StagePrediction, ...]  # of the largest of the steps
    links: tuple[LinkPrediction, ...]  # master to first stage, stage to stage, last stage to master
    cycle_s: float  # in which every step in flight is back once

    @property
    def trip_s(self) -> float:
        """One step's way through all stages and back."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        """All steps' tokens over the cycle."""
        return self.num_tokens / self.cycle_s

    @property
    def parts(self) -> tuple[Part, ...]:
        """The trip in its order, what takes no time left out."""
        found = []
        for link, stage in zip(self.links, (*self.stages, None), strict=True):
            sender, receiver = link.sender, link.receiver
            found.append(Part(kind=PartKind.LINK, worker_id=receiver, sender=sender, seconds=link.seconds))
            if stage is not None:
                found += [
                    Part(kind=kind, worker_id=stage.worker_id, seconds=seconds)
                    for kind, seconds in (
                        (PartKind.MEMORY, stage.memory_s),
                        (PartKind.MATRIX, stage.matrix_s),
                        (PartKind.OVERHEAD, stage.overhead_s),
                        (PartKind.HEAD, stage.head_s),
                        (PartKind.OFFLOAD, stage.offload_s),
                        (PartKind.HAND_OVER, stage.hand_over_s),
                    )
                ]
        return tuple(part for part in found if part.seconds > 0)

    @property
    def busiest(self) -> StagePrediction | None:
        """The stage that computes all the time, where one does: with so many steps in flight all wait for it."""
        stage = max(self.stages, key=lambda each: each.compute_s)
        return stage if self.steps_in_flight > 1 and self.cycle_s > 1.001 * self.trip_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPrediction:
    """One prompt alone in the pipeline, chunk by chunk."""

    chunks: tuple[StepPrediction, ...]

    @property
    def time_to_first_token_s(self) -> float:
        """From the request's arrival at the master."""
        return sum(chunk.trip_s for chunk in self.chunks)

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens over that time."""
        return sum(chunk.num_tokens for chunk in self.chunks) / self.time_to_first_token_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a placement gives for a workload."""

    one: StepPrediction  # decode of one sequence
    many: StepPrediction  # decode of the workload's sequences
    prompt: PromptPrediction
    workload: Workload

    @property
    def workload_s(self) -> float:
        """All requests' prompts one after the other, then all answers at once: a bound that compares placements."""
        prompts_s = self.workload.num_sequences * self.prompt.time_to_first_token_s
        return prompts_s + self.workload.num_sequences * self.workload.new_tokens / self.many.tokens_per_s

    @property
    def new_tokens_per_s(self) -> float:
        """The workload's new tokens over that time."""
        return self.workload.num_sequences * self.workload.new_tokens / self.workload_s


def predict(cluster: Cluster, cut: Cut, workload: Workload) -> Figures:
    """All figures of a placement. Every worker and link of `cut` must be known to the cluster."""
    return Figures(
        one=predict_decode(cluster, cut, num_sequences=1, context=workload.context),
        many=predict_decode(cluster, cut, num_sequences=workload.num_sequences, context=workload.context),
        prompt=predict_prompt(cluster, cut, num_tokens=workload.prompt_tokens),
        workload=workload,
    )


def predict_decode(
    cluster: Cluster, cut: Cut, *, num_sequences: int, context: int, steps_in_flight: int | None = None
) -> StepPrediction:
    """Decode of so many sequences, each attending to `context` positions.

    `steps_in_flight` overrides the cluster's; without either it is what the scheduler would choose.
    """
    mix = Mix(num_decodes=num_sequences)
    num_steps = steps_in_flight or cluster.steps_in_flight
    if num_steps is None:
        paces = _paces(cluster, cut, context, num_sequences=1)
        num_steps = choose_steps_in_flight(paces, mix, chunk_tokens=lambda _: 0.0)
    num_steps = min(num_steps, num_sequences)
    paces = _paces(cluster, cut, context, num_sequences=-(-num_sequences // num_steps))
    shapes = split(mix, num_steps=num_steps, chunk_tokens=0.0)
    seconds = cycle_s(paces, shapes)
    assert seconds is not None, "predicted times are never unknown"
    largest = max(shapes, key=lambda shape: shape.num_sequences)
    load = decode_load(largest.num_sequences, context=context)
    return _step(cluster, cut, load, num_steps=num_steps, total=num_sequences, cycle=seconds)


def predict_prompt(cluster: Cluster, cut: Cut, *, num_tokens: int) -> PromptPrediction:
    """A prompt's way to its first new token: chunk after chunk, each alone in the pipeline."""
    loads = prompt_loads(cluster, num_tokens)
    return PromptPrediction(chunks=tuple(_step(cluster, cut, load, total=load.num_tokens) for load in loads))


# --- one step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What one step brings."""

    num_sequences: int
    num_tokens: int
    num_sampled: int  # rows that the head computes
    effective: float  # tokens with what attention adds to them, where they are many of one sequence
    context: int = 0  # positions whose K and V each sequence reads


def decode_load(num_sequences: int, *, context: int) -> StepLoad:
    """One token of each sequence, which attends to `context` positions."""
    return StepLoad(
        num_sequences=num_sequences,
        num_tokens=num_sequences,
        num_sampled=num_sequences,
        effective=num_sequences,
        context=context,
    )


def prompt_loads(cluster: Cluster, num_tokens: int) -> tuple[StepLoad, ...]:
    """A prompt's chunks as the scheduler makes them while nothing decodes."""
    cost = ContextCost(cluster.costs.context_costs)
    whole = cost.effective(cluster.token_budget, prefix=0)
    loads: list[StepLoad] = []
    prefix = 0
    while prefix < num_tokens:
        budget = PromptBudget(cost, effective=whole, tokens=cluster.token_budget)
        count = budget.grant(prefix=prefix, wanted=num_tokens - prefix)
        effective = cost.effective(count, prefix=prefix)
        prefix += count
        is_last = int(prefix == num_tokens)
        loads.append(StepLoad(num_sequences=1, num_tokens=count, num_sampled=is_last, effective=effective))
    return tuple(loads)


def stage_seconds(
    weights: StageWeights,
    worker: WorkerSpeed,
    stage: StageOn,
    *,
    load: StepLoad,
    slowdown: float = 1.0,
    sharing: int = 1,
) -> StagePrediction:
    """One stage's time for one step; see the module's docstring.

    `slowdown` multiplies what the device computes; `sharing` stages read offloaded weights at the same time.
    """
    costs, start, end = weights.costs, stage.start, stage.end
    layers = weights.of_layers(start, end)
    kv = load.context * load.num_sequences * weights.kv_per_block(start, end) / weights.settings.block_size

    def byte_s(num_tokens: float, rate: float) -> float:
        return seconds_per_byte(
            read_bandwidth=worker.read_bandwidth,
            matrix_rate=rate,
            element_bytes=costs.element_bytes,
            num_tokens=num_tokens,
        )

    memory_s = (layers + kv) / worker.read_bandwidth
    layers_s = max(memory_s, layers * byte_s(load.effective, worker.rate(load)))
    is_memory = layers_s == memory_s
    head_s = 0.0
    if end == costs.num_layers and load.num_sampled:
        head_s = costs.head_bytes * byte_s(load.num_sampled, worker.matrix_rate) + between(
            worker.head_overheads, load.num_sampled
        )
        head_s = max(head_s, 0.0)  # what was measured may be less than the roofline: caches
    found = StagePrediction(
        worker_id=worker.worker_id,
        start=start,
        end=end,
        memory_s=layers_s * slowdown if is_memory else 0.0,
        matrix_s=0.0 if is_memory else layers_s * slowdown,
        overhead_s=(end - start) * worker.layer_s(load) * slowdown,
        head_s=head_s * slowdown,
        hand_over_s=worker.hand_over_s,
    )
    waited_s = max(offload_seconds(worker, stage, sharing=sharing) - found.compute_s, 0.0)
    return replace(found, offload_s=waited_s)


def offload_seconds(worker: WorkerSpeed, stage: StageOn, *, sharing: int = 1) -> float:
    """What a stage's offloaded weights take to come, for one step; 0 without any."""
    if not stage.offloaded_bytes:
        return 0.0
    assert worker.offload_bandwidth > 0, "the planner offloads only where that was measured"
    return stage.offloaded_bytes * sharing / worker.offload_bandwidth


def message_bytes(costs: ModelCosts, *, num_sequences: int, num_tokens: int) -> int:
    """Of a step between two stages: its activation, and what names it."""
    return _STEP_BYTES + _SLICE_BYTES * num_sequences + (_TOKEN_BYTES + costs.activation_bytes_per_token) * num_tokens


def link_seconds(cluster: Cluster, sender: WorkerId, receiver: WorkerId, *, load: StepLoad) -> LinkPrediction:
    """One link's time for one step. The link must be known to the cluster."""
    link = cluster.link(sender, receiver)
    assert link is not None, f"the link from {sender or 'the master'} to {receiver or 'the master'} is unknown"
    if MASTER not in {sender, receiver}:
        num_bytes = message_bytes(cluster.costs, num_sequences=load.num_sequences, num_tokens=load.num_tokens)
    else:
        num_bytes = _STEP_BYTES + _SLICE_BYTES * load.num_sequences
        num_bytes += _TOKEN_BYTES * load.num_tokens if sender == MASTER else 0
    return LinkPrediction(
        sender=sender,
        receiver=receiver,
        num_bytes=num_bytes,
        latency_s=link.latency_s,
        transfer_s=link.transfer_s(num_bytes),
    )


def slowdown_of(cluster: Cluster, cut: Cut, worker_id: WorkerId, num_steps: int) -> float:
    """How much longer its steps take for those that compute on its device at the same time."""
    worker = cluster.workers[worker_id]
    sharing = sum(cluster.workers[stage.worker_id].place == worker.place for stage in cut)
    return 1 + worker.slowdown * (min(num_steps, sharing) - 1)


def _stage(
    cluster: Cluster, weights: StageWeights, cut: Cut, index: int, *, load: StepLoad, num_steps: int
) -> StagePrediction:
    stage = cut[index]
    slowdown = slowdown_of(cluster, cut, stage.worker_id, num_steps)
    worker = cluster.workers[stage.worker_id]
    on_way = sum(each.offloaded_bytes > 0 and cluster.workers[each.worker_id].way == worker.way for each in cut)
    return stage_seconds(weights, worker, stage, load=load, slowdown=slowdown, sharing=max(min(num_steps, on_way), 1))


def _ends(cut: Cut, index: int) -> tuple[WorkerId, WorkerId]:
    """Of the link into the stage of that index; behind the last stage of that to the master."""
    sender = cut[index - 1].worker_id if index else MASTER
    return sender, cut[index].worker_id if index < len(cut) else MASTER


def _step(
    cluster: Cluster, cut: Cut, load: StepLoad, *, num_steps: int = 1, total: int, cycle: float | None = None
) -> StepPrediction:
    """`total` tokens of all steps in flight; `cycle` None: the step's own trip."""
    weights = StageWeights(cluster.costs, cluster.placement)
    step = StepPrediction(
        num_sequences=total if cycle is not None else load.num_sequences,
        num_tokens=total,
        steps_in_flight=num_steps,
        stages=tuple(_stage(cluster, weights, cut, index, load=load, num_steps=num_steps) for index in range(len(cut))),
        links=tuple(link_seconds(cluster, *_ends(cut, index), load=load) for index in range(len(cut) + 1)),
        cycle_s=cycle or 0.0,
    )
    return step if cycle is not None else replace(step, cycle_s=step.trip_s)


@dataclass(frozen=True, slots=True)
class _PredictedPace:
    """A stage as the scheduler's model asks for it (`step_times.Pace`), decodes only."""

    cluster: Cluster
    weights: StageWeights
    cut: Cut
    index: int
    context: int
    link_delay_s: float
    """Latency into the stage and its hand-over; the first has the answer's way back too."""

    def step_s(self, shape: StepShape, *, num_steps: int, hopeful: bool = True) -> float:  # noqa: ARG002  as `Pace`
        """Time of the compute thread."""
        load = decode_load(shape.num_sequences, context=self.context)
        return _stage(self.cluster, self.weights, self.cut, self.index, load=load, num_steps=num_steps).compute_s

    def link_s(self, shape: StepShape) -> float:
        """Transfer into the stage."""
        load = decode_load(shape.num_sequences, context=self.context)
        return link_seconds(self.cluster, *_ends(self.cut, self.index), load=load).transfer_s


def _paces(cluster: Cluster, cut: Cut, context: int, *, num_sequences: int) -> list[_PredictedPace]:
    """All stages'; `num_sequences` of a step tell what the answer takes."""
    weights = StageWeights(cluster.costs, cluster.placement)
    load = decode_load(num_sequences, context=context)
    paces = []
    for index, stage in enumerate(cut):
        link = link_seconds(cluster, *_ends(cut, index), load=load)
        delay_s = link.latency_s + cluster.workers[stage.worker_id].hand_over_s
        if index == 0:
            delay_s += link_seconds(cluster, *_ends(cut, len(cut)), load=load).seconds
        paces.append(_PredictedPace(cluster, weights, cut, index, context, delay_s))
    return paces
