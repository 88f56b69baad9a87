"""Checks on what a peer sent. Each failure is a `ProtocolError` that says what, how much, and the bound."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from shardwright.errors import FrameError, ProtocolError
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import (
    MAX_DIMENSION,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_POSITION,
    MAX_RANK,
    MAX_SLICES,
)

AnyMessage = TypeVar("AnyMessage", bound=Message)

DTYPE_TAGS: Final[dict[str, pb.DType]] = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
    "int64": pb.DTYPE_INT64,
    "int32": pb.DTYPE_INT32,
}
DTYPE_NAMES: Final[dict[int, str]] = {int(tag): name for name, tag in DTYPE_TAGS.items()}


def parse(kind: type[AnyMessage], raw: bytes, *, limit: int = MAX_MESSAGE_BYTES) -> AnyMessage:
    """Read one protobuf message; its length is checked before anything of it is stored."""
    name = kind.DESCRIPTOR.name
    if len(raw) > limit:
        raise ProtocolError(f"{name}: {len(raw)} bytes; a message may hold {limit}")
    try:
        return kind.FromString(raw)
    except DecodeError as exc:
        raise ProtocolError(f"{name}: {len(raw)} bytes that are no such message") from exc


def serialize(message: Message, *, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """Write one protobuf message. Raises `ProtocolError` where the receiver would have to refuse its length."""
    raw: bytes = message.SerializeToString()
    if len(raw) > limit:
        raise ProtocolError(f"{message.DESCRIPTOR.name}: {len(raw)} bytes; a message may hold {limit}")
    return raw


def between(what: str, value: int, low: int, high: int) -> int:
    """The value, if it lies in [low, high]."""
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}; it must lie between {low} and {high}")
    return value


def at_most(what: str, count: int, bound: int) -> int:
    """The count, if it does not exceed the bound."""
    if count > bound:
        raise ProtocolError(f"{what}: {count}, and {bound} is the most")
    return count


def same_length(what: str, num_token_ids: int, num_values: int) -> None:
    """Refuse lists that should have one value for each token id."""
    if num_token_ids != num_values:
        raise ProtocolError(f"{what}: {num_token_ids} token ids, but {num_values} values")


def number(what: str, value: float) -> float:
    """A measured figure: finite and not negative."""
    if not (math.isfinite(value) and value >= 0.0):
        raise ProtocolError(f"{what} is {value}; it must be a finite number, 0 or above")
    return value


def text(what: str, value: str, *, limit: int = MAX_NAME_CHARS, empty: bool = False) -> str:
    """A text of bounded length, not empty unless it may be."""
    if len(value) > limit:
        raise ProtocolError(f"{what}: {len(value)} characters, and {limit} is the most")
    if not value and not empty:
        raise ProtocolError(f"{what} is empty")
    return value


def sha256(what: str, value: bytes) -> str:
    """A content hash as lower-case hex."""
    if len(value) != 32:
        raise ProtocolError(f"{what}: a SHA-256 of {len(value)} bytes; it must have 32")
    return value.hex()


def indices(what: str, values: Iterable[int]) -> tuple[int, ...]:
    """Token or block ids, each below `MAX_POSITION`."""
    result = tuple(values)
    if result and max(result) >= MAX_POSITION:
        raise ProtocolError(f"{what}: {max(result)}; ids must be below {MAX_POSITION}")
    return result


def distinct(what: str, values: list[str] | list[int]) -> None:
    """Refuse a list that names something twice."""
    if len(set(values)) == len(values):
        return
    seen: set[str | int] = set()
    for value in values:
        if value in seen:
            raise ProtocolError(f"{what} {value!r} comes twice")
        seen.add(value)


def shape(what: str, dimensions: Iterable[int]) -> tuple[int, ...]:
    """A tensor's shape of bounded rank and extents. Raises `FrameError`."""
    result = tuple(dimensions)
    if len(result) > MAX_RANK:
        raise FrameError(f"{what}: {len(result)} dimensions, and {MAX_RANK} is the most")
    if any(extent > MAX_DIMENSION for extent in result):
        raise FrameError(f"{what}: shape {list(result)}; no dimension may exceed {MAX_DIMENSION}")
    return result


def num_slices(what: str, count: int) -> int:
    """A count of sequences in one step."""
    return at_most(what, count, MAX_SLICES)
