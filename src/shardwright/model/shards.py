"""Which part of a tensor one rank holds, and how that part alone is read. Knows ranges of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardwright.errors import CheckpointError
from shardwright.model.raw_tensors import TORCH_DTYPES, RawTensors, ReadsInto, fill_from_raw, read_checked
from shardwright.types import TensorSpec

_STAGING_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shard:
    """Ranges of one dimension of a tensor, in the order in which the rank holds them one behind the other."""

    dim: int  # 0: rows; 1: columns of a matrix
    ranges: tuple[tuple[int, int], ...]  # from, to

    @property
    def size(self) -> int:
        """How long the dimension is on the rank."""
        return sum(end - start for start, end in self.ranges)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shard's shape; `whole` is the tensor's."""
        return (*whole[: self.dim], self.size, *whole[self.dim + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The shard of a tensor in memory; memory of its own."""
        parts = [whole.narrow(self.dim, start, end - start) for start, end in self.ranges]
        return (
            torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)
        )


def read_shard(raw: RawTensors, name: str, shard: Shard, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Read one rank's part of a stored tensor.

    Rows are ranges of bytes, and only they are read. Columns lie all over the tensor: it passes through 16 MiB of
    memory, and what is not the rank's is dropped.
    """
    spec = raw.specs[name]
    _check(spec, shard)
    target = torch.empty(shard.shape(spec.shape), dtype=dtype, device=device)
    if shard.dim == 0:
        row_bytes = spec.num_bytes // spec.shape[0]
        done = 0
        for start, end in shard.ranges:
            rows = _Part(raw, name, start * row_bytes, (end - start, *spec.shape[1:]))
            fill_from_raw(target[done : done + end - start], rows, name)
            done += end - start
        return target
    stored = TORCH_DTYPES[spec.dtype]
    num_rows, width = spec.shape
    per_chunk = max(1, min(num_rows, _STAGING_BYTES // (width * stored.itemsize)))
    staging = torch.empty((per_chunk, width), dtype=stored)
    for first in range(0, num_rows, per_chunk):
        block = staging[: min(per_chunk, num_rows - first)]
        fill_from_raw(block, _Part(raw, name, first * width * stored.itemsize, tuple(block.shape)), name)
        done = 0
        for start, end in shard.ranges:
            target[first : first + len(block), done : done + end - start].copy_(block[:, start:end])
            done += end - start
    return target


def _check(spec: TensorSpec, shard: Shard) -> None:
    if spec.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"tensor {spec.name!r} has the dtype {spec.dtype}, which can't be read")
    if spec.num_bytes != math.prod(spec.shape) * TORCH_DTYPES[spec.dtype].itemsize:
        raise CheckpointError(
            f"tensor {spec.name!r}: {spec.num_bytes} bytes for shape {list(spec.shape)} in {spec.dtype}"
        )
    assert shard.dim == 0 or len(spec.shape) == 2, spec.name
    assert all(0 <= a < b <= spec.shape[shard.dim] for a, b in shard.ranges), spec.name


class _Part:
    """A contiguous stretch of one stored tensor, as if it were all of it."""

    def __init__(self, raw: RawTensors, name: str, offset: int, shape: tuple[int, ...]) -> None:
        whole = raw.specs[name]
        num_bytes = math.prod(shape) * TORCH_DTYPES[whole.dtype].itemsize
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name=name, dtype=whole.dtype, shape=shape, num_bytes=num_bytes, sha256=whole.sha256)
        }
        self._raw = raw
        self._offset = offset

    def read(self, name: str) -> memoryview:
        """All of the stretch."""
        view = memoryview(bytearray(self.specs[name].num_bytes))
        self.read_into(name, 0, view)
        return view

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` from the stretch's byte `offset` on."""
        begin = self._offset + offset
        if isinstance(self._raw, ReadsInto):
            self._raw.read_into(name, begin, view)
            return
        view[:] = read_checked(self._raw, name)[begin : begin + len(view)]
