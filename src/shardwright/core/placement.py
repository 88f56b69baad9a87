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
  bottleneck the longest time that a stage needs its share of a device for a typical request, with the pipeline full:
             the settings' `prompt_tokens` together, and `new_tokens` decode steps that it shares with others. All
             tokens go through the layers; the head is read for decode steps alone, so that the longer the prompts, the
             more layers the last stage gets

Workers that share a device (same `host_id` and `device`: the CPU of one machine, one GPU given to two workers).
Their memory is one: what they hold together must fit in the device's (`shared_memory_bytes`, or the largest
`memory_bytes` among them). Their speed is one too. Each measured it for itself, perhaps while another did, so the
best figures of them count for all. A single step finds them idle but for one, so its latency has the full speed; but
a full pipeline keeps all k of them busy, so each has 1/k of the speed and its stage counts k times towards the
bottleneck. k counts the workers that were given and can hold a layer.
A stage of one of k such workers therefore gets about 1/k of what it would get alone, and equal peers split evenly.

Offloading. A worker may have room for weights beside its memory (`WorkerCapacity.offload`). Only where nothing fits
without that, a stage may exceed its worker's memory: as few layers as are enough, evenly spread, are then kept there,
and two buffers of the size of its largest layer take their place (`StageWeights.offload`). Each step reads them all
while it computes, so a stage's time is the longer of the two. A disk is shared by the workers of its host that may
use it, in room and in speed; so is a device's memory here, evenly, since how much of it each needs is a choice.

`placement_search` says how the best is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwright.core.placement_costs import (
    Offload,
    PlacementSettings,
    StageWeights,
    request_seconds_per_byte,
    seconds_per_byte,
)
from shardwright.core.placement_search import ATTO, Candidate, Found, find_best, latency, offloaded
from shardwright.errors import PlacementError
from shardwright.types import LayerRange, ModelCosts, WorkerCapacity, WorkerId

__all__ = ["LeftOut", "Placement", "PlacementSettings", "PlannedStage", "place"]

_MIB = 1024**2
_GIB = 1024**3


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
    offloaded_layers: tuple[int, ...] = ()  # kept beside the worker's memory, rising
    offloaded_bytes: int = 0  # of `weight_bytes`
    buffer_bytes: int = 0  # of memory, that these are read into; not among `weight_bytes`


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
    bottleneck_s: float  # predicted time between two decode steps, with the pipeline full
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
    weights = StageWeights(costs, settings)
    usable, left_out = _sort_out(weights, workers)
    for candidates in (usable, _with_offload(usable)):
        found = find_best(weights, candidates) if candidates else None
        if found is not None:
            return _describe(weights, candidates, left_out, found)
    raise PlacementError(_misfit(weights, workers, usable))


def _sort_out(weights: StageWeights, workers: Sequence[WorkerCapacity]) -> tuple[list[Candidate], list[LeftOut]]:
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
        bandwidth = max(w.read_bandwidth for w in groups[key])
        matrix_rate = max(w.matrix_rate for w in groups[key])
        element_bytes = weights.costs.element_bytes
        byte_s = seconds_per_byte(read_bandwidth=bandwidth, matrix_rate=matrix_rate, element_bytes=element_bytes)
        layer_s, head_s = request_seconds_per_byte(
            weights.settings, read_bandwidth=bandwidth, matrix_rate=matrix_rate, element_bytes=element_bytes
        )
        found.append(
            Candidate(
                order=order,
                capacity=worker,
                atto_per_byte=_atto(byte_s),
                pace_per_byte=_atto(layer_s),
                pace_per_head_byte=_atto(head_s),
                atto_link=round(worker.link_delay_s * ATTO),
                sharing=len(groups[key]),
                device_limit=limits[key],
                tracked=tight.index(key) if key in tight else -1,
            )
        )
    return found, left_out


def _atto(seconds: float) -> int:
    """In attoseconds, one at least, without what floats' rounding added: equal times have to stay equal in a tie."""
    return max(round(float(f"{seconds:.12g}") * ATTO), 1)


def _with_offload(usable: Sequence[Candidate]) -> list[Candidate]:
    """The same workers with what they may keep beside their memory; none where nobody may."""
    ways: dict[tuple[str, str], list[WorkerCapacity]] = {}
    for worker in usable:
        if worker.capacity.offload_bytes > 0 and worker.capacity.offload_bandwidth > 0:
            ways.setdefault(_way(worker.capacity), []).append(worker.capacity)
    if not ways:
        return []
    found = []
    for worker in usable:
        capacity = worker.capacity
        memory = min(capacity.memory_bytes, worker.device_limit // worker.sharing)
        peers = ways.get(_way(capacity), []) if capacity.offload_bytes > 0 and capacity.offload_bandwidth > 0 else []
        fastest = max((peer.offload_bandwidth for peer in peers), default=0.0)
        found.append(
            replace(
                worker,
                capacity=replace(capacity, memory_bytes=memory),
                tracked=-1,
                offload_limit=capacity.offload_bytes // len(peers) if peers else 0,
                offload_atto_per_byte=_atto(1 / fastest) if peers else 0,
                offload_sharing=len(peers) or 1,
            )
        )
    return found


def _way(capacity: WorkerCapacity) -> tuple[str, str]:
    """What a worker's offloaded weights come through: its host's disk, or its device's own way to the host's memory."""
    return capacity.host_id, capacity.device if capacity.offload == "cpu" else ""


# --- the answer in words -----------------------------------------------------------------------------


def _describe(
    weights: StageWeights, usable: Sequence[Candidate], left_out: Sequence[LeftOut], found: Found
) -> Placement:
    num_blocks = _num_blocks(weights, found)
    stages = []
    for worker, start, end in found.stages:
        offload = worker.offload(weights, start, end)
        assert offload is not None, "a stage that was found fits"
        stages.append(
            PlannedStage(
                worker_id=worker.capacity.worker_id,
                layers=LayerRange(start, end),
                weight_bytes=weights.held(start, end),
                kv_bytes=weights.kv_per_block(start, end) * num_blocks,
                step_s=worker.alone(weights, start, end, offload.num_bytes) / ATTO,
                is_first=start == 0,
                is_last=end == weights.num_layers,
                reason=_reason(
                    weights,
                    worker,
                    start,
                    end,
                    is_slowest=worker.share(weights, start, end, offload.num_bytes) == found.bottleneck,
                ),
                offloaded_layers=offload.layers if offload.number else (),
                offloaded_bytes=offload.num_bytes,
                buffer_bytes=offload.buffers,
            )
        )
    used = {worker.order for worker, _, _ in found.stages}
    too_many = len(found.stages) == weights.num_layers
    reason = "every layer has a worker already" if too_many else "no placement that includes it too fits in memory"
    unused = [LeftOut(worker_id=w.capacity.worker_id, reason=reason) for w in usable if w.order not in used]
    return Placement(
        stages=tuple(stages),
        num_blocks=num_blocks,
        bottleneck_s=max(_shared_step(weights, *stage) for stage in found.stages) / ATTO,
        latency_s=latency(weights, found) / ATTO,
        left_out=(*left_out, *unused),
        is_exact=found.is_exact,
    )


def _shared_step(weights: StageWeights, worker: Candidate, start: int, end: int) -> int:
    """A decode step of one sequence while all that share the stage's device and disk are busy too."""
    compute = weights.streamed(start, end) * worker.atto_per_byte * worker.sharing
    transfer = offloaded(weights, worker, start, end) * worker.offload_atto_per_byte * worker.offload_sharing
    return max(compute, transfer)


def _num_blocks(weights: StageWeights, found: Found) -> int:
    """Blocks that the stage, or the device under several stages, with the least room has room for."""
    workspace = weights.settings.workspace_bytes
    room: list[tuple[int, int]] = []  # bytes left, bytes of a block
    devices: dict[tuple[str, str], tuple[int, int]] = {}
    for worker, start, end in found.stages:
        offload = worker.offload(weights, start, end)
        assert offload is not None, "a stage that was found fits"
        weight = weights.held(start, end) - offload.saved + workspace
        block = weights.kv_per_block(start, end)
        room.append((worker.capacity.memory_bytes - weight, block))
        key = (worker.capacity.host_id, worker.capacity.device)
        left, blocks = devices.get(key, (worker.device_limit, 0))
        devices[key] = (left - weight, blocks + block)
    room.extend(devices.values())
    return min([left // block for left, block in room if block > 0] + [weights.settings.max_blocks])


def _reason(weights: StageWeights, worker: Candidate, start: int, end: int, *, is_slowest: bool) -> str:
    parts = [
        f"{_mib(weights.streamed(start, end))} to read for each token at {ATTO / worker.atto_per_byte / 1e9:.1f} GB/s"
    ]
    if worker.sharing > 1:
        parts.append(f"one of {worker.sharing} workers on its {worker.capacity.device}")
    if offload := worker.offload(weights, start, end):
        parts += _offload_reason(weights, worker, offload, end)
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


def _offload_reason(weights: StageWeights, worker: Candidate, offload: Offload, end: int) -> list[str]:
    """What is offloaded, why, and what that costs."""
    if not offload.number:
        return []
    capacity = worker.capacity
    where = "the host's memory" if capacity.offload == "cpu" else "disk"
    transfer_s = offload.num_bytes * worker.offload_atto_per_byte / ATTO
    compute_s = weights.streamed(offload.start, end) * worker.atto_per_byte / ATTO
    held = (
        f"{offload.number} of its {offload.count} layers ({_mib(offload.num_bytes)}) on {where}, since no placement "
        f"fits in memory alone (this worker has {_gib(capacity.memory_bytes)})"
    )
    cost = (
        f"each step reads them at {ATTO / worker.offload_atto_per_byte / 1e9:.2f} GB/s: {transfer_s * 1000:.0f} ms "
        f"beside {compute_s * 1000:.0f} ms of computing"
    )
    more = f", longer while {worker.offload_sharing} workers read" if worker.offload_sharing > 1 else ""
    return [held, cost + more]


def _misfit(weights: StageWeights, workers: Sequence[WorkerCapacity], usable: Sequence[Candidate]) -> str:
    """Why nothing fits and what would help: the message of the `PlacementError`."""
    costs, settings = weights.costs, weights.settings
    whole = weights.needed(0, costs.num_layers)
    devices: dict[tuple[str, str], list[WorkerCapacity]] = {}
    for w in workers:
        devices.setdefault((w.host_id, w.device), []).append(w)
    together = sum(
        min(sum(w.memory_bytes for w in sharing), max(max(w.memory_bytes, w.shared_memory_bytes) for w in sharing))
        for sharing in devices.values()
    )
    largest = max(workers, key=lambda w: w.memory_bytes)
    count = f"{len(workers)} workers" if len(workers) > 1 else "1 worker"
    have = f"the largest ({largest.worker_id}) offers {_gib(largest.memory_bytes)}"
    have += f", the {count} together {_gib(together)}"
    offers = any(w.offload_bytes > 0 and w.offload_bandwidth > 0 for w in workers)
    if offers:
        tier = "Offloading layers is not enough: embedding, head, KV and buffers for two layers stay in memory"
    else:
        tier = "Workers that may offload layers (--offload nvme) help too"
    return (
        f"{costs.name} needs {_gib(whole)} ({_gib(weights.held(0, costs.num_layers))} of weights, KV for "
        f"{settings.min_kv_tokens} tokens, and workspace) and a layer can't be divided; {have}. "
        f"Add a worker with at least {_gib(_enough(weights, usable))}, or use a smaller dtype, model or context. {tier}"
    )


def _enough(weights: StageWeights, usable: Sequence[Candidate]) -> int:
    """Memory of one more worker with which the model would fit: the first of a few sizes that is enough."""
    whole = weights.needed(0, weights.num_layers)
    fastest = WorkerCapacity(
        worker_id="", host_id="", device="", memory_bytes=whole, read_bandwidth=1e12, matrix_rate=1e15
    )
    for part in range(1, 8):
        memory = whole * part // 8
        if memory < weights.smallest_need:
            continue
        one_more = Candidate(
            order=-1,
            capacity=replace(fastest, memory_bytes=memory),
            atto_per_byte=1,
            pace_per_byte=1,
            pace_per_head_byte=1,
            atto_link=0,
            sharing=1,
            device_limit=memory,
            tracked=-1,
        )
        if find_best(weights, [*usable, one_more]) is not None:
            return memory
    return whole


def _gib(num_bytes: int) -> str:
    """Rounded up, so that what a message asks for is enough."""
    return f"{math.ceil(num_bytes / _GIB * 100) / 100:.2f} GiB"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.0f} MiB"
