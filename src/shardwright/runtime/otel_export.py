"""Makes a process's spans by OpenTelemetry's SDK and has them sent to a collector.

Only the modules `otel_*` import opentelemetry, and `runtime/tracing.py` imports them when traces are asked for. Spans
wait in a bounded queue for a thread that sends them: a collector that is slow or gone loses spans and holds up nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import shardwright

log = logging.getLogger(__name__)

CLOSE_S: Final = 3.0  # for the spans that are left, when the process ends

_PROPAGATOR: Final = TraceContextTextMapPropagator()


def wall_clock() -> float:
    """Seconds since 1970."""
    return time.time_ns() / 1e9


def nanoseconds(seconds: float) -> int:
    """As the SDK takes times."""
    return int(seconds * 1e9)


def below(span: Span) -> otel_context.Context:
    """The context of a span's children."""
    return otel.set_span_in_context(span, otel_context.Context())


def trace_parent_of(span: Span) -> str:
    """How others name the span as their parent: W3C's `traceparent`."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, below(span))
    return carrier.get("traceparent", "")


def remote_context(trace_parent: str, trace_state: str = "") -> otel_context.Context:
    """The context of children of another process's span; an empty one for what is no `traceparent`."""
    carrier = {"traceparent": trace_parent} | ({"tracestate": trace_state} if trace_state else {})
    return _PROPAGATOR.extract(carrier, otel_context.Context())


def fail(span: Span, kind: str, message: str) -> None:
    """Mark a span as that of something that went wrong; `kind` is one of few words."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, message))


class CountingExporter(SpanExporter):
    """Hands spans on and says once when they can't be sent, and once when they can again."""

    def __init__(self, exporter: SpanExporter, collector: str) -> None:
        self._exporter = exporter
        self._collector = collector
        self._is_failing = False
        self._is_over = False
        self.num_sent = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; called on the SDK's thread."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self.num_sent += len(spans)
            if self._is_failing:
                log.warning("traces are sent to %s again", self._collector)
        elif not self._is_failing:
            log.warning(
                "traces can't be sent to %s: %s; they are lost until it answers, and nothing else is held up by that",
                self._collector,
                _EXPORTER_WORDS.last or "no reason given",
            )
        self._is_failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        """Send no more; what is being sent is given up. May be called twice."""
        if not self._is_over:
            self._is_over = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing waits here."""
        return self._exporter.force_flush(timeout_millis)


class _ExporterWords(logging.Filter):
    """Keeps what the SDK's exporter says of each of its attempts out of the log; the last is told by who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.last = record.getMessage()
        return log.isEnabledFor(logging.DEBUG)


_EXPORTER_WORDS = _ExporterWords()


class _CountingProcessor(BatchSpanProcessor):
    """The SDK's bounded queue with its thread, counting what is put in."""

    def __init__(self, exporter: SpanExporter) -> None:
        super().__init__(exporter)
        self.num_ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        self.num_ended += 1
        super().on_end(span)


class Spans:
    """Makes a process's spans and has them sent; close it at the end."""

    def __init__(self, exporter: SpanExporter, *, service: str, collector: str) -> None:
        words = {"service.name": service, "service.version": shardwright.__version__}
        # What the environment says of the service goes before.
        resource = Resource(words).merge(OTELResourceDetector().detect())
        self._collector = collector
        self._exporter = CountingExporter(exporter, collector)
        self._processor = _CountingProcessor(self._exporter)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self.tracer = self._provider.get_tracer("shardwright", shardwright.__version__)

    @classmethod
    def to_collector(cls, endpoint: str, *, service: str) -> Spans:
        """Spans that go to an OTLP collector over gRPC; waits for nothing."""
        for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"):
            logging.getLogger(name).addFilter(_EXPORTER_WORDS)
        return cls(OTLPSpanExporter(endpoint=endpoint), service=service, collector=endpoint)

    def flush(self) -> None:
        """Send what waits, now; blocks."""
        self._processor.force_flush()

    @property
    def num_lost(self) -> int:
        """Spans that were made and never arrived; exact once closed."""
        return self._processor.num_ended - self._exporter.num_sent

    async def close(self) -> None:
        """Send what is left, for `CLOSE_S` at most, and end the thread."""
        # Not one of the loop's own helper threads: the process would wait for that to the end.
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop did not wait
                loop.call_soon_threadsafe(ended.set)

        thread = threading.Thread(target=shut_down, name="end of traces", daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await ended.wait()
        except TimeoutError:
            self._exporter.shutdown()  # breaks off what is being sent, so that the threads end
            await asyncio.to_thread(thread.join, CLOSE_S)
        if self.num_lost:
            log.warning("%d spans of traces were not sent to %s", self.num_lost, self._collector)
