"""A worker's view of its machine: measures it at the start, answers `Describe`, fills in heartbeats."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright import __version__
from shardwright.runtime.measure import (
    Memory,
    Speed,
    device_memory,
    device_name,
    host_id,
    measure_disk,
    measure_speed,
    offered_bytes,
    resolve_device,
    usable_cores,
)
from shardwright.runtime.offload_tier import find_tier
from shardwright.runtime.telemetry import GpuAddress, GpuProbe, GpuWatch, MachineMonitor, load_nvml
from shardwright.types import PROTOCOL_VERSION, Epoch, HeartbeatReport, StepTiming, WorkerDescription

if TYPE_CHECKING:
    import torch

    from shardwright.runtime.ranks import Ranks


class Machine:
    """The machine under one worker; implements `runtime.worker.MachineProbe`.

    Making one takes up to a second: the device is measured. Raises `ConfigError` for a device that isn't there.
    """

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        memory_bytes: int,
        cache_dir: Path | None = None,
        offload: str = "none",
        kernel_dir: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take the worker's settings: `threads` 0 means every core, `memory_bytes` 0 what the device has free.

        The disk that holds `cache_dir` is measured when that is asked for; None: no disk is. With `offload` what it
        names is measured at once. `kernel_dir` keeps the compiled kernel that stages use. With `ranks`, which have
        met, `threads` are each one's, and what is measured is what all can do together. Raises `ConfigError` where
        offloading can't be used.
        """
        from shardwright.model.devices import half_dtype

        self.device = resolve_device(device)
        self.num_threads = threads or usable_cores()
        self._ranks = ranks
        self._memory_bytes = memory_bytes
        self._cache_dir = cache_dir
        self._kernel_dir = kernel_dir
        self._device_name = device_name(self.device)
        self._speed = self.measure_speed(half_dtype(self.device))
        self.offload = None if offload == "none" else find_tier(offload, self.device, cache_dir)
        self._monitor = MachineMonitor(
            device=str(self.device),
            device_name=self._device_name,
            gpu=GpuWatch(GpuProbe(gpu_address(self.device), nvml=load_nvml())),
        )

    def describe(self, *, stage_bytes: int = 0) -> WorkerDescription:
        """Who this worker is, what it measured at its start, and what memory it has for a stage now.

        `stage_bytes` are held by the present stage: a master that died may have left it, and a new one replaces it.
        """
        import torch

        num_ranks = self._ranks.num_ranks if self._ranks is not None else 1
        memory = self._memory()
        memory = replace(memory, available=min(memory.available + stage_bytes, memory.total))
        return WorkerDescription(
            protocol_version=PROTOCOL_VERSION,
            package_version=__version__,
            torch_version=torch.__version__,
            transformers_version=version("transformers"),
            host_id=host_id(),
            pid=os.getpid(),
            device=str(self.device),
            device_name=self._device_name,
            memory_total_bytes=memory.total,
            memory_available_bytes=offered_bytes(memory, limit_bytes=self._memory_bytes),
            read_bandwidth=self._speed.read_bandwidth,
            matrix_rate=self._speed.matrix_rate,
            num_threads=self.num_threads * num_ranks,
            shared_memory_bytes=offered_bytes(memory, limit_bytes=0),
            offload=self.offload.name if self.offload is not None else "",
            offload_bytes=self.offload.room_bytes() if self.offload is not None else 0,
            offload_bandwidth=self.offload.bandwidth if self.offload is not None else 0.0,
            num_ranks=num_ranks,
        )

    def _memory(self) -> Memory:
        """Of all devices together: each holds an equal part of a stage, so the least one counts for every one."""
        memory = device_memory(self.device)
        if self._ranks is None or self.device.type == "cpu":
            return memory
        count = self._ranks.num_ranks
        return replace(
            memory,
            total=count * min(memory.total, self._ranks.memory_total() or memory.total),
            available=count * min(memory.available, self._ranks.memory_available() or memory.available),
        )

    def report(
        self,
        *,
        epoch: Epoch,
        queue_depth: int,
        steps_done: int,
        busy_s: float,
        uptime_s: float,
        timings: tuple[StepTiming, ...],
    ) -> HeartbeatReport:
        """The machine's state now, with the stage's counters filled in."""
        report = self._monitor.report(
            epoch=epoch,
            queue_depth=queue_depth,
            steps_done=steps_done,
            busy_s=busy_s,
            uptime_s=uptime_s,
            timings=timings,
        )
        return report if self._ranks is None else replace(report, ranks=self._ranks.loads())

    def measure_speed(self, dtype: str) -> Speed:
        """Read bandwidth, and matrix rate at the dtype, now. Blocks for a second; call it where stages compute."""

        def measure() -> Speed:
            return measure_speed(self.device, num_threads=self.num_threads, dtype=dtype, kernel_dir=self._kernel_dir)

        return measure() if self._ranks is None else self._ranks.measure(dtype, measure)

    def measure_disk(self) -> float | None:
        """Bytes/s that weights in the tensor cache can be read with; None where that can't be measured. Blocks."""
        return measure_disk(self._cache_dir) if self._cache_dir is not None else None


def gpu_address(device: torch.device) -> GpuAddress:
    """The GPU whose load a worker reports: its own, or the machine's first where the worker computes on the CPU."""
    import torch

    if device.type != "cuda":
        return GpuAddress()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    return GpuAddress(index=device.index or 0, uuid=str(uuid))
