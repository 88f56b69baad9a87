"""gRPC's settings that both sides must agree on: method paths, metadata, message limits, keepalive."""

from __future__ import annotations

from typing import Final

from shardwright.transport.address import join_address, split_address
from shardwright.types import PROTOCOL_VERSION
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import WireLimits

PROTOCOL_KEY: Final = "shardwright-protocol"
ERROR_KEY: Final = "shardwright-error"
PROTOCOL_METADATA: Final = ((PROTOCOL_KEY, str(PROTOCOL_VERSION)),)
SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Worker"].full_name

KEEPALIVE_S: Final = 10
KEEPALIVE_TIMEOUT_S: Final = 5


def method_path(method: str) -> str:
    """The path of a method of the service, `/shardwright.v1.Worker/<method>`."""
    return f"/{SERVICE_NAME}/{method}"


def target(address: str) -> str:
    """The name that gRPC connects to, of host:port. Raises `ConfigError`."""
    host, port = split_address(address)
    return f"dns:///{join_address(host, port)}"


def channel_options(limits: WireLimits) -> list[tuple[str, int]]:
    """For a client. Large messages are for the unary `ProcessLayer` and `Ping`: streams cut theirs into parts."""
    return [
        ("grpc.max_send_message_length", limits.max_received_bytes),
        ("grpc.max_receive_message_length", limits.max_received_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # 60 s otherwise, whatever the line above says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_http_proxy", 0),  # workers are reached directly, whatever the environment says
        ("grpc.use_local_subchannel_pool", 1),  # no connection is shared between clients
        ("grpc.enable_retries", 0),  # a call is tried once: the caller knows what a second try would mean
    ]


def server_options(limits: WireLimits) -> list[tuple[str, int]]:
    """For a worker."""
    return [
        ("grpc.max_send_message_length", limits.max_received_bytes),
        ("grpc.max_receive_message_length", limits.max_received_bytes),
        ("grpc.so_reuseport", 0),  # with it, two workers would share a port without a word
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # 60 s otherwise, whatever the line above says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ]
