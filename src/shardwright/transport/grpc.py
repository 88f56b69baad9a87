"""The transport between machines: grpc.aio, one persistent HTTP/2 connection per client."""

from __future__ import annotations

from shardwright.transport.base import Listener, WorkerClient, WorkerService
from shardwright.transport.grpc_client import GrpcClient
from shardwright.transport.grpc_server import listen
from shardwright.wire.limits import DEFAULT_MAX_FRAME_BYTES, WireLimits


class GrpcTransport:
    """Reaches workers, and is one, over gRPC. All tensors of a step together may hold `max_frame_bytes`."""

    def __init__(self, *, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> None:
        self._limits = WireLimits(max_frame_bytes=max_frame_bytes)

    def connect(self, address: str) -> WorkerClient:
        """A client for host:port; call inside a running event loop. Raises `ConfigError` for what is no address."""
        return GrpcClient(address, self._limits)

    async def serve(self, address: str, service: WorkerService) -> Listener:
        """Listen on host:port. Raises `AddressInUseError`, or `ConfigError` where the address can't be had."""
        return await listen(address, service, self._limits)
