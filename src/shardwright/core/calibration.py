"""Turns what a loaded stage took for a few steps into what the prediction needs of its worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.core.placement_costs import StageWeights
from shardwright.core.prediction import StageOn, StepLoad, WorkerSpeed, decode_load, offload_seconds, stage_seconds
from shardwright.types import WorkerId

_MORE = 1.1
"""So many times what offloaded weights take, a prompt has to take to be bound by arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step that a stage computed by hand: the time of the compute thread, the mean of a few."""

    load: StepLoad
    seconds: float
    sampled_s: float | None = None  # the same with the head and sampling; on the last stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProbe:
    """What one stage took for decodes of several sizes and for a chunk of a prompt, alone on its device."""

    stage: StageOn
    decodes: tuple[TimedStep, ...]  # by number of sequences
    prompt: TimedStep | None
    hand_over_s: float
    slowdown: float = 0.0  # see `WorkerSpeed`

    @property
    def worker_id(self) -> WorkerId:
        """Whose stage it is."""
        return self.stage.worker_id


def calibrated(weights: StageWeights, speed: WorkerSpeed, probe: StageProbe) -> WorkerSpeed:
    """The worker's speed such that the prediction for the probed steps is what they took.

    Of a decode's time, what reading at the measured bandwidth does not explain is spread over the layers: their
    overhead by number of sequences. Where a step took less than reading explains (caches hold a small stage), the
    bandwidth is what it reached. Of the prompt's time, what is not the overhead of one sequence's step is arithmetic,
    at the rate that the model's own products reach: narrow ones less than large square ones. Where offloaded weights
    come, a step takes as long as they do at the least, and a prompt that takes no longer tells nothing of arithmetic.
    """
    layers = probe.stage.end - probe.stage.start
    offload_s = offload_seconds(speed, probe.stage)

    def bare(load: StepLoad) -> float:
        """Memory and arithmetic of the layers, as the present `speed` has it, or what is offloaded."""
        stage = stage_seconds(weights, speed, probe.stage, load=replace(load, num_sampled=0))
        return stage.memory_s + stage.matrix_s + stage.offload_s

    speed = replace(speed, layer_overheads=(), head_overheads=(), prompt_rate=None, hand_over_s=probe.hand_over_s)
    for step in probe.decodes[:1]:
        if not offload_s and (explained_s := bare(step.load)) > step.seconds:
            speed = replace(speed, read_bandwidth=speed.read_bandwidth * explained_s / step.seconds)
    first_s = sum(max(step.seconds - bare(step.load), 0.0) for step in probe.decodes[:1])
    if probe.prompt is not None and (left_s := probe.prompt.seconds - first_s) > _MORE * offload_s:
        elements = weights.of_layers(probe.stage.start, probe.stage.end) / weights.costs.element_bytes
        speed = replace(speed, prompt_rate=2 * elements * probe.prompt.load.effective / left_s)
    overheads = [
        (float(step.load.num_sequences), max(step.seconds - bare(step.load), 0.0) / layers) for step in probe.decodes
    ]
    heads = []
    for step in probe.decodes:
        if step.sampled_s is not None:
            load = replace(step.load, num_sampled=step.load.num_sequences)
            head = stage_seconds(weights, speed, probe.stage, load=load).head_s
            heads.append((float(step.load.num_sequences), step.sampled_s - step.seconds - head))
    return replace(
        speed, layer_overheads=tuple(overheads), head_overheads=tuple(heads), slowdown=max(probe.slowdown, 0.0)
    )


def calibrated_workers(
    weights: StageWeights, speeds: Mapping[WorkerId, WorkerSpeed], probes: Sequence[StageProbe]
) -> dict[WorkerId, WorkerSpeed]:
    """All workers with what the probes told.

    Of a worker that holds no stage, and of the head where a worker does not hold it, nothing was timed: there the
    largest overheads, the head's, and the part of the matrix rate that prompts reach elsewhere stand in.
    """
    found = {probe.worker_id: calibrated(weights, speeds[probe.worker_id], probe) for probe in probes}
    head = next((speed.head_overheads for speed in found.values() if speed.head_overheads), ())
    workers = {}
    for worker_id, speed in speeds.items():
        known = found.get(worker_id)
        if known is None and found:
            like = max(found.values(), key=lambda each: each.layer_s(decode_load(1, context=0)))
            known = replace(
                speed,
                prompt_rate=None
                if like.prompt_rate is None
                else like.prompt_rate * speed.matrix_rate / like.matrix_rate,
                layer_overheads=like.layer_overheads,
                hand_over_s=like.hand_over_s,
                slowdown=max((each.slowdown for each in found.values() if each.place == speed.place), default=0.0),
            )
        known = known or speed
        workers[worker_id] = known if known.head_overheads else replace(known, head_overheads=head)
    return workers
