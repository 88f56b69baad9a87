"""Where the master reads the raw bytes of what it sends: the checkpoint on its disk, and blobs in its memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from shardwright.types import TensorSpec


class RawSource(Protocol):
    """Tensors' raw bytes by name and range; `read` is called from any thread."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of a tensor."""
        ...


class BlobsBeside:
    """A source, and before it some blobs that travel as tensors of bytes."""

    def __init__(self, source: RawSource, blobs: Mapping[str, bytes]) -> None:
        self._source = source
        self._blobs = blobs

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of a blob, or of a tensor of the source behind."""
        blob = self._blobs.get(name)
        return self._source.read(name, offset, length) if blob is None else blob[offset : offset + length]


def blob_spec(name: str, blob: bytes) -> TensorSpec:
    """The blob as a tensor: dtype U8, shape (bytes,)."""
    return TensorSpec(
        name=name, dtype="U8", shape=(len(blob),), num_bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest()
    )
