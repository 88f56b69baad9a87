"""A rank's part of a stored tensor, read alone."""

from __future__ import annotations

import hashlib

import torch

from shardwright.model.shards import Shard, read_shard
from shardwright.types import TensorSpec


class Stored:
    """One tensor in memory that notes which of its bytes were read."""

    def __init__(self, tensor, tag):
        self.data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        sha256 = hashlib.sha256(self.data).hexdigest()
        self.specs = {
            "t": TensorSpec(name="t", dtype=tag, shape=tuple(tensor.shape), num_bytes=len(self.data), sha256=sha256)
        }
        self.touched = []

    def read(self, name):
        raise AssertionError("the whole tensor is not wanted")

    def read_into(self, name, offset, view):
        self.touched.append((offset, len(view)))
        view[:] = self.data[offset : offset + len(view)]


CPU = torch.device("cpu")


def test_rows_are_read_and_nothing_else():
    tensor = torch.randn(12, 5)
    stored = Stored(tensor, "F32")
    shard = Shard(0, ((2, 4), (9, 10)))
    assert torch.equal(read_shard(stored, "t", shard, dtype=torch.float32, device=CPU), tensor[[2, 3, 9]])
    assert stored.touched == [(2 * 20, 2 * 20), (9 * 20, 20)]


def test_columns_are_cast_and_taken_in_pieces(monkeypatch):
    monkeypatch.setattr("shardwright.model.shards._STAGING_BYTES", 3 * 8 * 2)  # three rows at a time
    tensor = torch.randn(10, 8).to(torch.bfloat16)
    stored = Stored(tensor, "BF16")
    shard = Shard(1, ((4, 6), (0, 1)))
    found = read_shard(stored, "t", shard, dtype=torch.float32, device=CPU)
    assert torch.equal(found, tensor[:, [4, 5, 0]].float())
    assert max(size for _, size in stored.touched) == 3 * 8 * 2


def test_a_vectors_part_and_a_cut_in_memory_are_the_same():
    tensor = torch.randn(9)
    shard = Shard(0, ((3, 9),))
    found = read_shard(Stored(tensor, "F32"), "t", shard, dtype=torch.float32, device=CPU)
    assert torch.equal(found, shard.cut(tensor))
    assert shard.cut(tensor).untyped_storage().nbytes() == 6 * 4  # the rest can be given back
