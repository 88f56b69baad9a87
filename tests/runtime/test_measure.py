"""What a worker finds out about its machine."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from shardwright.errors import ConfigError
from shardwright.runtime import measure
from shardwright.runtime.measure import (
    Memory,
    device_memory,
    device_name,
    host_id,
    machine_memory,
    measure_disk,
    measure_speed,
    offered_bytes,
    resolve_device,
    usable_cores,
)
from shardwright.runtime.probe import Machine, gpu_address

CPU = torch.device("cpu")
IN_MEMORY = Path("/dev", "shm")


# --- the device --------------------------------------------------------------------------------------


def test_the_cpu_has_a_name():
    assert device_name(CPU).strip()


# --- memory and cores --------------------------------------------------------------------------------


def test_memory_is_the_machines_or_less():
    memory = device_memory(CPU)
    assert 0 < memory.available <= memory.total <= psutil.virtual_memory().total


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Control groups made of files; gives a function that writes one."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    root.mkdir()
    membership.write_text("0::/app/worker\n5:memory:/pod\n3:cpu,cpuacct:/pod\n")
    folders = measure._cgroup_folders
    monkeypatch.setattr(measure, "_cgroup_folders", lambda controller: folders(controller, root, membership))

    def write(path, text):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


GIB = 1024**3


def test_a_containers_limit_counts_without_its_droppable_file_cache(cgroups):
    cgroups("app/memory.max", f"{GIB}\n")
    cgroups("app/memory.current", f"{GIB // 2}\n")
    cgroups("app/memory.stat", f"anon 1\ninactive_file {GIB // 4}\nactive_file 3\n")
    cgroups("app/worker/memory.max", "max\n")
    cgroups("app/worker/memory.current", "17\n")
    memory = machine_memory()
    assert memory.total == GIB
    assert memory.available == min(GIB * 3 // 4, psutil.virtual_memory().available)


def test_an_older_kernels_limit_counts_too(cgroups):
    cgroups("memory/pod/memory.limit_in_bytes", f"{GIB // 8}\n")
    cgroups("memory/pod/memory.usage_in_bytes", f"{GIB}\n")
    assert machine_memory() == Memory(total=GIB // 8, available=0)


def test_without_limits_the_machines_memory_stays(cgroups):
    cgroups("memory/pod/memory.limit_in_bytes", "9223372036854771712\n")
    cgroups("memory/pod/memory.usage_in_bytes", "5\n")
    cgroups("app/memory.max", "nonsense\n")
    assert machine_memory().total == psutil.virtual_memory().total


def test_only_of_a_group_with_a_limit_the_kernel_is_asked_what_it_uses(cgroups, monkeypatch):
    for folder, limit in (("app", "max\n"), ("app/worker", f"{GIB}\n"), ("memory/pod", f"{10**6 * GIB}\n")):
        cgroups(f"{folder}/memory.max", limit)
        cgroups(f"{folder}/memory.current", "17\n")
        cgroups(f"{folder}/memory.stat", "inactive_file 3\n")
    read, asked = measure._read, []
    monkeypatch.setattr(measure, "_read", lambda path: (asked.append(path), read(path))[1])
    assert machine_memory().total == GIB
    assert [path.parent.name for path in asked if path.name == "memory.stat"] == ["worker"]


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [("app/cpu.max", "150000 100000\n", 2), ("app/cpu.max", "max 100000\n", 4), ("app/cpu.max", "10000 100000\n", 1)],
)
def test_a_containers_share_of_the_cores_counts(cgroups, monkeypatch, file, text, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    cgroups(file, text)
    assert usable_cores() == cores


def test_an_older_kernels_share_of_the_cores_counts_too(cgroups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    cgroups("cpu/pod/cpu.cfs_quota_us", "300000\n")
    cgroups("cpu/pod/cpu.cfs_period_us", "100000\n")
    assert usable_cores() == 3


def test_a_worker_offers_most_of_what_is_free_and_no_more_than_its_limit():
    memory = Memory(total=1000, available=500)
    assert offered_bytes(memory, limit_bytes=0) == 450
    assert offered_bytes(memory, limit_bytes=300) == 300
    assert offered_bytes(memory, limit_bytes=900) == 450


# --- host and speed ----------------------------------------------------------------------------------


def test_processes_of_one_machine_have_one_host_id():
    code = "from shardwright.runtime.measure import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == host_id()
    assert re.fullmatch(r"[0-9a-f]{16}", host_id())


def test_machines_differ_by_their_boot_and_without_one_by_their_names(monkeypatch):
    real = host_id()
    monkeypatch.setattr(measure, "_read", lambda _: None)
    nameless = host_id()
    monkeypatch.setattr(measure.socket, "gethostname", lambda: "another")
    assert len({real, nameless, host_id()}) == 3


def test_a_measurement_is_short_plausible_and_gives_its_memory_back():
    """The bounds are far apart: from a busy small board to the fastest server."""
    measure_speed(CPU, num_threads=1)  # what libraries keep for good, they keep once
    before = psutil.Process().memory_info().rss
    threads = torch.get_num_threads()
    start = time.perf_counter()
    speed = measure_speed(CPU, num_threads=1)
    assert time.perf_counter() - start < 10
    assert 1e8 < speed.read_bandwidth < 1e13
    assert 1e8 < speed.matrix_rate < 1e16
    assert torch.get_num_threads() == threads
    assert psutil.Process().memory_info().rss - before < measure.READ_BUFFER_BYTES // 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_matrix_rate_is_of_the_dtype_that_was_asked_for(monkeypatch, dtype):
    multiplied = set()
    matmul = torch.matmul

    def watched(left, right):
        multiplied.update((left.dtype, right.dtype))
        return matmul(left, right)

    monkeypatch.setattr(torch, "matmul", watched)
    assert 1e7 < measure_speed(CPU, num_threads=1, dtype=dtype).matrix_rate < 1e16
    assert multiplied == {getattr(torch, dtype)}


@pytest.mark.parametrize(("dtype", "counts"), [("bfloat16", True), ("float32", False)])
def test_the_kernel_that_stages_use_counts_for_16_bits(monkeypatch, tmp_path, dtype, counts):
    class Instant:
        def can_multiply(self, asked):
            return asked is torch.bfloat16

        def linear(self, left, right, bias):
            return None

    monkeypatch.setattr("shardwright.model.product.built_product", lambda _: Instant())
    rate = measure_speed(CPU, num_threads=1, dtype=dtype, kernel_dir=tmp_path).matrix_rate
    assert (rate > 5e12) == counts  # a call of nothing takes a microsecond at most, no core is as fast


# --- the disk ----------------------------------------------------------------------------------------

no_page_cache_control = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache can't be dropped")


@pytest.fixture
def small_files(monkeypatch):
    """Files that are written in no time."""
    monkeypatch.setattr(measure, "DISK_FILE_BYTES", 8 << 20)


@no_page_cache_control
def test_a_disk_is_read_and_nothing_is_left_on_it(small_files, tmp_path):
    bandwidth = measure_disk(tmp_path / "made" / "for it")
    assert bandwidth is None or 1e5 < bandwidth < 1e12  # None: the temporary folder lies in memory
    assert list(tmp_path.rglob("*")) == [tmp_path / "made", tmp_path / "made" / "for it"]


@no_page_cache_control
def test_a_file_that_stays_in_memory_tells_nothing_of_the_disk(small_files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # as a file system in memory takes it
    assert measure_disk(tmp_path) is None


@no_page_cache_control
@pytest.mark.skipif(not IN_MEMORY.is_mount(), reason="there is no file system in memory")
def test_memory_is_not_taken_for_a_disk(small_files):
    assert measure_disk(IN_MEMORY) is None


def test_a_disk_that_is_nearly_full_or_read_only_is_left_alone(small_files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert measure_disk(tmp_path / "file") is None
    if hasattr(os, "posix_fadvise"):
        monkeypatch.setattr(measure, "DISK_FILE_BYTES", 1 << 60)
        assert measure_disk(tmp_path) is None


def test_a_system_that_keeps_files_cached_has_no_disk_to_measure(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert measure_disk(tmp_path) is None


def test_a_machine_measures_itself_again_when_asked(small_files, tmp_path, monkeypatch):
    machine = Machine(device="cpu", threads=1, memory_bytes=0, cache_dir=tmp_path)
    monkeypatch.setattr("shardwright.runtime.probe.measure_disk", lambda folder: (folder, 5.0))
    assert machine.measure_disk() == (tmp_path, 5.0)
    speed = machine.measure_speed("bfloat16")
    assert min(speed.read_bandwidth, speed.matrix_rate) > 1e8


def test_a_machine_describes_itself():
    machine = Machine(device="cpu", threads=1, memory_bytes=123_456)
    description = machine.describe()
    assert (description.device, description.num_threads, description.pid) == ("cpu", 1, os.getpid())
    assert description.memory_available_bytes == 123_456
    assert 123_456 < description.shared_memory_bytes < description.memory_total_bytes
    assert description.torch_version == torch.__version__
    assert description.host_id == host_id()
    assert machine.measure_disk() is None  # it was not told where its tensors are
    report = machine.report(epoch=3, queue_depth=1, steps_done=2, busy_s=0.5, uptime_s=9.0, timings=())
    assert (report.epoch, report.queue_depth, report.steps_done) == (3, 1, 2)
    assert report.device_name == description.device_name


def test_a_machine_refuses_a_device_that_is_not_there():
    with pytest.raises(ConfigError, match="cuda:99"):
        Machine(device="cuda:99", threads=1, memory_bytes=0)


def test_a_worker_on_the_cpu_watches_the_machines_first_gpu():
    assert (gpu_address(CPU).index, gpu_address(CPU).uuid) == (0, "")


@pytest.mark.gpu
def test_a_gpu_measures_itself():
    device = resolve_device("cuda")
    speed = measure_speed(device, num_threads=1)
    assert 1e10 < speed.read_bandwidth < 1e14
    assert 1e11 < speed.matrix_rate < 1e17
    assert 0 < device_memory(device).available <= device_memory(device).total
    assert gpu_address(device).uuid
