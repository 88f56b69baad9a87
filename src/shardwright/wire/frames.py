"""Tensor frames: a tensor's raw bytes with magic, version, dtype, shape and length, all checked before use.

A frame that holds its data keeps the bytes that protobuf gave, without another copy. A frame whose data follows in
fragments gets one buffer of its length, made after every check has passed; fragments are written into it in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from shardwright.errors import FrameError
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import FRAGMENT_BYTES, MAX_NAME_CHARS, MAX_STEP_TENSORS, WireLimits
from shardwright.wire.messages import TensorFrame

FRAME_MAGIC: Final = int.from_bytes(b"SWFT", "little")
FRAME_VERSION: Final = 1
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


def bytes_of(data: bytes | bytearray | memoryview) -> memoryview:
    """A flat view of a tensor's bytes; raises `FrameError` where they don't lie in one piece."""
    view = memoryview(data)
    if not view.c_contiguous:
        raise FrameError("a tensor's bytes must lie in one piece")
    return view.cast("B") if view.format != "B" or view.ndim != 1 else view


def fill_frame(target: pb.TensorFrame, frame: TensorFrame, *, with_data: bool) -> None:
    """Write a frame into `target`. Raises `FrameError` where dtype, shape and data don't agree."""
    data = bytes_of(frame.data)
    if frame.dtype not in ITEM_BYTES:
        raise FrameError(f"tensor {frame.name!r}: dtype {frame.dtype!r}; frames carry {', '.join(ITEM_BYTES)}")
    needed = math.prod(frame.shape) * ITEM_BYTES[frame.dtype]
    if needed != len(data):
        raise FrameError(_lying_length(frame.name, frame.dtype, frame.shape, needed, len(data)))
    target.magic = FRAME_MAGIC
    target.version = FRAME_VERSION
    target.dtype = checks.DTYPE_TAGS[frame.dtype]
    target.shape.extend(frame.shape)
    target.length = needed
    target.name = frame.name
    if with_data:
        target.data = bytes(data)


def read_frames(sources: Sequence[pb.TensorFrame], limits: WireLimits, *, may_follow: bool) -> tuple[TensorFrame, ...]:
    """Check all frames of a step, then take them over.

    Where `may_follow`, a frame without data gets an empty buffer of its length, for `Fragments` to fill. Raises
    `FrameError`.
    """
    if len(sources) > MAX_STEP_TENSORS:
        raise FrameError(f"{len(sources)} tensors with one step, and {MAX_STEP_TENSORS} is the most")
    heads = [_check_head(source, limits) for source in sources]
    total = sum(source.length for source in sources)
    if total > limits.max_frame_bytes:
        raise FrameError(f"tensors of {total} bytes with one step, and {limits.max_frame_bytes} is the most")
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise FrameError(f"two tensors of one step have the same name: {', '.join(names)}")
    payloads = [_payload(source, may_follow=may_follow) for source in sources]
    return tuple(
        TensorFrame(name=name, dtype=dtype, shape=shape, data=bytearray(source.length) if data is None else data)
        for source, name, (dtype, shape), data in zip(sources, names, heads, payloads, strict=True)
    )


def is_pending(source: pb.TensorFrame) -> bool:
    """Whether the data of a checked frame follows in fragments."""
    return bool(source.length) and not source.data


def cut(frames: Sequence[TensorFrame]) -> Iterator[pb.TensorFragment]:
    """The frames' data as fragments, in order."""
    for index, frame in enumerate(frames):
        data = bytes_of(frame.data)
        for offset in range(0, len(data), FRAGMENT_BYTES):
            piece = bytes(data[offset : offset + FRAGMENT_BYTES])
            yield pb.TensorFragment(tensor=index, offset=offset, data=piece)


class Fragments:
    """Fills the buffers of frames whose data follows, strictly in order."""

    def __init__(self, frames: Sequence[TensorFrame], pending: Sequence[int]) -> None:
        self._frames = frames
        self._pending = list(pending)  # indices of frames that lack data
        self._offset = 0  # bytes there are of the first of these

    @property
    def complete(self) -> bool:
        """All data has come."""
        return not self._pending

    def add(self, fragment: pb.TensorFragment) -> None:
        """Write one fragment in its place; raises `FrameError` when it is not the one that must come next."""
        data = fragment.data
        if self.complete:
            raise FrameError(f"a fragment of tensor {fragment.tensor}, but every tensor of the step is complete")
        index = self._pending[0]
        if (fragment.tensor, fragment.offset) != (index, self._offset):
            raise FrameError(
                f"fragment of tensor {fragment.tensor} at byte {fragment.offset}; "
                f"expected tensor {index} at byte {self._offset}"
            )
        buffer = self._frames[index].data
        end = self._offset + len(data)
        if not data or end > len(buffer):
            raise FrameError(f"fragment of {len(data)} bytes at byte {self._offset} of {len(buffer)}")
        assert isinstance(buffer, bytearray), "read_frames makes a buffer for a frame that lacks data"
        buffer[self._offset : end] = data
        self._offset = end
        if end == len(buffer):
            self._pending.pop(0)
            self._offset = 0


def _check_head(source: pb.TensorFrame, limits: WireLimits) -> tuple[str, tuple[int, ...]]:
    """Everything but the data: magic, version, name, dtype, shape, length."""
    if source.magic != FRAME_MAGIC:
        raise FrameError(f"a tensor frame starts with {source.magic:#010x}; expected {FRAME_MAGIC:#010x}")
    if source.version != FRAME_VERSION:
        raise FrameError(f"a tensor frame of version {source.version}; this side knows version {FRAME_VERSION}")
    name = source.name
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise FrameError(f"a tensor's name has {len(name)} characters; it must have 1 to {MAX_NAME_CHARS}")
    dtype = checks.DTYPE_NAMES.get(source.dtype)
    if dtype is None:
        raise FrameError(f"tensor {name!r}: dtype number {source.dtype}; frames carry {', '.join(ITEM_BYTES)}")
    shape = checks.shape(f"tensor {name!r}", source.shape)
    if source.length > limits.max_frame_bytes:
        raise FrameError(f"tensor {name!r}: {source.length} bytes, and {limits.max_frame_bytes} is the most")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed != source.length:
        raise FrameError(_lying_length(name, dtype, shape, needed, source.length))
    return dtype, shape


def _payload(source: pb.TensorFrame, *, may_follow: bool) -> bytes | None:
    """The frame's data; None when it follows."""
    data: bytes = source.data
    if len(data) == source.length:
        return data
    if not data and may_follow:
        return None
    raise FrameError(f"tensor {source.name!r}: {len(data)} bytes of data; its frame says {source.length}")


def _lying_length(name: str, dtype: str, shape: tuple[int, ...], needed: int, length: int) -> str:
    return f"tensor {name!r}: shape {list(shape)} of {dtype} takes {needed} bytes, but its length is {length}"
