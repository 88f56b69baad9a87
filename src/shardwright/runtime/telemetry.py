"""How a worker does: its steps' times, and the load of its machine and GPU.

NVML belongs to a driver and may be absent, wrong, half there, or stuck in the kernel. It is therefore asked on a
daemon thread of its own, and a report takes what that thread last learned, if it is fresh.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import psutil

from shardwright.runtime.measure import machine_memory
from shardwright.types import Epoch, HeartbeatReport, StepTiming

log = logging.getLogger(__name__)

MAX_SHAPES = 64
"""Step shapes that one report tells the times of; steps of further shapes are only counted."""

# --- steps -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bucket:
    count: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0


class StepClock:
    """Adds up step times. The compute thread writes it and the event loop takes timings; a lock keeps them apart.

    `steps_done` and `busy_s` are sums since the start; any thread may read them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.steps_done = 0
        self.busy_s = 0.0
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}

    def record(self, *, num_sequences: int, num_tokens: int, seconds: float, concurrency: int = 1) -> None:
        """One step was computed, while so many stages of the device were meant to compute."""
        key = (concurrency, _bucket(num_sequences), _bucket(num_tokens))
        with self._lock:
            self.steps_done += 1
            self.busy_s += seconds
            bucket = self._buckets.get(key)
            if bucket is None:
                if len(self._buckets) == MAX_SHAPES:
                    return
                bucket = self._buckets[key] = _Bucket()
            bucket.count += 1
            bucket.sequences += num_sequences
            bucket.tokens += num_tokens
            bucket.seconds += seconds

    def take(self) -> tuple[StepTiming, ...]:
        """Mean times by shape since they were taken last; they begin anew."""
        with self._lock:
            buckets, self._buckets = self._buckets, {}
        return tuple(
            StepTiming(
                num_sequences=round(b.sequences / b.count),
                num_tokens=round(b.tokens / b.count),
                mean_s=b.seconds / b.count,
                count=b.count,
                concurrency=key[0],
            )
            for key, b in sorted(buckets.items())
        )


def _bucket(count: int) -> int:
    """Counts to 8 have a bucket each; larger ones share it with those of the same three leading bits."""
    shift = max(count.bit_length() - 3, 0)
    return count if count <= 8 else (count >> shift) << shift


# --- the GPU -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """What NVML said of one GPU; None for what it could not say."""

    utilization: float | None  # percent
    memory_used: int | None
    memory_total: int | None
    temperature: float | None = None  # degrees Celsius
    power: float | None = None  # watts


MAX_TEMPERATURE_C = 200.0
MAX_POWER_W = 10_000.0
"""Above these a driver that can't tell has given a figure that means nothing."""

NO_GPU = GpuSample(utilization=None, memory_used=None, memory_total=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAddress:
    """Which GPU to ask about. CUDA's numbers leave hidden GPUs out and NVML's don't, so the UUID goes first."""

    index: int = 0
    uuid: str = ""  # as torch gives it, without `GPU-`


def load_nvml() -> ModuleType | None:
    """The binding to NVML, or None where it is not installed. The driver's library itself is loaded at init."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


class GpuProbe:
    """Asks NVML about one GPU. Blocks for as long as the driver does; every failure becomes a None."""

    def __init__(self, address: GpuAddress, *, nvml: ModuleType | None) -> None:
        self._address = address
        self._nvml: Any = nvml  # the binding has no types
        self._handle: Any = None

    def sample(self) -> GpuSample:
        """The GPU's load now; `NO_GPU` without a GPU that can be asked."""
        if self._nvml is None:
            return NO_GPU
        if self._handle is None:
            self._handle = self._open()
        if self._handle is None:
            return NO_GPU
        used, total = self._memory()
        return GpuSample(
            utilization=self._utilization(),
            memory_used=used,
            memory_total=total,
            temperature=self._temperature(),
            power=self._power(),
        )

    def _open(self) -> Any:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as exc:
            log.debug("NVML can't be used: %s", exc)
            return None
        # A slice of a GPU (MIG) has a UUID of another kind.
        names = [f"{kind}-{self._address.uuid}".encode() for kind in ("GPU", "MIG") if self._address.uuid]
        for name in names:
            try:
                return nvml.nvmlDeviceGetHandleByUUID(name)
            except nvml.NVMLError:
                continue
        try:
            return nvml.nvmlDeviceGetHandleByIndex(self._address.index)
        except nvml.NVMLError as exc:
            log.debug("NVML knows no GPU %d: %s", self._address.index, exc)
            return None

    def _utilization(self) -> float | None:
        try:
            percent = float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._nvml.NVMLError:
            return None
        return percent if 0 <= percent <= 100 else None

    def _memory(self) -> tuple[int | None, int | None]:
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError:
            return None, None
        used, total = int(memory.used), int(memory.total)
        return (used, total) if 0 <= used <= total and total > 0 else (None, None)

    def _temperature(self) -> float | None:
        for name in ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"):  # drivers may have but one of them
            ask = getattr(self._nvml, name, None)
            if ask is None:
                continue
            with contextlib.suppress(self._nvml.NVMLError):
                degrees = float(ask(self._handle, self._nvml.NVML_TEMPERATURE_GPU))
                return degrees if 0 <= degrees <= MAX_TEMPERATURE_C else None
        return None

    def _power(self) -> float | None:
        try:
            watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        except self._nvml.NVMLError:
            return None
        return watts if 0 <= watts <= MAX_POWER_W else None


class GpuWatch:
    """Keeps a probe's last sample, taken on a daemon thread so that a stuck driver stops nothing but that thread."""

    def __init__(
        self,
        probe: GpuProbe,
        *,
        patience_s: float = 0.25,
        max_age_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._patience_s = patience_s
        self._max_age_s = max_age_s
        self._now = clock
        self._wanted = threading.Semaphore(0)
        self._changed = threading.Condition()
        self._is_asking = False
        self._last: tuple[float, GpuSample] | None = None
        self._thread: threading.Thread | None = None

    def sample(self) -> GpuSample:
        """The GPU's load: now, if the driver answers soon, else the last known, else `NO_GPU`."""
        with self._changed:
            if not self._is_asking:
                self._is_asking = True
                self._wanted.release()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gpu watch", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: not self._is_asking, timeout=self._patience_s)
            if self._last is None or self._now() - self._last[0] > self._max_age_s:
                return NO_GPU
            return self._last[1]

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            sample = self._probe.sample()
            with self._changed:
                self._last = self._now(), sample
                self._is_asking = False
                self._changed.notify_all()


# --- the machine -------------------------------------------------------------------------------------


class CpuMeter:
    """The load of all cores since somebody asked last.

    Whoever asks soon after another gets the same answer, so that many who look on don't shorten each other's intervals
    to nothing.
    """

    def __init__(
        self,
        *,
        min_interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        """`read` gives the cores' seconds so far: busy, and all."""
        self._min_interval_s = min_interval_s
        self._now = clock
        self._read = read or _cpu_seconds
        self._lock = threading.Lock()
        self._last = self._read()
        self._last_s: float | None = None  # when the percentage was taken; None before the first
        self._percent = 0.0

    def percent(self) -> float:
        """0 to 100, over no less than the least interval, but for the first time. Any thread may ask."""
        with self._lock:
            now = self._now()
            if self._last_s is not None and now - self._last_s < self._min_interval_s:
                return self._percent
            busy, total = self._read()
            if total > self._last[1]:
                self._percent = min(max(100 * (busy - self._last[0]) / (total - self._last[1]), 0.0), 100.0)
                self._last = busy, total
                self._last_s = now
            return self._percent


def _cpu_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # these are in user and nice
    return total - times.idle - getattr(times, "iowait", 0.0), total


class MachineMonitor:
    """Fills in a heartbeat's report. Blocks for a quarter of a second at most; may be called from any thread."""

    def __init__(
        self, *, device: str, device_name: str, gpu: GpuWatch | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self._device = device
        self._device_name = device_name
        self._gpu = gpu
        self._now = clock or _wall_clock
        self._process = psutil.Process()
        self._cpu = CpuMeter()

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
        gpu = self._gpu.sample() if self._gpu is not None else NO_GPU
        memory = machine_memory()
        return HeartbeatReport(
            timestamp=self._now(),
            epoch=epoch,
            queue_depth=queue_depth,
            steps_done=steps_done,
            busy_s=busy_s,
            uptime_s=uptime_s,
            device=self._device,
            device_name=self._device_name,
            gpu_utilization=gpu.utilization,
            gpu_memory_used_bytes=gpu.memory_used,
            gpu_memory_total_bytes=gpu.memory_total,
            cpu_utilization=self._cpu.percent(),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            process_memory_bytes=self._process.memory_info().rss,
            timings=timings,
            gpu_temperature_c=gpu.temperature,
            gpu_power_w=gpu.power,
        )


def _wall_clock() -> float:
    """Seconds since 1970."""
    return datetime.now(tz=UTC).timestamp()
