"""Carries a worker's error to the other side of the network: its kind by name, and its message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shardwright.errors import ClusterError, ShardwrightError, WorkerUnreachableError

MAX_HEADER_BYTES: Final = 6000  # of a message; gRPC drops calls whose headers exceed 8 KiB


def _kinds(root: type[ShardwrightError]) -> Iterator[type[ShardwrightError]]:
    """The tree of `errors`, without what other modules may have derived from it."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == ShardwrightError.__module__:
            yield from _kinds(child)


KINDS: Final[dict[str, type[ShardwrightError]]] = {kind.__name__: kind for kind in _kinds(ShardwrightError)}


def to_wire(error: ShardwrightError) -> tuple[str, str]:
    """Kind and message. A kind that is not in `errors` travels as its nearest ancestor there."""
    kind = next(base.__name__ for base in type(error).__mro__ if base in KINDS.values())
    return kind, _fit(str(error).encode(errors="replace").decode())


def _fit(message: str) -> str:
    """As much of a message as fits in a header, where every byte that is not printable ASCII takes three."""
    size = 0
    for index, char in enumerate(message):
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if size > MAX_HEADER_BYTES:
            return message[:index]
    return message


def from_wire(kind: str, message: str) -> ShardwrightError:
    """The same error on this side; a kind that this side does not know is a `ClusterError`."""
    return KINDS.get(kind, ClusterError)(message)


def worker_failed(address: str, details: str) -> ClusterError:
    """A worker's bug: it raised what it should not have."""
    return ClusterError(f"the worker at {address} failed: {details}")


def unreachable(address: str, details: str) -> WorkerUnreachableError:
    """Nobody answers at an address."""
    return WorkerUnreachableError(
        f"no answer from worker at {address}: {details}; is `shardwright worker` running there?"
    )


def too_late(address: str, timeout_s: float) -> WorkerUnreachableError:
    """Nobody answered in time."""
    return WorkerUnreachableError(
        f"no answer from worker at {address} within {timeout_s:g} s; is it overloaded, or the network down?"
    )
