"""The transport inside one process: for tests, and to run a split model without sockets.

Messages pass through the same codec as over gRPC, so the same limits and the same errors hold; lanes are bounded, so
a slow reader holds up its sender as it would over a network. `delay_s`, `cut` and `stall` make the network bad.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final, TypeVar

from shardwright.errors import AddressInUseError, LinkLostError, ShardwrightError
from shardwright.transport import carried_errors
from shardwright.transport.address import join_address, split_address
from shardwright.transport.base import Listener, WorkerClient, WorkerService
from shardwright.transport.streams import Incoming, closing, failure_of, send_all, stop, whole
from shardwright.transport.trace_context import take_trace_parent, trace_metadata
from shardwright.types import Epoch, HeartbeatReport, LinkMeasures, MachineMeasures, WorkerDescription
from shardwright.wire import load_codec, measure_codec, report_codec, result_codec, step_codec
from shardwright.wire.limits import DEFAULT_MAX_FRAME_BYTES, WireLimits
from shardwright.wire.messages import LayerResult, LoadMessage, LoadReply, StepMessage, StepReply, StepResult

Sent = TypeVar("Sent")
Received = TypeVar("Received")

LANE_PARTS: Final = 8  # parts in flight in one direction of a call; the next has to wait
CLEANUP_S: Final = 5.0  # for handlers to run their `finally` after their calls broke
_FIRST_PORT: Final = 40000

logger = logging.getLogger(__name__)


class MemoryTransport:
    """Addresses of one process. Each instance is a network of its own."""

    def __init__(self, *, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES, delay_s: float = 0.0) -> None:
        self.limits = WireLimits(max_frame_bytes=max_frame_bytes)
        self.delay_s = delay_s  # each part's way through a lane; may be changed at any time
        self._listeners: dict[str, MemoryListener] = {}
        self._cut: set[str] = set()
        self._stalled: set[str] = set()
        self._calls: set[_Call] = set()
        self._next_port = _FIRST_PORT

    def connect(self, address: str) -> WorkerClient:
        """A client for host:port."""
        split_address(address)
        return MemoryClient(address, self)

    async def serve(self, address: str, service: WorkerService) -> Listener:
        """Listen on host:port. Raises `AddressInUseError` when somebody else listens there."""
        host, port = split_address(address)
        if port == 0:
            port, self._next_port = self._next_port, self._next_port + 1
        bound = join_address(host, port)
        if bound in self._listeners:
            raise AddressInUseError(f"can't listen on {bound}: another worker of this network has the port")
        listener = MemoryListener(bound, self, service)
        self._listeners[bound] = listener
        return listener

    def cut(self, address: str) -> None:
        """Break every open call to the address, and let nobody reach it until `mend`."""
        self._cut.add(address)
        for call in [call for call in self._calls if call.address == address]:
            call.break_off("the network was cut")

    def mend(self, address: str) -> None:
        """Let the address be reached again."""
        self._cut.discard(address)

    def stall(self, address: str) -> None:
        """Hold up everything to and from the address, without any error, until `resume`."""
        self._stalled.add(address)

    def resume(self, address: str) -> None:
        """Let what was held up go on."""
        self._stalled.discard(address)
        for call in self._calls:
            call.wake()

    def is_stalled(self, address: str) -> bool:
        """Whether nothing moves to or from the address."""
        return address in self._stalled

    def open_call(self, address: str, method: str, trace_parent: str = "") -> _Call:
        """Start a call. Raises `WorkerUnreachableError` when nobody listens."""
        listener = self._listeners.get(address)
        if listener is None or address in self._cut:
            raise carried_errors.unreachable(address, "nobody listens" if listener is None else "the network is cut")
        call = _Call(address, self, trace_parent)
        self._calls.add(call)
        listener.accept(call, method)
        return call

    def forget_call(self, call: _Call) -> None:
        """The call is over."""
        self._calls.discard(call)

    def forget_listener(self, address: str) -> None:
        """Nobody listens there any more."""
        self._listeners.pop(address, None)


class _Lane:
    """One direction of a call: parts in order, late by the network's delay, and only so many at once."""

    def __init__(self, address: str, network: MemoryTransport) -> None:
        self._address = address
        self._network = network
        self._parts: deque[tuple[float, bytes | None]] = deque()
        self._changed = asyncio.Event()
        self.broken = False

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._changed.set()

    def break_off(self) -> None:
        """Lose what is under way and everything that follows."""
        self.broken = True
        self._parts.clear()
        self.wake()

    async def put(self, part: bytes | None) -> None:
        """Send a part (None: the last one has been sent) as soon as there is room. Raises `LinkLostError`."""
        while not self.broken and len(self._parts) >= LANE_PARTS:
            await self._wait(None)
        if self.broken:
            raise LinkLostError(f"the link with the worker at {self._address} broke")
        self._parts.append((asyncio.get_running_loop().time() + self._network.delay_s, part))
        self.wake()

    async def get(self) -> bytes | None:
        """The next part once it has arrived; None at the end and on a broken lane."""
        while not self.broken:
            if not self._parts or self._network.is_stalled(self._address):
                await self._wait(None)
                continue
            due, part = self._parts[0]
            remaining = due - asyncio.get_running_loop().time()
            if remaining > 0:
                await self._wait(remaining)
                continue
            self._parts.popleft()
            self.wake()
            return part
        return None

    async def _wait(self, limit_s: float | None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._changed.wait()


class _Call:
    """One call: a lane each way, and how it ended."""

    def __init__(self, address: str, network: MemoryTransport, trace_parent: str) -> None:
        self.address = address
        self.trace_parent = trace_parent
        self.up = _Lane(address, network)
        self.down = _Lane(address, network)
        self.error: tuple[str, str] | None = None  # kind and message, as the worker raised it
        self.failure = ""  # what the worker should not have raised
        self.broken_by = ""
        self.handler: asyncio.Task[None] | None = None
        self._network = network

    def wake(self) -> None:
        """Let both lanes look again."""
        self.up.wake()
        self.down.wake()

    def break_off(self, reason: str) -> None:
        """Break both lanes; the worker's handler is cancelled as gRPC does it."""
        self.broken_by = self.broken_by or reason
        self.up.break_off()
        self.down.break_off()
        if self.handler is not None and not self.handler.done():
            self.handler.cancel()
        self._network.forget_call(self)

    async def receive(self) -> bytes | None:
        """The worker's next part, None at a good end. Raises what the worker raised, or `LinkLostError`."""
        part = await self.down.get()
        if part is not None:
            return part
        if self.down.broken:
            raise LinkLostError(f"the link to the worker at {self.address} broke: {self.broken_by}")
        if self.error is not None:
            raise carried_errors.from_wire(*self.error)
        if self.failure:
            raise carried_errors.worker_failed(self.address, self.failure)
        return None


class MemoryListener:
    """A worker that listens in this process."""

    def __init__(self, address: str, network: MemoryTransport, service: WorkerService) -> None:
        self._address = address
        self._network = network
        self._service = service
        self._open: dict[asyncio.Task[None], _Call] = {}

    @property
    def address(self) -> str:
        """host:port."""
        return self._address

    async def close(self, *, grace_s: float) -> None:
        """Stop listening; open calls get `grace_s` seconds to end, then break."""
        self._network.forget_listener(self._address)
        if self._open and grace_s > 0:
            await asyncio.wait(self._open, timeout=grace_s)
        for call in list(self._open.values()):
            call.break_off("the worker stopped")
        if self._open:
            await asyncio.wait(self._open, timeout=CLEANUP_S)

    def accept(self, call: _Call, method: str) -> None:
        """Run the service's side of a call."""
        task = asyncio.create_task(self._handle(call, method), name=f"{method} at {self._address}")
        call.handler = task
        self._open[task] = call
        task.add_done_callback(self._open.pop)

    async def _handle(self, call: _Call, method: str) -> None:
        take_trace_parent(dict(trace_metadata(call.trace_parent)))
        try:
            await self._run(call, method)
        except ShardwrightError as exc:
            call.error = carried_errors.to_wire(exc)
        except Exception as exc:  # the top of a task: a bug in the service ends the call, with a trace in the log
            logger.exception("%s failed", method)
            call.failure = f"{type(exc).__name__}: {exc}"
        finally:
            with suppress(asyncio.CancelledError, LinkLostError):
                await call.down.put(None)

    async def _run(self, call: _Call, method: str) -> None:
        service, limits = self._service, self._network.limits
        match method:
            case "InitializeWorker":
                loading: Incoming[LoadMessage] = Incoming(_reader(call), load_codec.LoadDecoder())
                await _answer(call, service.initialize_worker(loading), whole(load_codec.encode_load_reply))
            case "ProcessLayers":
                steps: Incoming[StepMessage] = Incoming(_reader(call), step_codec.StepDecoder(limits))
                await _answer(call, service.process_layers(steps), whole(step_codec.encode_step_reply))
            case "Tokens":
                epoch = report_codec.decode_tokens_request(await _request(call))
                await _answer(call, service.tokens(epoch), result_codec.result_parts)
            case "Describe":
                await _request(call)
                await call.down.put(report_codec.encode_description(await service.describe()))
            case "Heartbeat":
                traces_since = report_codec.decode_heartbeat_request(await _request(call))
                await call.down.put(report_codec.encode_report(await service.heartbeat(traces_since)))
            case "Release":
                await service.release(report_codec.decode_release_request(await _request(call)))
                await call.down.put(report_codec.EMPTY)
            case "Ping":
                pinged = await service.ping(*measure_codec.decode_ping(await _request(call)))
                await call.down.put(measure_codec.encode_ping_reply(pinged))
            case "MeasureMachine":
                machine = await service.measure_machine(measure_codec.decode_machine_request(await _request(call)))
                await call.down.put(measure_codec.encode_machine(machine))
            case "MeasureLink":
                link = await service.measure_link(*measure_codec.decode_link_request(await _request(call)))
                await call.down.put(measure_codec.encode_link(link))
            case "ProcessLayer":
                result = await service.process_layer(step_codec.decode_step(await _request(call), limits))
                await call.down.put(result_codec.encode_layer_result(result, limits))
            case _:
                raise AssertionError(f"no method {method}")


async def _request(call: _Call) -> bytes:
    request = await call.up.get()
    if request is None:
        raise asyncio.CancelledError  # the client gave up before it had asked
    return request


def _reader(call: _Call) -> Callable[[], Awaitable[bytes | None]]:
    """The incoming side of a call; when the client is gone the reading handler learns it from here, as with gRPC."""

    async def read() -> bytes | None:
        try:
            return await call.up.get()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task is not call.handler or not call.broken_by:
                raise
            task.uncancel()
            return None

    return read


async def _answer(call: _Call, replies: AsyncIterator[Sent], to_parts: Callable[[Sent], Iterable[bytes]]) -> None:
    async with closing(replies):
        async for reply in replies:
            for part in to_parts(reply):
                await call.down.put(part)


class MemoryClient:
    """One worker of this process, spoken to."""

    def __init__(self, address: str, network: MemoryTransport) -> None:
        self.trace_parent = ""
        self._address = address
        self._network = network
        self._calls: set[_Call] = set()
        self._closed = False

    @property
    def address(self) -> str:
        """host:port."""
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
        request = step_codec.encode_step(message, self._network.limits)
        raw = await self._ask("ProcessLayer", request, timeout_s)
        return result_codec.decode_layer_result(raw, self._network.limits)

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
        call = self._open("Tokens", self.trace_parent)
        try:
            await call.up.put(report_codec.encode_tokens_request(epoch))
            decoder = result_codec.ResultDecoder()
            while (raw := await call.receive()) is not None:
                result = decoder.feed(raw)
                if result is not None:
                    yield result
        finally:
            self._end(call)

    async def close(self) -> None:
        """Open streams end with `LinkLostError`. May be called twice."""
        self._closed = True
        for call in list(self._calls):
            call.break_off("the connection was closed")

    async def _ask(self, method: str, request: bytes, timeout_s: float) -> bytes:
        call = self._open(method)
        try:
            async with asyncio.timeout(timeout_s):
                await call.up.put(request)
                answer = await call.receive()
        except TimeoutError as exc:
            raise carried_errors.too_late(self._address, timeout_s) from exc
        finally:
            self._end(call)
        assert answer is not None, "a unary call has one answer or an error"
        return answer

    async def _exchange(
        self,
        method: str,
        outgoing: AsyncIterator[Sent],
        to_parts: Callable[[Sent], Iterable[bytes]],
        end: bytes,
        decode: Callable[[bytes], Received],
    ) -> AsyncIterator[Received]:
        """One bidirectional call. A task sends while the caller reads; it lives as long as this generator."""
        call = self._open(method, self.trace_parent)

        async def send() -> None:
            try:
                await send_all(outgoing, to_parts, call.up.put)
                await call.up.put(end)
                await call.up.put(None)
            except BaseException:
                call.break_off("what was to be sent could not be")  # wakes the reader, which raises what is raised here
                raise

        sender = asyncio.create_task(send(), name=f"{method} to {self._address}")
        try:
            while (raw := await call.receive()) is not None:
                yield decode(raw)
        except LinkLostError:
            failure = failure_of(sender)
            if failure is not None and not isinstance(failure, LinkLostError):
                raise failure from None  # what was to be sent could not be
            raise
        finally:
            self._end(call)
            await stop(sender)

    def _open(self, method: str, trace_parent: str = "") -> _Call:
        if self._closed:
            raise LinkLostError(f"the connection to the worker at {self._address} was closed")
        call = self._network.open_call(self._address, method, trace_parent)
        self._calls.add(call)
        return call

    def _end(self, call: _Call) -> None:
        """The client is done with a call, whether the worker is or not."""
        self._calls.discard(call)
        call.break_off("the client is gone")
