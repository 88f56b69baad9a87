"""A worker's client over grpc.aio: one channel, its calls, and gRPC's errors put into ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc

from shardwright.errors import FrameError, LinkLostError, ShardwrightError, VersionMismatchError
from shardwright.transport import carried_errors, grpc_options
from shardwright.transport.grpc_options import ERROR_KEY, PROTOCOL_KEY, PROTOCOL_METADATA, method_path
from shardwright.transport.streams import failure_of, send_all, stop
from shardwright.transport.trace_context import trace_metadata
from shardwright.types import Epoch, HeartbeatReport, LinkMeasures, MachineMeasures, WorkerDescription
from shardwright.wire import load_codec, measure_codec, report_codec, result_codec, step_codec
from shardwright.wire.limits import WireLimits
from shardwright.wire.messages import LayerResult, LoadMessage, LoadReply, StepMessage, StepReply, StepResult

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class GrpcClient:
    """One worker, spoken to over a channel of its own."""

    def __init__(self, address: str, limits: WireLimits) -> None:
        self.trace_parent = ""
        self._address = address
        self._limits = limits
        self._channel: Any = grpc.aio.insecure_channel(
            grpc_options.target(address), options=grpc_options.channel_options(limits)
        )
        self._closed = False

    @property
    def address(self) -> str:
        """host:port, as connected to."""
        return self._address

    async def describe(self, *, timeout_s: float) -> WorkerDescription:
        """Ask who the worker is."""
        return report_codec.decode_description(await self._ask("Describe", report_codec.EMPTY, timeout_s))

    async def heartbeat(self, *, timeout_s: float, traces_since: int | None = None) -> HeartbeatReport:
        """Ask for the worker's state; with traces and timings if `traces_since` is a number."""
        request = report_codec.encode_heartbeat_request(traces_since)
        return report_codec.decode_report(await self._ask("Heartbeat", request, timeout_s))

    async def release(self, epoch: Epoch, *, timeout_s: float) -> None:
        """Have the stage of this epoch dropped."""
        await self._ask("Release", report_codec.encode_release_request(epoch), timeout_s)

    async def ping(self, data: bytes, *, reply_bytes: int, timeout_s: float) -> bytes:
        """Send `data` and get so many bytes back."""
        raw = await self._ask("Ping", measure_codec.encode_ping(data, reply_bytes), timeout_s)
        return measure_codec.decode_ping_reply(raw, reply_bytes)

    async def measure_machine(self, dtype: str, *, timeout_s: float) -> MachineMeasures:
        """Have the worker's machine measured."""
        raw = await self._ask("MeasureMachine", measure_codec.encode_machine_request(dtype), timeout_s)
        return measure_codec.decode_machine(raw)

    async def measure_link(self, address: str, sizes: tuple[int, ...], *, timeout_s: float) -> LinkMeasures:
        """Have the way from this worker to another one measured."""
        raw = await self._ask("MeasureLink", measure_codec.encode_link_request(address, sizes), timeout_s)
        return measure_codec.decode_link(raw)

    async def process_layer(self, message: StepMessage, *, timeout_s: float) -> LayerResult:
        """Have one step computed by hand."""
        raw = await self._ask("ProcessLayer", step_codec.encode_step(message, self._limits), timeout_s)
        return result_codec.decode_layer_result(raw, self._limits)

    def initialize_worker(self, outgoing: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        """Give the worker a stage."""
        return self._exchange(
            "InitializeWorker", outgoing, load_codec.load_parts, load_codec.LOAD_END, load_codec.decode_load_reply
        )

    def process_layers(self, outgoing: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        """Open a step link."""
        return self._exchange(
            "ProcessLayers", outgoing, step_codec.step_parts, step_codec.STEP_END, step_codec.decode_step_reply
        )

    async def tokens(self, epoch: Epoch) -> AsyncIterator[StepResult]:
        """Follow the last stage's results."""
        self._check_open()
        call = self._channel.unary_stream(method_path("Tokens"))(
            report_codec.encode_tokens_request(epoch), metadata=self._stream_metadata
        )
        try:
            async for result in self._replies(call, result_codec.ResultDecoder().feed):
                if result is not None:
                    yield result
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the channel; open streams end with `LinkLostError`. May be called twice."""
        self._closed = True
        await self._channel.close()

    async def _ask(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """One unary call."""
        self._check_open()
        call = self._channel.unary_unary(method_path(method))(request, timeout=timeout_s, metadata=PROTOCOL_METADATA)
        return bytes(await self._translated(call, timeout_s=timeout_s))

    async def _exchange(
        self,
        method: str,
        outgoing: AsyncIterator[Sent],
        to_parts: Callable[[Sent], Iterable[bytes]],
        end: bytes,
        decode: Callable[[bytes], Received],
    ) -> AsyncIterator[Received]:
        """One bidirectional call. A task sends while the caller reads; it lives as long as this generator."""
        self._check_open()
        call = self._channel.stream_stream(method_path(method))(metadata=self._stream_metadata)

        async def write(part: bytes) -> None:
            # The public call.write turns a write that fails because the worker has ended the call into an INTERNAL
            # status of its own, and so hides why the worker did: below it, the worker's status stays what it is.
            await call._cython_call.send_serialized_message(part)  # noqa: SLF001

        async def send() -> None:
            try:
                await call.wait_for_connection()
                await send_all(outgoing, to_parts, write)
                await write(end)
                await call.done_writing()
            except (grpc.aio.AioRpcError, grpc.aio.BaseError):
                return  # the call is over; the reader learns why
            except BaseException:
                call.cancel()  # wakes the reader, which raises what is raised here
                raise

        sender = asyncio.create_task(send(), name=f"{method} to {self._address}")
        try:
            async for reply in self._replies(call, decode, sender):
                yield reply
        finally:
            call.cancel()
            await stop(sender)

    async def _replies(
        self, call: Any, decode: Callable[[bytes], Received], sender: asyncio.Task[None] | None = None
    ) -> AsyncIterator[Received]:
        while (raw := await self._translated(call.read(), sender=sender)) is not grpc.aio.EOF:
            yield decode(raw)

    async def _translated(
        self, waiting: Awaitable[Any], *, timeout_s: float = 0.0, sender: asyncio.Task[None] | None = None
    ) -> Any:
        """Wait for gRPC, and raise this project's errors in place of its own."""
        try:
            return await waiting
        except grpc.aio.AioRpcError as exc:
            raise self._translate(exc, timeout_s) from exc
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # someone cancelled the caller
            failure = failure_of(sender) if sender is not None else None
            if failure is not None:
                raise failure from None  # what was to be sent could not be
            raise LinkLostError(f"the connection to the worker at {self._address} was closed") from None

    def _translate(self, exc: Any, timeout_s: float) -> ShardwrightError:
        details = exc.details() or "no details"
        carried = dict(exc.trailing_metadata() or ()).get(ERROR_KEY)
        if carried is not None:
            return carried_errors.from_wire(str(carried), exc.details() or "")
        answered = PROTOCOL_KEY in dict(exc.initial_metadata() or ())
        match exc.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED if timeout_s:
                return carried_errors.too_late(self._address, timeout_s)
            case grpc.StatusCode.UNAVAILABLE if not answered:
                return carried_errors.unreachable(self._address, details)
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
                return LinkLostError(f"the link to the worker at {self._address} broke: {details}")
            case grpc.StatusCode.UNIMPLEMENTED:
                return VersionMismatchError(
                    f"{self._address} answers, but not as a Shardwright worker of this version: {details}; "
                    "another program or another version runs there"
                )
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return FrameError(f"a message to or from the worker at {self._address} is too large: {details}")
            case _:
                return carried_errors.worker_failed(self._address, f"{exc.code().name}: {details}")

    @property
    def _stream_metadata(self) -> tuple[tuple[str, str], ...]:
        return (*PROTOCOL_METADATA, *trace_metadata(self.trace_parent))

    def _check_open(self) -> None:
        if self._closed:
            raise LinkLostError(f"the connection to the worker at {self._address} was closed")
