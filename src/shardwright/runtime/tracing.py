"""Whether this process makes traces, and everything that does. Imports nothing of OpenTelemetry while they are off.

`MasterConfig.otlp_endpoint` and `WorkerConfig.otlp_endpoint` turn them on: an OTLP collector's address, spoken to over
gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from shardwright.errors import ConfigError

if TYPE_CHECKING:
    from shardwright.runtime.observatory import MasterObservatory
    from shardwright.runtime.otel_export import Spans
    from shardwright.runtime.otel_http import App
    from shardwright.runtime.otel_loads import StageLoader
    from shardwright.transport.base import WorkerService
    from shardwright.types import SeqId, StageAssignment


class RequestTracer(Protocol):
    """Hears of a master's sequences, on its event loop, with the time of day by the master's clock."""

    def begin(self, seq_id: SeqId, now: float) -> str:
        """A sequence was queued by the running task; gives its trace's id, empty where nothing of it is kept."""
        ...

    def end(self, seq_id: SeqId, now: float) -> None:
        """The sequence is over; one that never began is ignored."""
        ...

    def refuse(self, seq_id: SeqId, now: float) -> None:
        """The queue was full: the sequence was not taken."""
        ...


class MasterTracing:
    """A master's traces: of its requests, over HTTP or not, and of loading its pipelines."""

    def __init__(self, spans: Spans, *, model: str) -> None:
        from shardwright.runtime.otel_export import wall_clock
        from shardwright.runtime.otel_requests import RequestTracing

        self._spans = spans
        self._model = model
        self._clock: Callable[[], float] = wall_clock
        self._requests = RequestTracing(spans, model=model)
        self._task: asyncio.Task[None] | None = None

    def loader(self, load: StageLoader) -> StageLoader:
        """The same loader, with spans."""
        from shardwright.runtime.otel_loads import LoadTracing

        return LoadTracing(self._spans, load, model=self._model)

    def http(self, app: App, *, model: str) -> App:
        """The same application, with a span for each request for an answer; clients call the model by this name."""
        from shardwright.runtime.otel_http import HttpTracing

        return HttpTracing(app, self._spans, model=model, clock=self._clock)

    def watch(self, observatory: MasterObservatory, stages: Callable[[], Sequence[StageAssignment]]) -> None:
        """Have the sequences traced that come from now on, out of what the observatory tells; once."""
        assert self._task is None, "one master's"
        self._clock = observatory.now
        self._requests.watch(observatory, stages, observatory.now)
        observatory.trace_with(self._requests)
        self._task = asyncio.create_task(self._requests.run(), name="traces")

    async def close(self) -> None:
        """Make the spans of what is left, as far as it is known, and send them."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self._requests.collect(is_last=True)
        await self._spans.close()


@contextlib.asynccontextmanager
async def master_tracing(endpoint: str, *, model: str) -> AsyncIterator[MasterTracing | None]:
    """The master's traces while the block lasts; None without an endpoint.

    Raises `ConfigError` where OpenTelemetry is not installed.
    """
    if not endpoint:
        yield None
        return
    tracing = MasterTracing(_spans(endpoint, service="shardwright-master"), model=model)
    try:
        yield tracing
    finally:
        await tracing.close()


@contextlib.asynccontextmanager
async def traced_service(endpoint: str, service: WorkerService) -> AsyncIterator[WorkerService]:
    """A worker's service with its loads traced; the service itself without an endpoint.

    Raises `ConfigError` where OpenTelemetry is not installed.
    """
    if not endpoint:
        yield service
        return
    spans = _spans(endpoint, service="shardwright-worker")
    from shardwright.runtime.otel_loads import traced

    try:
        yield traced(service, spans)
    finally:
        await spans.close()


def check_installed(endpoint: str) -> None:
    """Raises `ConfigError` where traces were asked for and OpenTelemetry is not installed; starts nothing."""
    if endpoint:
        _import_spans(endpoint)


def _spans(endpoint: str, *, service: str) -> Spans:
    return _import_spans(endpoint).to_collector(endpoint, service=service)


def _import_spans(endpoint: str) -> type[Spans]:
    try:
        from shardwright.runtime.otel_export import Spans
    except ImportError as exc:
        raise ConfigError(
            f"traces were asked for (otlp_endpoint is {endpoint}), but {exc.name or 'opentelemetry'} is not installed: "
            "pip install 'shardwright[otel]', or leave the setting (and OTEL_EXPORTER_OTLP_ENDPOINT) out"
        ) from exc
    return Spans
