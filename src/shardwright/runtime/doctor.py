"""Examines a cluster: measures workers and links, probes the loaded stages, runs a short load, and lets the core judge.

Everything that the prediction reads is measured before the load runs: machines and links by the workers' own calls
(`MeasureMachine`, `MeasureLink`, `Ping`), and once the stages are loaded a few steps that each stage computes by hand
(`stage_prober.py`). What follows from it is the core's (`prediction.py`, `diagnosis.py`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from shardwright.config import MasterConfig
from shardwright.core.calibration import StageProbe, calibrated_workers
from shardwright.core.diagnosis import (
    Alternatives,
    Change,
    all_changes,
    best_changes,
    cut_of,
    prediction_sentences,
)
from shardwright.core.placement import place
from shardwright.core.placement_costs import StageWeights
from shardwright.core.prediction import (
    MASTER,
    Cluster,
    Cut,
    Figures,
    LinkSpeed,
    WorkerSpeed,
    Workload,
    message_bytes,
    predict,
    stage_on,
)
from shardwright.errors import PlacementError, ShardwrightError, WorkerUnreachableError
from shardwright.runtime.links import measure_link
from shardwright.runtime.measure import host_id, measure_speed, usable_cores
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.session import (
    KnownWorker,
    OpenModel,
    Session,
    SessionListener,
    check_free,
    check_versions,
    meet_workers,
    open_session,
    placement_settings,
)
from shardwright.runtime.short_load import Achieved, Listener, run_load
from shardwright.runtime.stage_prober import probe_stages
from shardwright.transport.base import Transport
from shardwright.types import (
    LinkMeasures,
    MachineMeasures,
    ModelCosts,
    WorkerId,
)
from shardwright.wire.limits import MAX_PING_BYTES

MEASURE_TIMEOUT_S: Final = 60.0
LINK_TIMEOUT_S: Final = 120.0

_PAIRWISE_WORKERS: Final = 8
"""Up to so many workers every link between two is measured; with more only the pipeline's."""


class DoctorListener(SessionListener, Listener, Protocol):
    """Hears what the doctor does, and how a session's start gets on."""


# --- machines and links ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredWorker:
    """A worker and what it measured when it was asked."""

    worker: KnownWorker
    measures: MachineMeasures
    slowdown: float  # part by which each further worker of its device, computing too, prolongs what it does
    bfloat16: MachineMeasures | None = None  # where the model is computed in another dtype

    @property
    def speed(self) -> WorkerSpeed:
        """For the prediction, before a stage was probed."""
        return WorkerSpeed(
            worker_id=self.worker.worker_id,
            host_id=self.worker.description.host_id,
            device=self.worker.description.device,
            read_bandwidth=self.measures.read_bandwidth,
            matrix_rate=self.measures.matrix_rate,
            slowdown=self.slowdown,
            offload=self.worker.capacity.offload,
            offload_bandwidth=self.worker.capacity.offload_bandwidth,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLink:
    """A way between two processes; `MASTER` stands for this one."""

    sender: WorkerId
    receiver: WorkerId
    measures: LinkMeasures

    @property
    def speed(self) -> LinkSpeed:
        """For the prediction."""
        return LinkSpeed.measured(self.measures)


async def measure_workers(workers: Sequence[KnownWorker], dtype: str, listener: Listener) -> tuple[MeasuredWorker, ...]:
    """Each worker alone; and those of one device once more at the same time, to learn how they slow each other down.

    Raises what the workers' clients raise.
    """
    alone: dict[WorkerId, MachineMeasures] = {}
    bfloat16: dict[WorkerId, MachineMeasures] = {}
    for worker in workers:
        listener.doing(f"measuring worker {worker.worker_id}")
        alone[worker.worker_id] = await worker.client.measure_machine(dtype, timeout_s=MEASURE_TIMEOUT_S)
        if dtype != "bfloat16":
            measures = await worker.client.measure_machine("bfloat16", timeout_s=MEASURE_TIMEOUT_S)
            bfloat16[worker.worker_id] = measures
    slowdowns = dict.fromkeys(alone, 0.0)
    for sharing in _by_device(workers):
        if len(sharing) < 2:
            continue
        listener.doing(f"measuring the {len(sharing)} workers of one {sharing[0].description.device} at once")
        both = await asyncio.gather(
            *(worker.client.measure_machine(dtype, timeout_s=MEASURE_TIMEOUT_S) for worker in sharing)
        )
        for worker, together in zip(sharing, both, strict=True):
            factor = alone[worker.worker_id].read_bandwidth / together.read_bandwidth
            slowdowns[worker.worker_id] = max((factor - 1) / (len(sharing) - 1), 0.0)
    return tuple(
        MeasuredWorker(
            worker=worker,
            measures=alone[worker.worker_id],
            slowdown=slowdowns[worker.worker_id],
            bfloat16=bfloat16.get(worker.worker_id),
        )
        for worker in workers
    )


def _by_device(workers: Sequence[KnownWorker]) -> list[list[KnownWorker]]:
    groups: dict[tuple[str, str], list[KnownWorker]] = {}
    for worker in workers:
        groups.setdefault((worker.description.host_id, worker.description.device), []).append(worker)
    return list(groups.values())


def transfer_sizes(model: OpenModel, config: MasterConfig, workload: Workload) -> tuple[int, ...]:
    """Sizes of the messages between two stages: decode's of one sequence and of all, a part of a chunk and a whole."""
    chunk = min(workload.prompt_tokens, config.token_budget)
    shapes = {(1, 1), (workload.num_sequences, workload.num_sequences), (1, max(chunk // 4, 1)), (1, chunk)}
    sizes = {
        min(message_bytes(model.costs, num_sequences=sequences, num_tokens=tokens), MAX_PING_BYTES)
        for sequences, tokens in shapes
    }
    return tuple(sorted(sizes))


async def measure_links(
    workers: Sequence[KnownWorker],
    pipeline: Sequence[WorkerId],
    sizes: tuple[int, ...],
    listener: Listener,
) -> tuple[MeasuredLink, ...]:
    """The master's way to each worker, and the workers' to each other, one after the other.

    Raises what the workers' clients raise; a worker that can't reach another is such an error.
    """
    found = []
    for worker in workers:
        listener.doing(f"measuring the link to worker {worker.worker_id}")
        measures = await measure_link(worker.client, sizes)
        found.append(MeasuredLink(sender=MASTER, receiver=worker.worker_id, measures=measures))
    neighbours = set(itertools.pairwise(pipeline))
    for sender in workers:
        for receiver in workers:
            ends = (sender.worker_id, receiver.worker_id)
            if sender is receiver or (len(workers) > _PAIRWISE_WORKERS and ends not in neighbours):
                continue
            listener.doing(f"measuring the link from worker {ends[0]} to worker {ends[1]}")
            measures = await sender.client.measure_link(receiver.entry.address, sizes, timeout_s=LINK_TIMEOUT_S)
            found.append(MeasuredLink(sender=ends[0], receiver=ends[1], measures=measures))
    return tuple(found)


def cluster_of(
    model: OpenModel,
    config: MasterConfig,
    workers: Sequence[MeasuredWorker],
    links: Sequence[MeasuredLink],
    probes: Sequence[StageProbe] = (),
) -> Cluster:
    """All of it, as the prediction takes it."""
    settings = placement_settings(config, model.costs)
    speeds = {each.worker.worker_id: each.speed for each in workers}
    if probes:
        speeds = calibrated_workers(StageWeights(model.costs, settings), speeds, probes)
    return Cluster(
        costs=model.costs,
        workers=speeds,
        links={(link.sender, link.receiver): link.speed for link in links},
        token_budget=config.token_budget,
        steps_in_flight=config.steps_in_flight or None,
        placement=settings,
    )


def alternatives_of(
    model: OpenModel, config: MasterConfig, workers: Sequence[MeasuredWorker], cluster: Cluster, kv_tokens: int
) -> Alternatives:
    """What else is known or can be measured here. Takes a second where workers of this machine leave cores unused."""
    return Alternatives(
        bfloat16=_in_bfloat16(model, workers, cluster),
        more_threads=_with_more_threads(workers, cluster),
        most_requests=config.max_running,
        kv_tokens=kv_tokens,
    )


def _in_bfloat16(
    model: OpenModel, workers: Sequence[MeasuredWorker], cluster: Cluster
) -> tuple[ModelCosts, dict[WorkerId, WorkerSpeed]] | None:
    from shardwright.model.families import model_costs

    if any(each.bfloat16 is None for each in workers):
        return None
    costs = model_costs(model.config_json, name=model.costs.name, dtype="bfloat16", plan=model.plan)
    speeds = {}
    for each in workers:
        assert each.bfloat16 is not None
        known = cluster.workers[each.worker.worker_id]
        faster = each.bfloat16.matrix_rate / each.measures.matrix_rate
        speeds[known.worker_id] = replace(
            known,
            matrix_rate=known.matrix_rate * faster,
            prompt_rate=None if known.prompt_rate is None else known.prompt_rate * faster,
        )
    return costs, speeds


def _with_more_threads(
    workers: Sequence[MeasuredWorker], cluster: Cluster
) -> Mapping[WorkerId, tuple[int, WorkerSpeed]]:
    """Workers that have a CPU of this very machine to themselves, with fewer threads than it has cores.

    Memory and matrices are measured with as many threads as they have and with all; the ratio is taken.
    """
    import torch

    cores, here = usable_cores(), host_id()
    found = {}
    for (group,) in [group for group in _by_device([each.worker for each in workers]) if len(group) == 1]:
        about = group.description
        if (about.host_id, about.device) != (here, "cpu") or about.num_threads >= cores:
            continue
        cpu = torch.device("cpu")
        now, then = (measure_speed(cpu, num_threads=count) for count in (about.num_threads, cores))
        known = cluster.workers[group.worker_id]
        faster = then.matrix_rate / now.matrix_rate
        speed = replace(
            known,
            read_bandwidth=known.read_bandwidth * then.read_bandwidth / now.read_bandwidth,
            matrix_rate=known.matrix_rate * faster,
            prompt_rate=None if known.prompt_rate is None else known.prompt_rate * faster,
        )
        found[group.worker_id] = (cores, speed)
    return found


# --- all of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What to examine, and how thoroughly."""

    workload: Workload
    is_quick: bool = False  # one round of the load instead of two
    loads_model: bool = True  # False: predict from machines and links alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was measured, what follows from it, and what was achieved."""

    model: OpenModel
    workers: tuple[MeasuredWorker, ...]
    silent: tuple[tuple[WorkerEntry, ShardwrightError], ...]  # registered, but did not answer
    links: tuple[MeasuredLink, ...]
    probes: tuple[StageProbe, ...]  # none where the model was not loaded
    cluster: Cluster
    cut: Cut
    figures: Figures  # predicted
    achieved: Achieved | None
    sentences: tuple[str, ...]
    changes: tuple[Change, ...]  # all that are worth it, the best first

    @property
    def best_changes(self) -> tuple[Change, ...]:
        """The few to tell."""
        return best_changes(self.changes)


async def examine(
    config: MasterConfig,
    entries: Sequence[WorkerEntry],
    wish: Wish,
    *,
    transport: Transport,
    model: OpenModel,
    listener: DoctorListener,
) -> Examination:
    """Measure, predict, load, probe, run, compare.

    Raises as `open_session` does; `ClusterError` too when a worker can't reach another, or serves another master.
    """
    known, silent = await meet_workers(transport, entries, timeout_s=config.connect_timeout_s)
    try:
        if not known:
            raise WorkerUnreachableError("; ".join(str(error) for _, error in silent))
        check_versions(known)
        check_free(known)
        capacities = [worker.capacity for worker in known]
        settings = placement_settings(config, model.costs)
        placement = place(model.costs, capacities, settings)
        cut = cut_of(placement)
        workload = _fitting(wish.workload, kv_tokens=placement.num_blocks * config.block_size, model=model)
        workers = await measure_workers(known, model.dtype, listener)
        sizes = transfer_sizes(model, config, workload)
        links = await measure_links(known, [stage.worker_id for stage in cut], sizes, listener)
        probes: tuple[StageProbe, ...] = ()
        achieved = None
        if wish.loads_model:
            listener.doing("loading the stages")
            answering = [worker.entry for worker in known]
            async with open_session(
                config, answering, listener=listener, transport=transport, model=model, write_metrics=False
            ) as session:
                cut = present_cut(session)
                probes = await probe_stages(session, cluster_of(model, config, workers, links), workload, listener)
                achieved = await run_load(session, workload, listener, rounds=1 if wish.is_quick else 2)
        listener.doing("looking for what would help")
        cluster = cluster_of(model, config, workers, links, probes)
        kv_tokens = placement.num_blocks * config.block_size
        alternatives = await asyncio.to_thread(alternatives_of, model, config, workers, cluster, kv_tokens)
        changes = await asyncio.to_thread(all_changes, cluster, capacities, cut, workload, alternatives)
        figures = predict(cluster, cut, workload)
        return Examination(
            model=model,
            workers=workers,
            silent=tuple(silent),
            links=links,
            probes=probes,
            cluster=cluster,
            cut=cut,
            figures=figures,
            achieved=achieved,
            sentences=tuple(_sentences(figures)),
            changes=changes,
        )
    finally:
        await asyncio.gather(*(worker.client.close() for worker in known))


def present_cut(session: Session) -> Cut:
    """The pipeline as it stands, for the prediction."""
    return tuple(stage_on(assignment, session.model.costs) for assignment in session.engine.snapshot().stages)


def _fitting(workload: Workload, *, kv_tokens: int, model: OpenModel) -> Workload:
    """The workload with no more positions than the model and the blocks have. Raises `PlacementError` for too few."""
    most = min(model.costs.max_context, kv_tokens)
    new_tokens = min(workload.new_tokens, most // 4, kv_tokens // workload.num_sequences // 2)
    if new_tokens < 2:
        raise PlacementError(
            f"there is room for {kv_tokens} positions, too few for {workload.num_sequences} sequences; "
            "take fewer sequences, or more memory"
        )
    return replace(
        workload,
        new_tokens=new_tokens,
        prompt_tokens=min(workload.prompt_tokens, most - 1),
        context=min(workload.context, kv_tokens // workload.num_sequences - new_tokens, most - new_tokens),
    )


def _sentences(figures: Figures) -> list[str]:
    count = figures.workload.num_sequences
    found = prediction_sentences("Decode of one sequence", figures.one)
    if count > 1:
        found += prediction_sentences(f"Decode of {count} sequences", figures.many)
    longest = max(figures.prompt.chunks, key=lambda chunk: chunk.trip_s)
    return found + prediction_sentences("Prefill", longest)
