"""Hashing a checkpoint's tensors once, and remembering it for as long as the file is the same."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardwright.errors import CheckpointError
from shardwright.model.checkpoint import open_weight_file
from shardwright.runtime.tensor_hashes import CHUNK_BYTES, hash_tensors


class Counting:
    """A checkpoint that counts the bytes read from it, and may do something at each read."""

    def __init__(self, path: Path, *, on_read=lambda: None) -> None:
        self._checkpoint = open_weight_file(path)
        self.tensors = self._checkpoint.tensors
        self.num_read = 0
        self.largest_read = 0
        self._on_read = on_read

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.num_read += length
        self.largest_read = max(self.largest_read, length)
        self._on_read()
        return self._checkpoint.read(name, offset, length)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, seed=0)
    return file


def write(file: Path, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        "large": rng.standard_normal((600, 600)),  # more than two chunks
        "small": rng.standard_normal(7).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, file)


def hashes(path: Path, cache_dir: Path, **options: object) -> tuple[dict[str, str], Counting]:
    checkpoint = Counting(path)
    specs = hash_tensors(checkpoint, checkpoint.tensors, cache_dir=cache_dir, **options)
    return {spec.name: spec.sha256 for spec in specs}, checkpoint


def true_hashes(path: Path) -> dict[str, str]:
    checkpoint = open_weight_file(path)
    return {name: hashlib.sha256(checkpoint.read_tensor(name)).hexdigest() for name in checkpoint.tensors}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_each_tensor_is_named_by_its_raw_bytes_read_in_bounded_chunks(path, tmp_path, num_threads):
    found, checkpoint = hashes(path, tmp_path / "cache", num_threads=num_threads)
    assert found == true_hashes(path)
    assert checkpoint.largest_read == CHUNK_BYTES
    assert checkpoint.num_read == 600 * 600 * 8 + 7 * 4


def test_the_specs_follow_the_order_of_the_names_and_carry_dtype_and_shape(path, tmp_path):
    specs = hash_tensors(Counting(path), ["small", "empty", "large"], cache_dir=tmp_path)
    assert [(s.name, s.dtype, s.shape, s.num_bytes) for s in specs] == [
        ("small", "F32", (7,), 28),
        ("empty", "F32", (0, 3), 0),
        ("large", "F64", (600, 600), 2_880_000),
    ]


def test_a_second_start_hashes_nothing(path, tmp_path):
    first, _ = hashes(path, tmp_path / "cache")
    second, checkpoint = hashes(path, tmp_path / "cache")
    assert second == first
    assert checkpoint.num_read == 0


def test_what_one_stage_hashed_another_stage_of_the_same_file_adds_to(path, tmp_path):
    hash_tensors(Counting(path), ["small"], cache_dir=tmp_path)
    checkpoint = Counting(path)
    hash_tensors(checkpoint, ["small", "large"], cache_dir=tmp_path)
    assert checkpoint.num_read == 2_880_000
    _, again = hashes(path, tmp_path)
    assert again.num_read == 0


def test_a_file_replaced_by_another_is_hashed_anew(path, tmp_path):
    before, _ = hashes(path, tmp_path / "cache")
    other = tmp_path / "other"
    write(other, seed=1)
    other.replace(path)
    after, _ = hashes(path, tmp_path / "cache")
    assert after == true_hashes(path)
    assert after["large"] != before["large"]


def test_a_file_written_into_in_place_is_hashed_anew(path, tmp_path):
    hashes(path, tmp_path / "cache")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert hashes(path, tmp_path / "cache")[0] == true_hashes(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[1, 2]",
        lambda text: json.dumps(json.loads(text) | {"version": 99}),
        lambda text: json.dumps(json.loads(text) | {"sha256": {"0+1": 5}}),
        lambda text: json.dumps(json.loads(text) | {"sha256": "none"}),
        lambda _: "\udcff\x00",
    ],
)
def test_a_damaged_index_is_ignored_and_written_anew(path, tmp_path, damage):
    hashes(path, tmp_path / "cache")
    (index,) = (tmp_path / "cache" / "hashes").iterdir()
    index.write_text(damage(index.read_text()), errors="surrogateescape")
    found, checkpoint = hashes(path, tmp_path / "cache")
    assert found == true_hashes(path)
    assert checkpoint.num_read > 0
    assert hashes(path, tmp_path / "cache")[1].num_read == 0


def test_a_cache_folder_that_cannot_be_written_costs_only_time(path, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert hashes(path, tmp_path / "cache")[0] == true_hashes(path)


def test_progress_counts_up_to_all_that_had_to_be_hashed(path, tmp_path):
    seen: list[tuple[int, int]] = []
    hashes(path, tmp_path, progress=lambda done, total: seen.append((done, total)), num_threads=2)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (2_880_028, 2_880_028)


def test_a_stopped_run_ends_early_and_keeps_what_it_has(path, tmp_path):
    stop = threading.Event()

    def on_progress(done: int, _total: int) -> None:
        if done == 2_880_000:
            stop.set()

    with pytest.raises(InterruptedError, match="stopped at tensor small"):
        hashes(path, tmp_path, stop=stop, progress=on_progress, num_threads=1)
    assert hashes(path, tmp_path)[1].num_read == 28


def test_a_file_changed_while_it_is_hashed_is_an_error_and_is_not_remembered(path, tmp_path):
    def touch() -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was read; load the model again"):
        hash_tensors(Counting(path, on_read=touch), ["small"], cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_file_that_ends_too_early_is_named(path, tmp_path):
    checkpoint = Counting(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        hash_tensors(checkpoint, ["large"], cache_dir=tmp_path)
