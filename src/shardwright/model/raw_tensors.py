"""Raw checkpoint bytes, and how they become values of a tensor without a second copy of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from shardwright.errors import CheckpointError
from shardwright.types import TensorSpec

_STAGING_BYTES = 16 * 1024 * 1024

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


class RawTensors(Protocol):
    """A stage's tensors as they are stored, wherever they lie: in a file, in a cache, in memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What there is."""
        ...

    def read(self, name: str) -> memoryview:
        """The tensor's raw bytes; given back to the system when the caller drops them."""
        ...


@runtime_checkable
class ReadsInto(Protocol):
    """Raw tensors that can be read where they are wanted, so that none is in memory twice."""

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the tensor's raw bytes from `offset` on."""
        ...


def read_checked(raw: RawTensors, name: str) -> memoryview:
    """The tensor's bytes, as many as its spec says."""
    data = raw.read(name).cast("B")
    if len(data) != raw.specs[name].num_bytes:
        raise CheckpointError(f"tensor {name!r}: {len(data)} bytes came, {raw.specs[name].num_bytes} were announced")
    return data


def fill_from_raw(target: torch.Tensor, raw: RawTensors, name: str) -> None:
    """Write a safetensors tensor's values into `target` (contiguous, same number of values, any dtype and device).

    Values are cast as `Tensor.to` casts them. Beside `target` at most 16 MiB are held, and the raw bytes where `raw`
    can't read into place.
    """
    spec = raw.specs[name]
    if spec.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"tensor {name!r} has the dtype {spec.dtype}, which can't be read")
    dtype = TORCH_DTYPES[spec.dtype]
    count = math.prod(spec.shape)
    if spec.num_bytes != count * dtype.itemsize:
        raise CheckpointError(f"tensor {name!r}: {spec.num_bytes} bytes for shape {list(spec.shape)} in {spec.dtype}")
    assert target.is_contiguous(), name
    assert target.numel() == count, name
    read_into = raw.read_into if isinstance(raw, ReadsInto) else _from_memory(read_checked(raw, name))
    flat = target.view(-1)
    if flat.device.type == "cpu" and flat.dtype == dtype:
        read_into(name, 0, as_bytes(flat).data)
        return
    per_chunk = min(count, _STAGING_BYTES // dtype.itemsize) or 1
    staging = torch.empty(per_chunk, dtype=dtype)
    for start in range(0, count, per_chunk):
        part = staging[: min(per_chunk, count - start)]
        read_into(name, start * dtype.itemsize, as_bytes(part).data)
        flat[start : start + len(part)].copy_(part)


def _from_memory(source: memoryview) -> Callable[[str, int, memoryview], None]:
    """Reads one tensor's bytes out of memory."""

    def read_into(_name: str, offset: int, view: memoryview) -> None:
        view[:] = source[offset : offset + len(view)]

    return read_into


def as_bytes(tensor: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The memory of a contiguous one-dimensional CPU tensor."""
    return tensor.view(torch.uint8).numpy()
