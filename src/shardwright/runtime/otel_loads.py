"""Spans of loading: a trace for each pipeline, a span for each stage on the master, and below it the worker's own.

The master tells each worker with every call that belongs to the pipeline which span is its parent
(`transport/trace_context.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from opentelemetry import context as otel_context
from opentelemetry.trace import Span, SpanKind

from shardwright.runtime.otel_export import Spans, below, fail, remote_context, trace_parent_of
from shardwright.transport.base import WorkerClient, WorkerService
from shardwright.transport.trace_context import incoming_trace_parent
from shardwright.types import Epoch, StageAssignment
from shardwright.wire.messages import LoadBegin, LoadDone, LoadMessage, LoadProgress, LoadRefused, LoadReply

StageLoader: TypeAlias = Callable[[StageAssignment, WorkerClient], Awaitable[LoadDone]]


@dataclass(slots=True)
class _Pipeline:
    span: Span
    num_open: int = 0  # stages that are being loaded


class LoadTracing:
    """The master's side."""

    def __init__(self, spans: Spans, load: StageLoader, *, model: str) -> None:
        self._tracer = spans.tracer
        self._load = load
        self._model = model
        self._pipelines: dict[Epoch, _Pipeline] = {}

    async def __call__(self, assignment: StageAssignment, client: WorkerClient) -> LoadDone:
        """Load a stage; the client's streams name its span as their parent from now on."""
        pipeline = self._pipelines.get(assignment.epoch)
        if pipeline is None:
            pipeline = self._pipelines[assignment.epoch] = _Pipeline(self._begin(assignment))
        pipeline.num_open += 1
        span = self._tracer.start_span(
            f"load stage {assignment.stage_index}",
            context=below(pipeline.span),
            kind=SpanKind.CLIENT,
            attributes=_stage_attributes(assignment),
        )
        client.trace_parent = trace_parent_of(span)
        try:
            with _ending(span):
                return await self._load(assignment, client)
        finally:
            pipeline.num_open -= 1
            if not pipeline.num_open:
                pipeline.span.end()
                del self._pipelines[assignment.epoch]

    def _begin(self, assignment: StageAssignment) -> Span:
        return self._tracer.start_span(
            f"load {self._model}",
            context=otel_context.Context(),
            attributes={
                "gen_ai.request.model": self._model,
                "shardwright.epoch": assignment.epoch,
                "shardwright.stages": assignment.num_stages,
            },
        )


class TracedService:
    """A worker's service whose loads are traced; everything else is the service's own."""

    def __init__(self, service: WorkerService, spans: Spans) -> None:
        self._service = service
        self._tracer = spans.tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    async def initialize_worker(self, incoming: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        """Take a stage, as the service does, with a span for it and one for each part of the way."""
        parts = _Parts(self._tracer)

        async def looked_at() -> AsyncIterator[LoadMessage]:
            async for message in incoming:
                if isinstance(message, LoadBegin):
                    parts.begin(message.load.assignment)
                yield message

        try:
            async with aclosing(cast("Any", self._service.initialize_worker(looked_at()))) as replies:
                async for reply in replies:
                    parts.reply(reply)
                    yield reply
        finally:
            parts.end()


class _Parts:
    """The spans of one load at the worker: the whole, and receiving and building below it."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._whole: Span | None = None
        self._part: Span | None = None
        self._phase = ""
        self._is_done = False

    def begin(self, assignment: StageAssignment) -> None:
        """The assignment came."""
        self._whole = self._tracer.start_span(
            "take in stage",
            context=remote_context(incoming_trace_parent()),
            kind=SpanKind.SERVER,
            attributes=_stage_attributes(assignment),
        )

    def reply(self, reply: LoadReply) -> None:
        """The worker told how far it is."""
        if self._whole is None:
            return
        match reply:
            case LoadProgress():
                if reply.phase != self._phase:
                    self._end_part()
                    self._phase = reply.phase
                    self._part = self._tracer.start_span(reply.phase, context=below(self._whole))
                if self._part is not None:
                    self._part.set_attribute("shardwright.bytes", reply.total_bytes)
            case LoadDone():
                self._is_done = True
                self._whole.set_attribute("shardwright.weight_bytes", reply.weight_bytes)
                self._whole.set_attribute("shardwright.kv_bytes", reply.kv_bytes)
            case LoadRefused():
                self._is_done = True
                fail(self._whole, "refused", reply.reason)
            case _:
                pass  # what it asks the master for

    def end(self) -> None:
        """The call is over."""
        self._end_part()
        if self._whole is not None:
            if not self._is_done:
                fail(self._whole, "interrupted", "the call ended before the stage was built")
            self._whole.end()

    def _end_part(self) -> None:
        if self._part is not None:
            self._part.end()
            self._part = None


def _stage_attributes(assignment: StageAssignment) -> dict[str, str | int]:
    return {
        "shardwright.epoch": assignment.epoch,
        "shardwright.worker": assignment.worker_id,
        "shardwright.stage": assignment.stage_index,
        "shardwright.layers": str(assignment.layers),
    }


@contextlib.contextmanager
def _ending(span: Span) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        fail(span, type(exc).__name__, str(exc))
        raise
    finally:
        span.end()


def traced(service: WorkerService, spans: Spans) -> WorkerService:
    """The service with its loads traced."""
    return cast("WorkerService", TracedService(service, spans))
