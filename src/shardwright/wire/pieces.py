"""Messages that are too large to travel whole: cut into pieces by the sender, put together again by the receiver."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.errors import ProtocolError
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import FRAGMENT_BYTES, MAX_STEP_BYTES


def cut(what: str, raw: bytes) -> Iterator[pb.MessagePiece]:
    """A message's bytes as pieces, in order. Raises `ProtocolError` where the receiver would have to refuse them."""
    checks.at_most(f"{what}, in bytes", len(raw), MAX_STEP_BYTES)
    for start in range(0, len(raw), FRAGMENT_BYTES):
        end = start + FRAGMENT_BYTES
        yield pb.MessagePiece(data=raw[start:end], is_last=end >= len(raw))


class Pieces:
    """The pieces of one message, as far as they have come."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._data = bytearray()

    @property
    def is_open(self) -> bool:
        """A message has begun and is not complete."""
        return bool(self._data)

    def add(self, piece: pb.MessagePiece) -> bytes | None:
        """The whole message's bytes, if this was its last piece. Raises `ProtocolError`."""
        if not piece.data:
            raise ProtocolError(f"{self._what}: an empty piece")
        checks.at_most(f"{self._what}, in bytes", len(self._data) + len(piece.data), MAX_STEP_BYTES)
        self._data += piece.data
        if not piece.is_last:
            return None
        raw = bytes(self._data)
        self._data.clear()
        return raw
