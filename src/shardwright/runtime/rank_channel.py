"""What a worker's process and its ranks say to each other over pipes: a kind, a length, JSON and bytes. No pickle."""

from __future__ import annotations

import enum
import json
import os
import struct
import threading
from dataclasses import dataclass
from typing import Any

_HEAD = struct.Struct("<BII")  # kind, bytes of JSON, bytes behind it
_MAX_BYTES = 256 * 1024 * 1024


class Kind(enum.IntEnum):
    """What a message is. The upper ones go to a rank, the lower ones come from it."""

    JOIN = 1  # meet the others
    BUILD = 2  # build a part of a stage
    CANCEL = 3  # stop building it; read at once, also while something else goes on
    STEP = 4  # compute a step; the encoded step follows
    CLOSE = 5  # drop a part of a stage
    MEASURE = 6  # measure the device

    BEAT = 65  # alive, with figures of process and device
    DONE = 66  # an answer to JOIN, BUILD or MEASURE
    FAILED = 67  # the same, when it went wrong; or a step that did


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a channel."""

    kind: Kind
    fields: dict[str, Any]
    data: bytes = b""


class Channel:
    """Two ends of pipes. Any thread may send; one thread receives."""

    def __init__(self, *, reads: int, writes: int) -> None:
        """Take file descriptors, which stay the caller's."""
        self._reads = reads
        self._writes = writes
        self._lock = threading.Lock()

    def send(self, kind: Kind, fields: dict[str, Any] | None = None, data: bytes = b"") -> None:
        """Write one message whole. Raises `OSError` when the other end is gone."""
        text = json.dumps(fields or {}).encode()
        with self._lock:
            self._write(_HEAD.pack(kind, len(text), len(data)) + text + data)

    def _write(self, raw: bytes) -> None:
        view = memoryview(raw)
        while view:
            view = view[os.write(self._writes, view) :]

    def receive(self) -> Message | None:
        """The next message; None once the other end is gone."""
        head = self._read(_HEAD.size)
        if head is None:
            return None
        kind, text_bytes, data_bytes = _HEAD.unpack(head)
        if text_bytes + data_bytes > _MAX_BYTES:
            return None  # not one of ours
        body = self._read(text_bytes + data_bytes)
        if body is None:
            return None
        return Message(Kind(kind), json.loads(body[:text_bytes]), body[text_bytes:])

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(self._reads, count - len(parts))
            if not part:
                return None
            parts += part
        return bytes(parts)
