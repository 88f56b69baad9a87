"""What bounds a running server, from the steps that it watched: their phases, stage by stage. Loads nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwright.core.diagnosis import bound_sentences, worker_name
from shardwright.core.prediction import MASTER, Part, PartKind
from shardwright.observation import StagePassage, StepPassage
from shardwright.types import WorkerId

_ALWAYS_BUSY = 0.9
"""A stage that computes for this part of the time is what all wait for."""

_FEW_STEPS = 10
"""With so few, the master's own tries of an idle pipeline may be all that there was."""

_PAUSE_S = 1.0
"""Steps further apart are not of one stretch of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsSummary:
    """Steps of one kind, decode or with prompts, that followed each other."""

    num_steps: int
    sequences_per_step: float
    tokens_per_step: float
    tokens_per_s: float  # over the time in which such steps were under way
    steps_in_flight: float  # on average, over that time
    trip_s: float  # mean
    parts: tuple[Part, ...]  # of the mean trip
    busy: tuple[tuple[WorkerId, float], ...]  # part of that time in which each stage computed these steps

    @property
    def busiest(self) -> tuple[WorkerId, float]:
        """The stage that computed most of the time."""
        return max(self.busy, key=lambda each: each[1])


def summarise(steps: Sequence[StepPassage], *, is_decode: bool) -> StepsSummary | None:
    """The newest steps of this kind whose whole trip is known; None without any.

    Only steps of the newest pipeline count. Decode steps have one token for each sequence; the others carry prompts.
    """
    known = [step for step in steps if _is_whole(step)]
    if not known:
        return None
    newest = known[-1]
    workers = [stage.worker_id for stage in newest.stages]
    chosen = [
        step
        for step in known
        if step.epoch == newest.epoch
        and [stage.worker_id for stage in step.stages] == workers
        and (step.num_tokens == step.num_sequences) is is_decode
    ]
    if not chosen:
        return None
    elapsed_s = _covered_s(chosen)
    trips = [_trip_s(step) for step in chosen]
    tokens = sum(step.num_tokens for step in chosen)
    return StepsSummary(
        num_steps=len(chosen),
        sequences_per_step=statistics.fmean(step.num_sequences for step in chosen),
        tokens_per_step=tokens / len(chosen),
        tokens_per_s=tokens / elapsed_s,
        steps_in_flight=sum(trips) / elapsed_s,
        trip_s=statistics.fmean(trips),
        parts=_mean_parts(chosen),
        busy=tuple(
            (
                worker_id,
                sum(step.stages[index].finished_at - step.stages[index].started_at for step in chosen) / elapsed_s,
            )
            for index, worker_id in enumerate(workers)
        ),
    )


def summary_sentences(what: str, summary: StepsSummary) -> list[str]:
    """What bounds these steps, in words; with few of them, that they are few."""
    few = []
    if summary.num_steps < _FEW_STEPS:
        count = "1 step" if summary.num_steps == 1 else f"{summary.num_steps} steps"
        few = [f"That is from {count} alone; send requests, then look again."]
    return _bounds(what, summary) + few


def _bounds(what: str, summary: StepsSummary) -> list[str]:
    worker_id, share = summary.busiest
    if share >= _ALWAYS_BUSY and summary.steps_in_flight > 1.2:
        return [f"{what} is bound by {worker_name(worker_id)}, which computes {share:.0%} of the time."]
    return bound_sentences(what, summary.parts)


def _is_whole(step: StepPassage) -> bool:
    """Back, and told of by every stage."""
    indices = [stage.stage_index for stage in step.stages]
    expected = step.num_stages or len(indices)
    return step.returned_at is not None and bool(indices) and indices == list(range(expected))


def _trip_s(step: StepPassage) -> float:
    assert step.returned_at is not None, "only whole steps are summed up"
    return max(step.returned_at - step.sent_at, 1e-9)


def _covered_s(steps: Sequence[StepPassage]) -> float:
    """Seconds in which at least one of them was under way, with the short times between them."""
    total, end = 0.0, None
    for sent_at, returned_at in sorted((step.sent_at, step.sent_at + _trip_s(step)) for step in steps):
        if end is None or sent_at - end > _PAUSE_S:
            total += returned_at - sent_at
            end = returned_at
        elif returned_at > end:
            total += returned_at - end
            end = returned_at
    return total


_PHASES: tuple[tuple[PartKind, Callable[[StagePassage], float]], ...] = (
    (PartKind.LINK, lambda stage: stage.wire_s or 0.0),  # known of whole steps
    (PartKind.QUEUE, lambda stage: stage.started_at - stage.arrived_at),
    (PartKind.SERIALISE, lambda stage: stage.serialise_s),
    (PartKind.COMPUTE, lambda stage: stage.finished_at - stage.started_at - stage.serialise_s),
    (PartKind.SEND, lambda stage: stage.sent_at - stage.finished_at),
)


def _mean_parts(steps: Sequence[StepPassage]) -> tuple[Part, ...]:
    """The mean of each phase of each stage, in the trip's order, and the answer's way back."""
    parts = []
    sender = MASTER
    for index, first in enumerate(steps[0].stages):
        for kind, of in _PHASES:
            seconds = statistics.fmean(max(of(step.stages[index]), 0.0) for step in steps)
            parts.append(
                Part(
                    kind=kind,
                    worker_id=first.worker_id,
                    sender=sender if kind is PartKind.LINK else MASTER,
                    seconds=seconds,
                )
            )
        sender = first.worker_id
    back_s = statistics.fmean(max(step.sent_at + _trip_s(step) - step.stages[-1].sent_at, 0.0) for step in steps)
    parts.append(Part(kind=PartKind.LINK, worker_id=MASTER, sender=sender, seconds=back_s))
    return tuple(part for part in parts if part.seconds > 0)
