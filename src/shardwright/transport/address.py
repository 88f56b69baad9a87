"""Reads and writes `host:port`, with IPv6 hosts in brackets."""

from __future__ import annotations

from shardwright.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port. Raises `ConfigError`."""
    host, separator, port_text = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"address {address!r}: an IPv6 host stands in brackets, as in [::1]:50051")
    if not separator or not host or not (port_text.isascii() and port_text.isdigit()):
        raise ConfigError(f"address {address!r} is not host:port, as in 192.168.1.101:50051")
    port = int(port_text)
    if port > 65535:
        raise ConfigError(f"address {address!r}: port {port}; ports end at 65535")
    return host, port


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
