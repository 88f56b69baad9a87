"""What a worker may keep weights in beside its device's memory: how much goes there, and how fast it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.errors import ConfigError, OffloadError
from shardwright.runtime.measure import cached_part, machine_memory, offered_bytes, wait_for

if TYPE_CHECKING:
    import torch

PROBE_BYTES = 64 * 1024**2
"""Written and read again to measure a tier."""

_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadTier:
    """A tier that can be used, as measured."""

    name: str  # one of `types.OFFLOADS`
    folder: Path  # of the disk's file
    bandwidth: float  # bytes/s

    def room_bytes(self) -> int:
        """What can be kept there now; 0 where a disk does not answer any more."""
        from shardwright.model.offload_store import free_disk_bytes

        if self.name == "cpu":
            return offered_bytes(machine_memory(), limit_bytes=0)
        try:
            return free_disk_bytes(self.folder)
        except OffloadError:
            return 0


def find_tier(name: str, device: torch.device, cache_dir: Path | None) -> OffloadTier:
    """Measure a tier as stages read it. Blocks for about a second.

    Raises `ConfigError` for a tier that makes no sense on the device, and for a folder that can't be written, whose
    disk is full, or which lies in memory.
    """
    from shardwright.model.offload import check_tier

    assert cache_dir is not None, "a worker has a cache"
    check_tier(name, device)
    folder = cache_dir / "offload"
    if name == "cpu":
        return OffloadTier(name=name, folder=folder, bandwidth=_measure_copies(device))
    try:
        return OffloadTier(name=name, folder=folder, bandwidth=_measure_disk(folder))
    except OffloadError as exc:
        raise ConfigError(f"offload is 'nvme', but {exc}") from exc


def _measure_disk(folder: Path) -> float:
    import torch

    from shardwright.model.offload_store import DiskStore, aligned_buffer

    store = DiskStore(folder, num_bytes=PROBE_BYTES)
    try:
        data = aligned_buffer(PROBE_BYTES)
        data.view(torch.int64).random_()  # a file system that compresses has nothing to gain from it
        store.write(0, data)
        if cached_part(store.fileno(), PROBE_BYTES) > 0.25:
            raise ConfigError(
                f"offload is 'nvme', but {folder} lies in memory, which gains nothing; choose a --cache-dir on a disk"
            )
        return PROBE_BYTES / min(_timed(lambda: store.read(0, data)) for _ in range(_TRIES))
    finally:
        store.close()


def _measure_copies(device: torch.device) -> float:
    import torch

    from shardwright.model.offload_store import HostStore

    store = HostStore()
    into = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    store.write(0, torch.zeros(PROBE_BYTES, dtype=torch.uint8))

    def read() -> None:
        store.read(0, into)
        wait_for(device)

    read()
    return PROBE_BYTES / min(_timed(read) for _ in range(_TRIES))


def _timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return max(time.perf_counter() - begin, 1e-9)
