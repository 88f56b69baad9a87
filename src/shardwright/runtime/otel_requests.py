"""Spans of requests, made after the fact out of what was observed (docs/decisions/0010-spans-after-the-fact.md).

A step costs nothing while it is computed: a task looks once a second at what is new, and makes the spans of the
sequences that are over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.trace import Span, SpanKind

from shardwright.observation import Observatory, RequestTrace, StepPassage
from shardwright.runtime.otel_export import Spans, below, fail, nanoseconds, wall_clock
from shardwright.runtime.span_tree import SequenceRuns, SpanNode, failure, sequence_attributes
from shardwright.types import Epoch, LayerRange, SeqId, StageAssignment

log = logging.getLogger(__name__)

COLLECT_INTERVAL_S: Final = 1.0
PATIENCE_S: Final = 5.0  # for what workers have not reported of a step that came back
FOLD_EVERY: Final = 96  # steps; requests keep more than these
MAX_PASSAGES: Final = 4096
MAX_EPOCHS: Final = 16
SPANS_AT_ONCE: Final = 16  # made in one turn of the event loop: about a millisecond

ASKED_FOR: Final = otel_context.create_key("shardwright-asked-for")
"""In the context of who submits: what was asked for, as (`gen_ai.operation.name`, `gen_ai.request.model`)."""


@dataclass(slots=True)
class _Sequence:
    """One sequence whose span is open."""

    span: Span
    start: float
    runs: SequenceRuns = field(default_factory=SequenceRuns)
    folded: int = 0  # the number of the last step that `runs` has
    ended_at: float | None = None


class RequestTracing:
    """Implements `tracing.RequestTracer`: a span for each sequence, whole once its workers have reported its last step.

    Use: `watch` once there is a master, `run` as a task, `collect(is_last=True)` at the end.
    """

    def __init__(self, spans: Spans, *, model: str) -> None:
        self._tracer = spans.tracer
        self._model = model
        self._clock: Callable[[], float] = wall_clock
        self._observatory: Observatory | None = None
        self._stages: Callable[[], Sequence[StageAssignment]] = tuple
        self._known_stages: dict[Epoch, tuple[StageAssignment, ...]] = {}
        self._open: dict[SeqId, _Sequence] = {}
        self._passages: dict[int, StepPassage] = {}
        self._cursor = 0
        self._newest = 0  # step
        self._folded_at = 0  # the newest step when all sequences were looked at

    def watch(
        self,
        observatory: Observatory,
        stages: Callable[[], Sequence[StageAssignment]],
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        """Where to learn of steps and requests, by which clock, and the stages of the present pipeline."""
        self._clock = clock
        self._observatory = observatory
        self._stages = stages

    # --- sequences ---------------------------------------------------------------------------------

    def begin(self, seq_id: SeqId, now: float) -> str:
        """A sequence was queued, by the task that runs; gives the trace's id, empty when nothing of it is kept."""
        operation, asked_model = cast(
            "tuple[str, str]", otel_context.get_value(ASKED_FOR) or ("text_completion", self._model)
        )
        span = self._tracer.start_span(
            f"{operation} {asked_model}",
            kind=SpanKind.INTERNAL,
            start_time=nanoseconds(now),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "shardwright",
                "gen_ai.request.model": asked_model,
                "gen_ai.response.model": self._model,
            },
        )
        if not span.is_recording():
            return ""
        self._open[seq_id] = _Sequence(span, now)
        return otel.format_trace_id(span.get_span_context().trace_id)

    def end(self, seq_id: SeqId, now: float) -> None:
        """The sequence is over; its steps' last reports may be on their way."""
        sequence = self._open.get(seq_id)
        if sequence is not None and sequence.ended_at is None:
            sequence.ended_at = now

    def refuse(self, seq_id: SeqId, now: float) -> None:
        """The queue was full: the sequence never was."""
        sequence = self._open.pop(seq_id, None)
        if sequence is not None:
            fail(sequence.span, "rejected", "the queue was full")
            sequence.span.end(nanoseconds(now))

    async def run(self) -> None:
        """Make spans as sequences end, until cancelled."""
        while True:
            await asyncio.sleep(COLLECT_INTERVAL_S)
            try:
                await self.collect()
            except Exception:  # the top of a task: a bug here costs traces, not requests
                log.exception("the traces of %d requests were given up", len(self._open))
                self._open.clear()

    async def collect(self, *, is_last: bool = False) -> None:
        """Take in what is known now and make the spans of what is over; with `is_last` of all that there is."""
        if not self._open or self._observatory is None:
            return
        self._look(self._observatory)
        look_at_all = is_last or self._newest - self._folded_at >= FOLD_EVERY
        if look_at_all:
            self._folded_at = self._newest
        for seq_id, sequence in tuple(self._open.items()):
            if sequence.ended_at is None and not look_at_all:
                continue
            if not is_last:
                await asyncio.sleep(0)  # a long one takes a fraction of a millisecond
            trace = self._observatory.request(seq_id)
            is_whole = self._fold(trace, sequence, is_last=is_last)
            if is_last or (is_whole and sequence.ended_at is not None):
                del self._open[seq_id]
                await _in_slices(self._finish(trace, sequence))
        if not self._open:
            self._passages.clear()

    def _look(self, observatory: Observatory) -> None:
        stages = tuple(self._stages())
        if stages:
            self._known_stages[stages[0].epoch] = stages
            if len(self._known_stages) > MAX_EPOCHS:
                del self._known_stages[min(self._known_stages)]
        self._cursor, changed = observatory.steps_changed(self._cursor)
        for passage in changed:
            self._passages[passage.number] = passage
            self._newest = max(self._newest, passage.number)
        for number in sorted(self._passages)[: max(len(self._passages) - MAX_PASSAGES, 0)]:
            del self._passages[number]

    def _fold(self, trace: RequestTrace | None, sequence: _Sequence, *, is_last: bool) -> bool:
        """Take in the steps whose reports are complete; whether these are all."""
        now = self._clock()
        for part in trace.steps if trace is not None else ():
            if part.number <= sequence.folded:
                continue
            passage = self._passages.get(part.number)
            if passage is not None:
                if not is_last and not self._is_settled(passage, sequence.ended_at, now):
                    return False
                sequence.runs.add(passage, part)
            sequence.folded = part.number
        return True

    def _is_settled(self, passage: StepPassage, ended_at: float | None, now: float) -> bool:
        """Whether nothing more is to be learnt of a step, or enough time was given for it."""
        stages = self._known_stages.get(passage.epoch)
        if passage.returned_at is not None:
            is_whole = stages is not None and len(passage.stages) >= len(stages)
            return is_whole or now - passage.returned_at > PATIENCE_S
        return ended_at is not None and now - ended_at > PATIENCE_S

    def _finish(self, trace: RequestTrace | None, sequence: _Sequence) -> Iterator[None]:
        """Make the spans below the sequence's, one at a time, and end it. `trace` is None when it is forgotten."""
        span = sequence.span
        end = sequence.ended_at if sequence.ended_at is not None else self._clock()
        if trace is not None:
            end = max(sequence.start, end if trace.finished_at is None else trace.finished_at)
            for name, value in sequence_attributes(trace, num_traced_steps=sequence.runs.num_steps).items():
                span.set_attribute(name, value)
            if error := failure(trace.reason):
                fail(span, error, f"the request ended with {error}")
            context = below(span)
            for node in sequence.runs.spans(trace, start=sequence.start, end=end, layers=self._layers):
                yield from self._write(node, context)
        span.end(nanoseconds(end))

    def _write(self, node: SpanNode, context: otel_context.Context) -> Iterator[None]:
        span = self._tracer.start_span(
            node.name, context=context, start_time=nanoseconds(node.start), attributes=dict(node.attributes)
        )
        inside = below(span)
        for child in node.children:
            yield from self._write(child, inside)
        span.end(nanoseconds(node.end))
        yield

    def _layers(self, epoch: Epoch, index: int) -> LayerRange | None:
        stages = self._known_stages.get(epoch, ())
        return stages[index].layers if index < len(stages) else None


async def _in_slices(work: Iterator[None]) -> None:
    """Do the work a bit at a time, and let others run in between; all of it also when cancelled."""
    try:
        for number, _ in enumerate(work):
            if number % SPANS_AT_ONCE == SPANS_AT_ONCE - 1:
                await asyncio.sleep(0)
    finally:
        for _ in work:
            pass
