"""What a worker's machine is and how fast it is: device, memory, host, and a few short measurements.

Everything here is asked of the machine itself: at a worker's start, which takes under a second together, and when
somebody wants to know what the machine can do now.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import psutil

if TYPE_CHECKING:
    import torch

    from shardwright.model.product import Product

    _Multiply: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]  # two square matrices

_MIB = 1024**2

READ_BUFFER_BYTES = 128 * _MIB
"""Read on a CPU: beyond most caches, small beside any shard. A GPU, whose caches are as large, reads eight times it."""

MEMORY_SHARE = 0.9
"""Of what is free, the part that a worker offers for weights and KV; the rest is for the system and other processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a device measured of itself."""

    read_bandwidth: float  # bytes/s
    matrix_rate: float  # operations/s in the dtype that was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A device's memory in bytes, as far as this process may use it."""

    total: int
    available: int


# --- the device --------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """The device of a name (`model.devices`), for those who must not wait for torch before they need it."""
    from shardwright.model import devices

    return devices.resolve_device(name)


def device_name(device: torch.device) -> str:
    """What the device calls itself, for people."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = _cpu_model() or platform.processor() or platform.machine() or "CPU"
    return f"{name} GPU" if device.type == "mps" else name


def _cpu_model() -> str | None:
    text = _read(Path("/proc/cpuinfo"))
    match = re.search(r"^model name\s*:\s*(.+)$", text or "", re.MULTILINE)
    return match.group(1).strip() if match else None


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's share if that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [affinity]
    for folder in _cgroup_folders("cpu"):
        period: str | None
        quota, _, period = (_read(folder / "cpu.max") or "").strip().partition(" ")
        if not quota:  # version 1
            quota = (_read(folder / "cpu.cfs_quota_us") or "").strip()
            period = (_read(folder / "cpu.cfs_period_us") or "").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(math.ceil(int(quota) / int(period)))
    return max(min(quotas), 1)


# --- memory ------------------------------------------------------------------------------------------


def device_memory(device: torch.device) -> Memory:
    """Total and available memory of the device; a CPU's and an Apple GPU's is the machine's."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total=total, available=free)
    return machine_memory()


def machine_memory() -> Memory:
    """The machine's memory, or what a container leaves of it."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for folder in _cgroup_folders("memory"):
        limit, used, reclaimable = _cgroup_memory(folder, below=int(machine.total))
        if limit is not None:
            total = min(total, limit)
            available = min(available, max(limit - used + reclaimable, 0))
    return Memory(total=total, available=available)


def offered_bytes(memory: Memory, *, limit_bytes: int) -> int:
    """What a worker offers for weights and KV: most of what is available, and no more than the limit (0: none)."""
    offered = int(memory.available * MEMORY_SHARE)
    return min(offered, limit_bytes) if limit_bytes > 0 else offered


def _cgroup_memory(folder: Path, *, below: int) -> tuple[int | None, int, int]:
    """(limit, used, of that file cache that the kernel gives back when asked); version 2, then version 1.

    None where there is no limit below this one. The rest is not read then: the kernel adds it up for whoever asks.
    """
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = (_read(folder / limit_file) or "").strip()
        if not limit:
            continue
        if not limit.isdigit() or int(limit) >= below:
            return None, 0, 0
        used = (_read(folder / used_file) or "").strip()
        match = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
        if used.isdigit():
            return int(limit), int(used), int(match.group(1)) if match else 0
        return None, 0, 0
    return None, 0, 0


def _cgroup_folders(
    controller: str, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """This process's control groups for a controller and all above them: each may set a limit.

    Inside a container the group's path may be the host's and not exist here; the root then stands for it.
    """
    folders: dict[Path, None] = {root: None, root / controller: None}
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        for part in Path(path.lstrip("/")).parts:
            folder /= part
            folders[folder] = None
    return [folder for folder in folders if folder.is_dir()]


def _read(path: Path) -> str | None:
    """A small system file's text; None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


# --- the host ----------------------------------------------------------------------------------------


def host_id() -> str:
    """An id that is equal for processes that share a machine's cores, also from different containers.

    Linux's boot id is the kernel's: all containers of a machine see the same, and no two machines do. Elsewhere the
    machine's id or network address stands for it.
    """
    boot = _read(Path("/proc/sys/kernel/random/boot_id"))
    source = boot.strip() if boot else f"{_read(Path('/etc/machine-id')) or ''} {socket.gethostname()}"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


# --- speed -------------------------------------------------------------------------------------------


def measure_speed(
    device: torch.device, *, num_threads: int, dtype: str = "bfloat16", kernel_dir: Path | None = None
) -> Speed:
    """Measure the device's read bandwidth and its matrix rate; under a second, and its memory is free afterwards.

    `dtype` is of the matrices: float32, bfloat16 or float16. The rate is the better one of torch's product and of the
    kernel that stages of a CPU may use (`model/product.py`), where it lies in `kernel_dir`.

    Both are the best of a few tries: what else runs on the machine can make a try slower, never faster. Leaves the
    calling thread's number of torch threads as it was.
    """
    import torch

    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            # One thread first, to learn what size fits the time: several on a busy machine wait for each other.
            torch.set_num_threads(1)
            products: list[_Multiply] = [torch.matmul]
            own = _own_product(device, dtype, kernel_dir)
            if own is not None:
                products.append(functools.partial(own.linear, bias=None))
            small = [_matrix_rate(device, 256, dtype, product) for product in products]
            torch.set_num_threads(num_threads)
            # Each product grows at its own pace: torch's may be a hundred times slower than ours at 16 bits.
            rate = max(map(functools.partial(_best_rate, device, dtype), products, small))
            return Speed(read_bandwidth=_read_bandwidth(device), matrix_rate=rate)
    finally:
        torch.set_num_threads(before)


def _read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a sum over a buffer: the simplest thing that reads every byte once."""
    import torch

    num_bytes = READ_BUFFER_BYTES
    if device.type == "cuda" and device_memory(device).available > 32 * READ_BUFFER_BYTES:
        num_bytes *= 8
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best = _best_time(device, buffer.sum, tries=12, limit_s=0.25)
    del buffer
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return num_bytes / best


def _own_product(device: torch.device, dtype: str, kernel_dir: Path | None) -> Product | None:
    """The kernel of our own, where a stage on the device could use it."""
    if kernel_dir is None or device.type != "cpu" or dtype == "float32":
        return None
    import torch

    from shardwright.model.product import built_product

    product = built_product(kernel_dir)
    return product if product is not None and product.can_multiply(getattr(torch, dtype)) else None


def _best_rate(device: torch.device, dtype: str, product: _Multiply, rate: float) -> float:
    """The best rate of a product, tried on larger matrices for as long as that takes no time worth naming."""
    for size, limit_s in ((1024, 0.4), (4096, 0.05)):
        if 2 * size**3 / rate > limit_s:
            break
        rate = max(rate, _matrix_rate(device, size, dtype, product))
    return rate


def _matrix_rate(device: torch.device, size: int, dtype: str, product: _Multiply) -> float:
    """Operations/s of a square product."""
    import torch

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    left = torch.ones(size, size, dtype=kind, device=device)
    right = torch.ones(size, size, dtype=kind, device=device)
    best = _best_time(device, functools.partial(product, left, right), tries=8, limit_s=0.08)
    return 2 * size**3 / best


def _best_time(device: torch.device, work: Callable[[], object], *, tries: int, limit_s: float) -> float:
    """Seconds of the fastest of some tries after one to warm up; stops trying after the limit."""
    begin = time.perf_counter()
    work()
    wait_for(device)
    best = time.perf_counter() - begin
    for _ in range(tries):
        start = time.perf_counter()
        if start - begin > limit_s:
            break
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- the disk ----------------------------------------------------------------------------------------

DISK_FILE_BYTES = 64 * _MIB
"""Written and read again to measure a disk; a disk without ten times the room is left alone."""

_DISK_CHUNK_BYTES = 4 * _MIB
_DISK_LIMIT_S = 2.0


def measure_disk(folder: Path) -> float | None:
    """Bytes/s that a new file in the folder is read with, past the page cache; None where that can't be measured.

    None where the system has no way to drop the file from the cache, where it is there all the same (a file system in
    memory), and where the disk is nearly full or can't be written. Takes as long as the disk does to write and read
    64 MiB, reading at most two seconds. Blocks; the file has no name and is gone whatever happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(folder)
        if space.f_bavail * space.f_frsize < 10 * DISK_FILE_BYTES:
            return None
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            block = os.urandom(_MIB)  # a file system that compresses has nothing to gain from it
            for _ in range(DISK_FILE_BYTES // _MIB):
                stream.write(block)
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_part(stream.fileno(), DISK_FILE_BYTES) > 0.25:
                return None
            return _disk_bandwidth(stream.fileno())
    except OSError:
        return None


def _disk_bandwidth(file: int) -> float:
    buffer = bytearray(_DISK_CHUNK_BYTES)
    done = 0
    begin = time.perf_counter()
    while done < DISK_FILE_BYTES and time.perf_counter() - begin < _DISK_LIMIT_S:
        done += os.preadv(file, [buffer], done)
    return done / max(time.perf_counter() - begin, 1e-9)


def cached_part(file: int, num_bytes: int) -> float:
    """Which part of the file's beginning lies in memory; 0 where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None).mincore
    except (OSError, AttributeError):
        return 0.0
    num_pages = num_bytes // mmap.PAGESIZE
    is_resident = (ctypes.c_ubyte * num_pages)()
    with mmap.mmap(file, num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        start = ctypes.c_char.from_buffer(view)
        status = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(num_bytes), is_resident)
        del start  # while it points there, the file can't be unmapped
    return sum(page & 1 for page in is_resident) / num_pages if status == 0 else 0.0
