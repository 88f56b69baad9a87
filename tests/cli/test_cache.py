"""`shardwright cache` shows and removes the tensors and compiled kernels of a cache folder."""

import json
import os

import pytest

from shardwright.model.kernel_build import locked

MIB = 1024 * 1024
ROW_FIELDS = {"kind", "name", "num_bytes", "last_used"}


@pytest.fixture
def tensors(tmp_path):
    """A cache folder with two tensors and no kernels."""
    for letter, size in (("a", 2**20), ("b", 2**19)):
        folder = tmp_path / "cache" / "tensors" / (letter * 2)
        folder.mkdir(parents=True)
        (folder / (letter * 64)).write_bytes(b"\0" * size)
    os.utime(folder / (letter * 64), (1_000_000, 1_000_000))
    return tmp_path / "cache"


def test_cache_ls_lists_the_least_recently_used_first(run_cli, tensors):
    outcome = run_cli("cache", "ls", "--cache-dir", tensors)
    lines = [line for line in outcome.out.splitlines() if "│" in line]
    assert ["b" * 16 in lines[0], "a" * 16 in lines[1]] == [True, True]
    assert "1970-01-12" in lines[0]
    assert outcome.out.splitlines()[-1].startswith("2 tensors, 1.5 MiB of at most 51200 MiB, in ")


def test_cache_ls_as_json(run_cli, tensors):
    first, second = json.loads(run_cli("cache", "ls", "--json", "--cache-dir", tensors).out)
    assert first == {
        "kind": "tensor",
        "sha256": "b" * 64,
        "num_bytes": 2**19,
        "last_used": 1_000_000.0,
        "partial": False,
    }
    assert second["num_bytes"] == 2**20


def test_cache_clear_frees_what_was_there(run_cli, tensors):
    assert run_cli("cache", "clear", "--cache-dir", tensors).out == f"1.5 MiB freed in {tensors}\n"
    assert run_cli("cache", "ls", "--cache-dir", tensors).out.startswith("0 tensors, 0.0 MiB")


# --- kernels ---------------------------------------------------------------------------------------------------


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
    assert shown.splitlines()[-2].startswith("0 tensors, 0.0 MiB of at most")
    assert shown.splitlines()[-1] == f"3 compiled kernels, 3.0 MiB, in {cache / 'kernels'}"


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


def test_a_cache_that_is_not_there_is_empty(run_cli, tmp_path):
    cache = tmp_path / "none"
    assert names(run_cli, cache) == []
    assert run_cli("cache", "clear", "--cache-dir", cache).out == f"0.0 MiB freed in {cache}\n"
    assert not cache.exists()
