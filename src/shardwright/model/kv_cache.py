"""Holds the K and V of a stage's layers in slots of fixed-size blocks. Knows shapes; nothing of sequences."""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What one layer keeps of one position: `heads` keys of `key_dim` and values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one position's K and V."""
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerCache:
    """K and V of one layer. Slot `block * block_size + offset` is position `offset` of the block.

    A position's heads lie side by side, so that consecutive slots are one stretch of memory and a sequence whose
    blocks follow each other is attended in place.
    """

    keys: torch.Tensor  # [num_blocks * block_size, heads, key_dim]
    values: torch.Tensor  # [num_blocks * block_size, heads, value_dim]
    block_size: int

    @property
    def num_bytes(self) -> int:
        """Bytes reserved; on a CPU the operating system commits them when blocks are first written."""
        return self.keys.nbytes + self.values.nbytes


def make_layer_cache(
    shape: KvShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """Reserve zeroed K and V for `num_blocks` blocks."""
    slots = num_blocks * block_size
    return LayerCache(
        _zeros((slots, shape.heads, shape.key_dim), dtype, device),
        _zeros((slots, shape.heads, shape.value_dim), dtype, device),
        block_size,
    )


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory before they are written, where the device allows it.

    `torch.zeros` writes every page, and so does `calloc` where it takes up memory that was freed before. Pages of a
    mapping of their own come into being on first use. They must be zeros: a masked slot still meets its weight of 0,
    and 0 times a stray NaN is NaN.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
