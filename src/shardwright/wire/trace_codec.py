"""What a heartbeat tells of steps, phases and links: protobuf <-> plain values, checked on the way in.

Traces travel as lists of one field each, since a report may bring hundreds: so they cost a microsecond or two apiece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from shardwright.errors import ProtocolError
from shardwright.types import PHASE_BUCKETS_S, LinkReport, PhaseTimes, StepPhase, StepTrace
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_NAMED_COUNTS, MAX_TRACES

PHASE_TAGS: Final[dict[StepPhase, pb.StepPhase]] = {
    StepPhase.QUEUE: pb.STEP_PHASE_QUEUE,
    StepPhase.SERIALISE: pb.STEP_PHASE_SERIALISE,
    StepPhase.COMPUTE: pb.STEP_PHASE_COMPUTE,
    StepPhase.SEND: pb.STEP_PHASE_SEND,
    StepPhase.WAIT: pb.STEP_PHASE_WAIT,
}
_PHASES: Final[dict[int, StepPhase]] = {int(tag): phase for phase, tag in PHASE_TAGS.items()}


def write_traces(traces: Sequence[StepTrace]) -> pb.StepTraces:
    """Steps' passages."""
    return pb.StepTraces(
        epochs=[trace.epoch for trace in traces],
        steps=[trace.step for trace in traces],
        num_sequences=[trace.num_sequences for trace in traces],
        num_tokens=[trace.num_tokens for trace in traces],
        arrived_s=[trace.arrived_s for trace in traces],
        started_s=[trace.started_s for trace in traces],
        finished_s=[trace.finished_s for trace in traces],
        sent_s=[trace.sent_s for trace in traces],
        serialise_s=[trace.serialise_s for trace in traces],
        bytes_in=[trace.bytes_in for trace in traces],
        bytes_out=[trace.bytes_out for trace in traces],
    )


def read_traces(source: pb.StepTraces) -> tuple[StepTrace, ...]:
    """Raises `ProtocolError` for too many, for lists of different lengths, and for times that can't be."""
    count = checks.at_most("HeartbeatReport.traces", len(source.steps), MAX_TRACES)
    columns: tuple[Sequence[float], ...] = (
        source.epochs, source.steps, source.num_sequences, source.num_tokens, source.arrived_s, source.started_s,
        source.finished_s, source.sent_s, source.serialise_s, source.bytes_in, source.bytes_out,
    )  # fmt: skip
    for name, column in zip(pb.StepTraces.DESCRIPTOR.fields_by_name, columns, strict=True):
        if len(column) != count:
            raise ProtocolError(f"StepTraces.{name}: {len(column)} values for {count} steps")
    return tuple(_read_trace(source, index) for index in range(count)) if count else ()


def _read_trace(source: pb.StepTraces, index: int) -> StepTrace:
    trace = StepTrace(
        epoch=source.epochs[index],
        step=source.steps[index],
        num_sequences=source.num_sequences[index],
        num_tokens=source.num_tokens[index],
        arrived_s=source.arrived_s[index],
        started_s=source.started_s[index],
        finished_s=source.finished_s[index],
        sent_s=source.sent_s[index],
        serialise_s=source.serialise_s[index],
        bytes_in=source.bytes_in[index],
        bytes_out=source.bytes_out[index],
    )
    # A number that is none compares as false.
    if not 0.0 <= trace.arrived_s <= trace.started_s <= trace.finished_s <= trace.sent_s < math.inf:
        raise ProtocolError(
            f"StepTraces: step {trace.step} arrived at {trace.arrived_s}, started at {trace.started_s}, finished at "
            f"{trace.finished_s} and was sent at {trace.sent_s}; these must be finite, 0 or above, and in this order"
        )
    checks.number("StepTraces.serialise_s", trace.serialise_s)
    return trace


def write_phase(times: PhaseTimes) -> pb.PhaseTimes:
    """One phase's times."""
    return pb.PhaseTimes(phase=PHASE_TAGS[times.phase], counts=times.counts, total_s=times.total_s)


def read_phases(source: Sequence[pb.PhaseTimes]) -> tuple[PhaseTimes, ...]:
    """Raises `ProtocolError` for an unknown phase, one that comes twice, and other buckets than ours."""
    checks.at_most("HeartbeatReport.phases", len(source), len(_PHASES))
    checks.distinct("HeartbeatReport.phases: phase", [int(times.phase) for times in source])
    return tuple(_read_phase(times) for times in source)


def _read_phase(source: pb.PhaseTimes) -> PhaseTimes:
    phase = _PHASES.get(source.phase)
    if phase is None:
        raise ProtocolError(f"PhaseTimes.phase is {source.phase}; known: {', '.join(map(str, _PHASES))}")
    num_buckets = len(PHASE_BUCKETS_S) + 1
    if len(source.counts) != num_buckets:
        raise ProtocolError(f"PhaseTimes.counts: {len(source.counts)} buckets; there are {num_buckets}")
    return PhaseTimes(
        phase=phase, counts=tuple(source.counts), total_s=checks.number("PhaseTimes.total_s", source.total_s)
    )


def write_link(link: LinkReport | None) -> pb.LinkReport | None:
    """The link to the next stage, where there is one."""
    if link is None:
        return None
    return pb.LinkReport(
        peer=link.peer, bytes_sent=link.bytes_sent, steps_sent=link.steps_sent, round_trip_s=link.round_trip_s
    )


def read_link(source: pb.LinkReport) -> LinkReport:
    """Raises `ProtocolError`."""
    return LinkReport(
        peer=checks.text("LinkReport.peer", source.peer),
        bytes_sent=source.bytes_sent,
        steps_sent=source.steps_sent,
        round_trip_s=(
            checks.number("LinkReport.round_trip_s", source.round_trip_s) if source.HasField("round_trip_s") else None
        ),
    )


def write_counts(counts: Sequence[tuple[str, int]]) -> list[pb.NamedCount]:
    """How much of each kind."""
    return [pb.NamedCount(name=name, count=count) for name, count in counts]


def read_counts(
    what: str, source: Sequence[pb.NamedCount], known: tuple[str, ...] | None = None
) -> tuple[tuple[str, int], ...]:
    """Raises `ProtocolError` for too many, a name that comes twice, is no identifier, or is not among `known`."""
    checks.at_most(what, len(source), MAX_NAMED_COUNTS)
    checks.distinct(f"{what}: name", [each.name for each in source])
    for each in source:
        name = checks.text(f"{what}: name", each.name)
        if known is None and not name.isidentifier():
            raise ProtocolError(f"{what}: name is {name!r}; it must be the name of a class")
        if known is not None and name not in known:
            raise ProtocolError(f"{what}: name is {name!r}; known: {', '.join(known)}")
    return tuple((each.name, each.count) for each in source)
