"""The worker's tensor cache: what it keeps, what it drops, and what several processes may do to it at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading

import pytest

from shardwright.errors import CheckpointError, ProtocolError, StageLoadError
from shardwright.runtime.tensor_cache import EMPTY_SHA256, TensorCache
from shardwright.types import TensorSpec

LIMIT = 1 << 30


def spec_of(data: bytes, name: str = "t") -> TensorSpec:
    return TensorSpec(
        name=name, dtype="U8", shape=(len(data),), num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def put(cache: TensorCache, data: bytes, *, used_at: int = 0) -> TensorSpec:
    spec = spec_of(data)
    partial = cache.begin(spec)
    partial.write(0, data)
    path = partial.finish()
    os.utime(path, (used_at, used_at))
    return spec


def has(cache: TensorCache, spec: TensorSpec) -> bool:
    return cache.path(spec.sha256).exists()


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path, limit_bytes=LIMIT)


def test_a_tensor_written_in_chunks_is_found_whole_under_its_hash(cache, tmp_path):
    data = os.urandom(10_000)
    spec = spec_of(data)
    partial = cache.begin(spec)
    assert cache.find(spec.sha256, spec.num_bytes) is None
    for offset in range(0, len(data), 999):
        partial.write(offset, memoryview(data)[offset : offset + 999])
    assert partial.finish() == tmp_path / "tensors" / spec.sha256[:2] / spec.sha256
    assert cache.find(spec.sha256, spec.num_bytes).read_bytes() == data


def test_a_tensor_without_bytes_can_be_kept_like_any_other(cache):
    spec = spec_of(b"")
    assert spec.sha256 == EMPTY_SHA256
    cache.begin(spec).finish()
    assert cache.find(spec.sha256, 0).read_bytes() == b""


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "/x", "a" * 64 + "\n", "é" * 64]
)
def test_what_is_not_a_hash_never_becomes_a_path(cache, tmp_path, name):
    spec = TensorSpec(name="t", dtype="U8", shape=(1,), num_bytes=1, sha256=name)
    for touch in (
        lambda: cache.path(name),
        lambda: cache.find(name, 1),
        lambda: cache.drop(name),
        lambda: cache.begin(spec),
        lambda: cache.resume(spec),
        lambda: cache.pin([name]),
    ):
        with pytest.raises(ProtocolError, match="is not a SHA-256; it must be 64 lower-case hex digits"):
            touch()
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_thrown_away_and_the_error_names_the_tensor(cache, tmp_path):
    spec = spec_of(b"right", "layers.3.weight")
    partial = cache.begin(spec)
    partial.write(0, b"wrong")
    with pytest.raises(CheckpointError, match=r"tensor layers\.3\.weight: .* expected " + spec.sha256):
        partial.finish()
    assert cache.entries() == []
    assert cache.resume(spec) is None


@pytest.mark.parametrize(
    ("offset", "data", "fault"), [(2, b"xx", "expected 3"), (4, b"xx", "expected 3"), (3, b"xxxxxxxx", "it has 10")]
)
def test_a_chunk_that_does_not_follow_or_is_too_long_is_refused_and_changes_nothing(cache, offset, data, fault):
    spec = spec_of(b"0123456789")
    partial = cache.begin(spec)
    partial.write(0, b"012")
    with pytest.raises(ProtocolError, match=fault):
        partial.write(offset, data)
    partial.write(3, b"3456789")
    assert partial.finish().read_bytes() == b"0123456789"


def test_a_broken_transfer_goes_on_where_it_stopped(cache):
    data = os.urandom(5000)
    spec = spec_of(data)
    first = cache.begin(spec)
    first.write(0, data[:3000])
    first.close()
    second = cache.resume(spec)
    assert second.offset == 3000
    second.write(3000, data[3000:])
    assert second.finish().read_bytes() == data
    assert cache.resume(spec) is None


def test_a_partial_file_that_was_damaged_meanwhile_is_found_out(cache):
    data = os.urandom(5000)
    spec = spec_of(data)
    first = cache.begin(spec)
    first.write(0, data[:3000])
    first.close()
    cache.path(spec.sha256).with_suffix(".part").write_bytes(bytes(3000))
    second = cache.resume(spec)
    second.write(3000, data[3000:])
    with pytest.raises(CheckpointError, match="thrown away"):
        second.finish()
    assert cache.resume(spec) is None


def test_a_partial_file_longer_than_its_tensor_is_no_start(cache):
    spec = spec_of(b"abc")
    first = cache.begin(spec)
    first.close()
    cache.path(spec.sha256).with_suffix(".part").write_bytes(b"abcd")
    assert cache.resume(spec) is None
    assert cache.entries() == []


def test_a_whole_file_of_the_wrong_size_is_dropped(cache):
    spec = put(cache, b"abcdef")
    cache.path(spec.sha256).write_bytes(b"abc")
    assert cache.find(spec.sha256, 6) is None
    assert not has(cache, spec)


def test_two_writers_of_one_tensor_do_not_disturb_each_other(cache, tmp_path):
    data = os.urandom(4000)
    spec = spec_of(data)
    one = cache.begin(spec)
    two = TensorCache(tmp_path, limit_bytes=LIMIT).begin(spec)
    assert TensorCache(tmp_path, limit_bytes=LIMIT).resume(spec) is None, "it belongs to the first writer"
    one.write(0, data[:1000])
    two.write(0, data)
    assert two.finish().read_bytes() == data
    one.write(1000, data[1000:])
    assert one.finish().read_bytes() == data
    assert [entry.is_partial for entry in cache.entries()] == [False]


def test_many_writers_at_once_leave_one_right_file(tmp_path):
    data = os.urandom(300_000)
    spec = spec_of(data)
    faults: list[BaseException] = []

    def work() -> None:
        try:
            cache = TensorCache(tmp_path, limit_bytes=LIMIT)
            partial = cache.resume(spec) or cache.begin(spec)
            while not partial.is_complete:
                partial.write(partial.offset, data[partial.offset : partial.offset + 10_000])
            partial.finish()
        except BaseException as exc:  # noqa: BLE001  whatever it is, the test wants to see it
            faults.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [entry.path.read_bytes() for entry in TensorCache(tmp_path, limit_bytes=LIMIT).entries()] == [data]


def test_the_least_recently_used_go_first_and_only_as_many_as_must(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=350)
    old, middle, new = (put(cache, bytes([n]) * 100, used_at=1000 + n) for n in (1, 2, 3))
    cache.find(old.sha256, 100)  # now it is the newest
    cache.make_room(120)
    assert [has(cache, spec) for spec in (old, middle, new)] == [True, False, True]


def test_what_a_load_has_pinned_stays_even_over_the_limit_until_it_is_released(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=150)
    mine, other = put(cache, b"a" * 100, used_at=1), put(cache, b"b" * 100, used_at=2)
    with cache.pin([mine.sha256]):
        TensorCache(tmp_path, limit_bytes=150).make_room(1000)
        assert [has(cache, spec) for spec in (mine, other)] == [True, False]
        third = put(cache, b"c" * 100, used_at=3)
    assert [has(cache, spec) for spec in (mine, third)] == [False, True]
    assert list((tmp_path / "tensors" / "pins").iterdir()) == []


def test_a_partial_tensor_that_is_being_written_is_not_evicted(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=0)
    spec = spec_of(b"x" * 100)
    partial = cache.begin(spec)
    partial.write(0, b"x" * 60)
    TensorCache(tmp_path, limit_bytes=0).make_room(0)
    partial.write(60, b"x" * 40)
    assert partial.finish().read_bytes() == b"x" * 100
    cache.make_room(0)
    assert cache.entries() == []


HOLD = """
import sys
from pathlib import Path
from shardwright.runtime.tensor_cache import TensorCache
pin = TensorCache(Path(sys.argv[1]), limit_bytes=0).pin([sys.argv[2]])
print("pinned", flush=True)
sys.stdin.read()
"""


def test_another_process_pins_hold_while_it_lives_and_end_with_it(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=LIMIT)
    spec = put(cache, b"shared" * 10)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), spec.sha256], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"pinned\n"
        assert cache.clear() == 0
        assert has(cache, spec)
        other.kill()
    assert cache.clear() == 60
    assert not has(cache, spec)


def test_ls_lists_size_and_last_use_oldest_first(cache):
    put(cache, b"a" * 10, used_at=2000)
    spec = put(cache, b"b" * 20, used_at=1000)
    unfinished = cache.begin(spec_of(b"c" * 30))
    unfinished.write(0, b"c" * 5)
    unfinished.close()
    entries = cache.entries()
    assert [(e.num_bytes, e.last_used_s, e.is_partial) for e in entries[:2]] == [(20, 1000, False), (10, 2000, False)]
    assert (entries[0].sha256, entries[0].path) == (spec.sha256, cache.path(spec.sha256))
    assert (entries[2].num_bytes, entries[2].is_partial) == (5, True)


def test_a_cache_that_was_never_used_is_empty_and_stays_uncreated(tmp_path):
    cache = TensorCache(tmp_path / "none", limit_bytes=LIMIT)
    assert cache.entries() == []
    assert cache.clear() == 0
    cache.make_room(100)
    assert not (tmp_path / "none").exists()


def test_clear_removes_all_that_nobody_uses_and_no_file_of_others(cache, tmp_path):
    put(cache, b"a" * 10)
    left = cache.begin(spec_of(b"c" * 30))
    left.write(0, b"c" * 5)
    left.close()
    foreign = tmp_path / "tensors" / "aa" / "notes.txt"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("mine")
    assert cache.clear() == 15
    assert cache.entries() == []
    assert foreign.read_text() == "mine"


def test_a_disk_that_is_too_small_is_said_before_anything_is_sent(cache, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(StageLoadError, match=r"weights have to be stored, but the disk has \d+ free; free some space"):
        cache.make_room(free * 2)


def test_a_disk_that_fills_up_meanwhile_gives_one_clear_sentence(cache, monkeypatch):
    spec = spec_of(b"x" * 100, "layers.0.weight")
    partial = cache.begin(spec)

    def full(_fd: int, _data: object, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        StageLoadError, match=r"the disk is full, tensor layers\.0\.weight \(100 bytes\) can't be stored"
    ):
        partial.write(0, b"x" * 50)
    partial.close()


def test_a_cache_folder_that_is_a_file_gives_one_clear_sentence(tmp_path):
    (tmp_path / "tensors").write_text("not a folder")
    cache = TensorCache(tmp_path, limit_bytes=LIMIT)
    with pytest.raises(StageLoadError, match="can't be stored"):
        cache.begin(spec_of(b"x"))
    with pytest.raises(StageLoadError, match="can't be stored"):
        cache.pin([EMPTY_SHA256])
