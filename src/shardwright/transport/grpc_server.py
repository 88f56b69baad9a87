"""A worker's service behind a grpc.aio server: calls in, the service's answers and errors out."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shardwright.errors import (
    AddressInUseError,
    ConfigError,
    ProtocolError,
    ShardwrightError,
    UserError,
    VersionMismatchError,
)
from shardwright.transport import carried_errors, grpc_options
from shardwright.transport.address import join_address, split_address
from shardwright.transport.base import WorkerService
from shardwright.transport.grpc_options import ERROR_KEY, PROTOCOL_KEY, PROTOCOL_METADATA, SERVICE_NAME
from shardwright.transport.streams import Incoming, closing, whole
from shardwright.transport.trace_context import take_trace_parent
from shardwright.types import PROTOCOL_VERSION
from shardwright.wire import load_codec, measure_codec, report_codec, result_codec, step_codec
from shardwright.wire.limits import WireLimits
from shardwright.wire.messages import LoadMessage, StepMessage

Reply = TypeVar("Reply")
CLEANUP_S: Final = 5.0  # for handlers to run their `finally` after the server has stopped


class _Handlers:
    """The methods of the service as gRPC calls them; knows the tasks that run them."""

    def __init__(self, service: WorkerService, limits: WireLimits) -> None:
        self._service = service
        self._limits = limits
        self._tasks: set[asyncio.Task[Any]] = set()

    def table(self) -> Any:
        """Every method of the service; messages pass as bytes, and the codec reads them here."""
        one = grpc.unary_unary_rpc_method_handler
        both = grpc.stream_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": one(self._unary(self._describe)),
                "InitializeWorker": both(self._initialize_worker),
                "ProcessLayers": both(self._process_layers),
                "ProcessLayer": one(self._unary(self._process_layer)),
                "Tokens": grpc.unary_stream_rpc_method_handler(self._tokens),
                "Heartbeat": one(self._unary(self._heartbeat)),
                "Release": one(self._unary(self._release)),
                "Ping": one(self._unary(self._ping)),
                "MeasureMachine": one(self._unary(self._measure_machine)),
                "MeasureLink": one(self._unary(self._measure_link)),
            },
        )

    async def finished(self) -> None:
        """Wait until no handler runs any more. Call after the server has stopped."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLEANUP_S)

    async def _describe(self, _request: bytes) -> bytes:
        return report_codec.encode_description(await self._service.describe())

    async def _heartbeat(self, request: bytes) -> bytes:
        traces_since = report_codec.decode_heartbeat_request(request)
        return report_codec.encode_report(await self._service.heartbeat(traces_since))

    async def _release(self, request: bytes) -> bytes:
        await self._service.release(report_codec.decode_release_request(request))
        return report_codec.EMPTY

    async def _ping(self, request: bytes) -> bytes:
        return measure_codec.encode_ping_reply(await self._service.ping(*measure_codec.decode_ping(request)))

    async def _measure_machine(self, request: bytes) -> bytes:
        dtype = measure_codec.decode_machine_request(request)
        return measure_codec.encode_machine(await self._service.measure_machine(dtype))

    async def _measure_link(self, request: bytes) -> bytes:
        address, sizes = measure_codec.decode_link_request(request)
        return measure_codec.encode_link(await self._service.measure_link(address, sizes))

    async def _process_layer(self, request: bytes) -> bytes:
        result = await self._service.process_layer(step_codec.decode_step(request, self._limits))
        return result_codec.encode_layer_result(result, self._limits)

    async def _initialize_worker(self, _requests: object, context: Any) -> None:
        call = _ServerCall(context, self._tasks)
        incoming: Incoming[LoadMessage] = Incoming(call.read, load_codec.LoadDecoder())
        await call.answer(lambda: self._service.initialize_worker(incoming), whole(load_codec.encode_load_reply))

    async def _process_layers(self, _requests: object, context: Any) -> None:
        call = _ServerCall(context, self._tasks)
        incoming: Incoming[StepMessage] = Incoming(call.read, step_codec.StepDecoder(self._limits))
        await call.answer(lambda: self._service.process_layers(incoming), whole(step_codec.encode_step_reply))

    async def _tokens(self, request: bytes, context: Any) -> None:
        call = _ServerCall(context, self._tasks)
        await call.answer(
            lambda: self._service.tokens(report_codec.decode_tokens_request(request)), result_codec.result_parts
        )

    def _unary(self, method: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(request: bytes, context: Any) -> bytes:
            call = _ServerCall(context, self._tasks)
            try:
                call.check_version()
                return await method(request)
            except ShardwrightError as exc:
                await call.abort(exc)

        return handle


class _ServerCall:
    """One call of a client; made in the task that gRPC runs it in, and registered until that task is done."""

    def __init__(self, context: Any, tasks: set[asyncio.Task[Any]]) -> None:
        self._context = context
        task = asyncio.current_task()
        assert task is not None, "gRPC calls handlers in tasks"
        self._task = task
        self._link_lost = False
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def check_version(self) -> None:
        """Refuse a client that speaks another version of the protocol."""
        theirs = dict(self._context.invocation_metadata()).get(PROTOCOL_KEY)
        if theirs != str(PROTOCOL_VERSION):
            raise VersionMismatchError(
                f"the caller speaks protocol version {theirs or 'unknown'}, this worker version {PROTOCOL_VERSION}; "
                "install the same version of Shardwright on every machine"
            )

    async def read(self) -> bytes | None:
        """The next part, None when nothing more comes, be it that the client is gone."""
        try:
            raw = await self._context.read()
        except asyncio.CancelledError:
            if asyncio.current_task() is not self._task:
                raise  # a task of the service's own, cancelled by the service
            self._task.uncancel()  # gRPC cancels the handler when the client is gone; the service learns it from here
            self._link_lost = True
            return None
        except grpc.aio.BaseError:
            return None  # read after the call was over
        return None if raw is grpc.aio.EOF else bytes(raw)

    async def answer(
        self, replies_of: Callable[[], AsyncIterator[Reply]], to_parts: Callable[[Reply], Iterable[bytes]]
    ) -> None:
        """Run the service's side of a stream to its end, and close it whatever happens."""
        try:
            self.check_version()
            take_trace_parent(dict(self._context.invocation_metadata()))
            await self._context.send_initial_metadata(PROTOCOL_METADATA)  # tells the client that someone is here
            async with closing(replies_of()) as replies:
                async for reply in replies:
                    for part in to_parts(reply):
                        await self._context.write(part)
        except ShardwrightError as exc:
            if self._link_lost:
                raise asyncio.CancelledError from exc  # nobody is there to be told
            await self.abort(exc)
        except grpc.aio.BaseError as exc:
            raise asyncio.CancelledError from exc  # the client went away while something was written
        if self._link_lost:
            raise asyncio.CancelledError

    async def abort(self, error: ShardwrightError) -> NoReturn:
        """End the call with an error of the service."""
        kind, message = carried_errors.to_wire(error)
        code = grpc.StatusCode.INTERNAL
        if isinstance(error, UserError):
            code = grpc.StatusCode.INVALID_ARGUMENT
        elif isinstance(error, ProtocolError | VersionMismatchError):
            code = grpc.StatusCode.FAILED_PRECONDITION
        await self._context.abort(code, message, ((ERROR_KEY, kind),))
        raise AssertionError("gRPC's abort does not return")


class GrpcListener:
    """A listening worker; made by `listen`."""

    def __init__(self, address: str, server: Any, handlers: _Handlers, health_service: Any) -> None:
        self._address = address
        self._server = server
        self._handlers = handlers
        self._health = health_service

    @property
    def address(self) -> str:
        """host:port really bound."""
        return self._address

    async def close(self, *, grace_s: float) -> None:
        """Stop listening; open calls get `grace_s` seconds to end, then their clients see a broken link."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s if grace_s > 0 else None)
        await self._handlers.finished()


async def listen(address: str, service: WorkerService, limits: WireLimits) -> GrpcListener:
    """Serve on host:port (port 0: any free one). Raises `AddressInUseError`, or `ConfigError` for a bad address."""
    host, port = split_address(address)
    ip = await _resolve(host, port)
    server = grpc.aio.server(options=grpc_options.server_options(limits))
    handlers = _Handlers(service, limits)
    server.add_generic_rpc_handlers((handlers.table(),))
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    await health_service.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    try:
        bound = server.add_insecure_port(join_address(ip, port))
    except RuntimeError as exc:
        await server.stop(None)
        raise _why_not_bound(address, ip, port) from exc
    await server.start()
    return GrpcListener(join_address(host, bound), server, handlers, health_service)


async def _resolve(host: str, port: int) -> str:
    """One IP address for the host, IPv4 if it has one: bound whole or not at all, unlike a name that has several."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as exc:
        raise ConfigError(f"can't listen on {join_address(host, port)}: no such host") from exc
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _why_not_bound(address: str, ip: str, port: int) -> ShardwrightError:
    """What a plain socket says of the address, since gRPC does not say why it could not bind."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind((ip, port))
            probe.listen(1)
    except PermissionError:
        return ConfigError(f"can't listen on {address}: this user may not open port {port}; choose one above 1023")
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            return ConfigError(f"can't listen on {address}: {exc.strerror}")
    return AddressInUseError(f"can't listen on {address}: another process has the port; choose another with --port")
