"""Pings and measurements: protobuf <-> plain values, checked on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shardwright.errors import ProtocolError
from shardwright.types import LinkMeasures, MachineMeasures
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_MESSAGE_BYTES, MAX_PING_BYTES, MAX_TRANSFER_SIZES

_PING_MESSAGE_BYTES: Final = MAX_PING_BYTES + MAX_MESSAGE_BYTES
MATRIX_DTYPES: Final = ("float32", "bfloat16", "float16")


def encode_ping(data: bytes, reply_bytes: int) -> bytes:
    """Ask for an answer of so many bytes. Raises `ProtocolError` for more than a ping may carry."""
    _check_ping(len(data), reply_bytes)
    return pb.PingRequest(data=data, reply_bytes=reply_bytes).SerializeToString()


def decode_ping(raw: bytes) -> tuple[bytes, int]:
    """Data, and the bytes of the answer that is wished for. Raises `ProtocolError`."""
    source = checks.parse(pb.PingRequest, raw, limit=_PING_MESSAGE_BYTES)
    _check_ping(len(source.data), source.reply_bytes)
    return source.data, source.reply_bytes


def encode_ping_reply(data: bytes) -> bytes:
    """The answer to a ping."""
    return checks.serialize(pb.PingReply(data=data), limit=_PING_MESSAGE_BYTES)


def decode_ping_reply(raw: bytes, reply_bytes: int) -> bytes:
    """Raises `ProtocolError` for another number of bytes than was asked for."""
    data = checks.parse(pb.PingReply, raw, limit=_PING_MESSAGE_BYTES).data
    if len(data) != reply_bytes:
        raise ProtocolError(f"PingReply.data: {len(data)} bytes; {reply_bytes} were asked for")
    return data


def _check_ping(num_bytes: int, reply_bytes: int) -> None:
    checks.at_most("PingRequest.data in bytes", num_bytes, MAX_PING_BYTES)
    checks.between("PingRequest.reply_bytes", reply_bytes, 0, MAX_PING_BYTES)


def encode_machine_request(dtype: str) -> bytes:
    """Ask for the machine to be measured. Raises `ProtocolError` for a dtype that models don't have."""
    return pb.MeasureMachineRequest(dtype=_tag(dtype)).SerializeToString()


def decode_machine_request(raw: bytes) -> str:
    """The dtype of the matrix product. Raises `ProtocolError`."""
    return _dtype("MeasureMachineRequest.dtype", checks.parse(pb.MeasureMachineRequest, raw).dtype)


def encode_machine(measures: MachineMeasures) -> bytes:
    """What the machine can do."""
    message = pb.MachineMeasures(
        dtype=_tag(measures.dtype),
        num_threads=measures.num_threads,
        read_bandwidth=measures.read_bandwidth,
        matrix_rate=measures.matrix_rate,
        disk_bandwidth=measures.disk_bandwidth,
    )
    return checks.serialize(message)


def decode_machine(raw: bytes) -> MachineMeasures:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.MachineMeasures, raw)
    return MachineMeasures(
        dtype=_dtype("MachineMeasures.dtype", source.dtype),
        num_threads=source.num_threads,
        read_bandwidth=checks.number("MachineMeasures.read_bandwidth", source.read_bandwidth),
        matrix_rate=checks.number("MachineMeasures.matrix_rate", source.matrix_rate),
        disk_bandwidth=(
            checks.number("MachineMeasures.disk_bandwidth", source.disk_bandwidth)
            if source.HasField("disk_bandwidth")
            else None
        ),
    )


def encode_link_request(address: str, sizes: Sequence[int]) -> bytes:
    """Ask for the way to a worker to be measured. Raises `ProtocolError` for sizes that a ping can't carry."""
    _check_sizes(sizes)
    return pb.MeasureLinkRequest(address=address, sizes=sizes).SerializeToString()


def decode_link_request(raw: bytes) -> tuple[str, tuple[int, ...]]:
    """The other worker's address, and the sizes to be timed. Raises `ProtocolError`."""
    source = checks.parse(pb.MeasureLinkRequest, raw)
    _check_sizes(source.sizes)
    return checks.text("MeasureLinkRequest.address", source.address), tuple(source.sizes)


def _check_sizes(sizes: Sequence[int]) -> None:
    checks.at_most("MeasureLinkRequest.sizes", len(sizes), MAX_TRANSFER_SIZES)
    for size in sizes:
        checks.between("MeasureLinkRequest.sizes: a size", size, 0, MAX_PING_BYTES)


def encode_link(measures: LinkMeasures) -> bytes:
    """What the way can do."""
    return checks.serialize(
        pb.LinkMeasures(
            round_trip_s=measures.round_trip_s,
            transfers=[pb.Transfer(num_bytes=size, seconds=seconds) for size, seconds in measures.transfers],
        )
    )


def decode_link(raw: bytes) -> LinkMeasures:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.LinkMeasures, raw)
    checks.at_most("LinkMeasures.transfers", len(source.transfers), MAX_TRANSFER_SIZES)
    return LinkMeasures(
        round_trip_s=checks.number("LinkMeasures.round_trip_s", source.round_trip_s),
        transfers=tuple((each.num_bytes, checks.number("Transfer.seconds", each.seconds)) for each in source.transfers),
    )


def _tag(dtype: str) -> pb.DType:
    if dtype not in MATRIX_DTYPES:
        raise ProtocolError(f"matrices of {dtype!r} are not measured; choose one of {', '.join(MATRIX_DTYPES)}")
    return checks.DTYPE_TAGS[dtype]


def _dtype(what: str, tag: int) -> str:
    dtype = checks.DTYPE_NAMES.get(tag, "")
    if dtype not in MATRIX_DTYPES:
        raise ProtocolError(f"{what} is {dtype or tag}; it must be one of {', '.join(MATRIX_DTYPES)}")
    return dtype
