"""`shardwright cache` shows and removes the compiled kernels of a cache folder, unless somebody compiles them."""

import json
import os

import pytest

from shardwright.model.kernel_build import locked

MIB = 1024 * 1024
ROW_FIELDS = {"kind", "name", "num_bytes", "last_used"}


def put(path, num_bytes, last_used):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes))
    os.utime(path, (last_used, last_used))


@pytest.fixture
def cache(tmp_path):
    """A cache folder with a kernel of each kind, the locks that were held for them, and what a dead compiler left."""
    kernels = tmp_path / "cache" / "kernels"
    put(kernels / "lock", 0, 9000)
    put(kernels / "product-ab.so", MIB, 2000)
    put(kernels / "build-cd" / "product.cpp", 10, 1000)
    put(kernels / "deepspeed" / "lock", 0, 9000)
    put(kernels / "deepspeed" / "torch-1-deepspeed-2-ef" / "built", 0, 3000)
    put(kernels / "deepspeed" / "torch-1-deepspeed-2-ef" / "deepspeed_shm_comm" / "shm.so", 2 * MIB, 2500)
    return tmp_path / "cache"


def names(run_cli, cache):
    return [each["name"] for each in json.loads(run_cli("cache", "ls", "--json", "--cache-dir", cache).out)]


def test_kernels_are_listed_the_least_recently_used_first(run_cli, cache):
    shown = run_cli("cache", "ls", "--json", "--cache-dir", cache)
    assert shown.code == 0
    rows = json.loads(shown.out)
    assert {frozenset(row) for row in rows} == {frozenset(ROW_FIELDS)}
    assert [(row["kind"], row["name"], row["num_bytes"], row["last_used"]) for row in rows] == [
        ("kernel", "build-cd", 10, 1000.0),
        ("kernel", "product-ab.so", MIB, 2000.0),
        ("kernel", "deepspeed/torch-1-deepspeed-2-ef", 2 * MIB, 3000.0),
    ]


def test_the_table_of_kernels_names_each_with_its_size(run_cli, cache):
    shown = run_cli("cache", "ls", "--cache-dir", cache).out
    assert [line.split("│")[2].strip() for line in shown.splitlines() if "product-ab.so" in line] == ["1.00"]
    assert "0 tensors, 0.0 MiB of at most" in shown
    assert f"and 3 compiled kernels, 3.0 MiB, in {cache}" in shown


def test_clear_removes_kernels_and_leaves_their_locks(run_cli, cache):
    """A lock that was removed could be held by two: by one who opened it before, and by one who made it again."""
    cleared = run_cli("cache", "clear", "--cache-dir", cache)
    assert (cleared.code, cleared.out, cleared.err) == (0, f"3.0 MiB freed in {cache}\n", "")
    left = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    assert sorted(left) == ["kernels/deepspeed/lock", "kernels/lock"]
    assert names(run_cli, cache) == []


@pytest.mark.parametrize(
    ("busy", "stays"),
    [
        ("kernels", ["build-cd", "product-ab.so"]),
        ("kernels/deepspeed", ["deepspeed/torch-1-deepspeed-2-ef"]),
    ],
)
def test_clear_leaves_a_folder_in_which_somebody_compiles(run_cli, cache, busy, stays):
    with locked(cache / busy):
        cleared = run_cli("cache", "clear", "--cache-dir", cache)
    assert cleared.code == 0
    assert f"compiled in {cache / busy} just now: what is there stays" in cleared.err
    assert names(run_cli, cache) == stays


def test_a_cache_that_was_never_used_has_no_kernels(run_cli, tmp_path):
    cache = tmp_path / "none"
    assert names(run_cli, cache) == []
    assert run_cli("cache", "clear", "--cache-dir", cache).out == f"0.0 MiB freed in {cache}\n"
    assert not cache.exists()
