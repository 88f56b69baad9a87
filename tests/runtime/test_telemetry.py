"""Step times, the machine's load, and NVML in all the ways it can fail."""

import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from shardwright.runtime.telemetry import (
    MAX_SHAPES,
    NO_GPU,
    GpuAddress,
    GpuProbe,
    GpuSample,
    GpuWatch,
    MachineMonitor,
    StepClock,
    load_nvml,
)
from shardwright.types import StepTiming

# --- steps -------------------------------------------------------------------------------------------


def test_steps_of_one_shape_are_averaged_and_told_once():
    clock = StepClock()
    clock.record(num_sequences=1, num_tokens=1, seconds=0.25)
    clock.record(num_sequences=1, num_tokens=1, seconds=0.75)
    clock.record(num_sequences=2, num_tokens=7, seconds=2.0)
    assert clock.take() == (
        StepTiming(num_sequences=1, num_tokens=1, mean_s=0.5, count=2),
        StepTiming(num_sequences=2, num_tokens=7, mean_s=2.0, count=1),
    )
    assert clock.take() == ()
    assert (clock.steps_done, clock.busy_s) == (3, 3.0)


def test_large_shapes_that_are_close_share_a_mean():
    clock = StepClock()
    for tokens in (512, 513, 517):
        clock.record(num_sequences=9, num_tokens=tokens, seconds=1.0)
    clock.record(num_sequences=9, num_tokens=700, seconds=1.0)
    assert [(t.num_tokens, t.count) for t in clock.take()] == [(514, 3), (700, 1)]


def test_shapes_are_bounded_and_further_steps_still_counted():
    clock = StepClock()
    for power in range(MAX_SHAPES + 36):
        clock.record(num_sequences=1, num_tokens=2**power, seconds=1.0)
    assert (clock.steps_done, len(clock.take())) == (MAX_SHAPES + 36, MAX_SHAPES)


def test_no_step_is_lost_between_two_threads():
    clock = StepClock()
    steps = 20_000

    def compute():
        for _ in range(steps):
            clock.record(num_sequences=1, num_tokens=1, seconds=1.0)

    thread = threading.Thread(target=compute)
    thread.start()
    seen = 0
    while thread.is_alive():
        seen += sum(timing.count for timing in clock.take())
    thread.join()
    assert seen + sum(timing.count for timing in clock.take()) == steps
    assert (clock.steps_done, clock.busy_s) == (steps, float(steps))


# --- a fake binding ----------------------------------------------------------------------------------


class FakeNvml:
    """Behaves as `pynvml` does, over GPUs that the test sets. Names in `broken` raise `NVMLError`."""

    class NVMLError(Exception):
        """Base of all errors of the binding."""

    def __init__(self, *gpus):
        self.gpus = list(gpus)
        self.broken = set()
        self.hang = None
        self.asked = []

    def _call(self, name):
        self.asked.append(name)
        if self.hang is not None:
            self.hang.wait()
        if name in self.broken:
            raise self.NVMLError(f"{name}: Unknown Error")

    def nvmlInit(self):  # noqa: N802  the binding's name
        self._call("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802  the binding's name
        self._call("nvmlDeviceGetHandleByUUID")
        for gpu in self.gpus:
            if gpu["uuid"].encode() == uuid:
                return gpu
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802  the binding's name
        self._call("nvmlDeviceGetHandleByIndex")
        if index >= len(self.gpus):
            raise self.NVMLError("Invalid Argument")
        return self.gpus[index]

    def nvmlDeviceGetUtilizationRates(self, gpu):  # noqa: N802  the binding's name
        self._call("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=gpu["busy"], memory=0)

    def nvmlDeviceGetMemoryInfo(self, gpu):  # noqa: N802  the binding's name
        self._call("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=gpu["used"], total=gpu["total"], free=gpu["total"] - gpu["used"])


def gpu(busy=10, used=30, total=100, uuid="GPU-a"):
    return {"busy": busy, "used": used, "total": total, "uuid": uuid}


def test_a_probe_follows_the_gpu():
    card = gpu()
    probe = GpuProbe(GpuAddress(), nvml=FakeNvml(card))
    assert probe.sample() == GpuSample(utilization=10.0, memory_used=30, memory_total=100)
    card |= {"busy": 95, "used": 60}
    assert probe.sample() == GpuSample(utilization=95.0, memory_used=60, memory_total=100)


def test_the_gpu_is_found_by_its_uuid_where_numbers_differ():
    nvml = FakeNvml(gpu(busy=1, uuid="GPU-a"), gpu(busy=2, uuid="GPU-b"), gpu(busy=3, uuid="MIG-c"))
    for uuid, busy in (("b", 2), ("c", 3), ("unknown", 1), ("", 1)):
        assert GpuProbe(GpuAddress(index=0, uuid=uuid), nvml=nvml).sample().utilization == busy


def test_a_call_that_fails_leaves_the_others():
    nvml = FakeNvml(gpu())
    probe = GpuProbe(GpuAddress(), nvml=nvml)
    nvml.broken = {"nvmlDeviceGetUtilizationRates"}
    assert probe.sample() == GpuSample(utilization=None, memory_used=30, memory_total=100)
    nvml.broken = {"nvmlDeviceGetMemoryInfo"}
    assert probe.sample() == GpuSample(utilization=10.0, memory_used=None, memory_total=None)
    nvml.broken = set()
    assert probe.sample() == GpuSample(utilization=10.0, memory_used=30, memory_total=100)


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_without_a_gpu_to_ask_there_is_no_sample(call):
    nvml = FakeNvml(gpu())
    nvml.broken = {call}
    probe = GpuProbe(GpuAddress(), nvml=nvml)
    assert probe.sample() == NO_GPU
    nvml.broken = set()  # a driver that comes later is found
    assert probe.sample().utilization == 10.0


def test_without_the_binding_there_is_no_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert load_nvml() is None
    assert GpuProbe(GpuAddress(), nvml=None).sample() == NO_GPU


def test_impossible_figures_are_left_out():
    card = gpu(busy=4_000_000_000, used=200, total=100)
    probe = GpuProbe(GpuAddress(), nvml=FakeNvml(card))
    assert probe.sample() == NO_GPU
    card |= {"busy": 50, "used": 0, "total": 0}
    assert probe.sample() == GpuSample(utilization=50.0, memory_used=None, memory_total=None)


# --- the watch ---------------------------------------------------------------------------------------


def test_a_driver_that_hangs_costs_a_moment_and_no_more():
    """The first report waits briefly and has no GPU; once the driver answers, so do the reports."""
    nvml = FakeNvml(gpu())
    nvml.hang = threading.Event()
    watch = GpuWatch(GpuProbe(GpuAddress(), nvml=nvml), patience_s=0.01)
    start = time.monotonic()
    assert [watch.sample() for _ in range(3)] == [NO_GPU] * 3
    assert time.monotonic() - start < 5
    assert nvml.asked == ["nvmlInit"]  # nobody queues up behind it
    nvml.hang.set()
    deadline = time.monotonic() + 10
    while watch.sample() == NO_GPU and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.sample().utilization == 10.0


def test_a_sample_serves_while_the_driver_is_slow_but_not_for_ever():
    nvml = FakeNvml(gpu())
    now = [0.0]
    watch = GpuWatch(GpuProbe(GpuAddress(), nvml=nvml), patience_s=5.0, max_age_s=15.0, clock=lambda: now[0])
    assert watch.sample().utilization == 10.0
    nvml.hang = threading.Event()
    watch._patience_s = 0.01
    now[0] = 15.0
    assert watch.sample().utilization == 10.0
    now[0] = 15.1
    assert watch.sample() == NO_GPU
    nvml.hang.set()


# --- the real binding over a stand-in library --------------------------------------------------------

STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int figure(const char *name, int otherwise) {
  char line[64]; int value; FILE *file = fopen(getenv("FIGURES"), "r");
  while (file && fscanf(file, "%63s %d", line, &value) == 2)
    if (!strcmp(line, name)) { fclose(file); return value; }
  if (file) fclose(file);
  return otherwise;
}
int nvmlInitWithFlags(unsigned flags) { return figure("init", 0); }
int nvmlInit_v2(void) { return figure("init", 0); }
const char *nvmlErrorString(int code) { return "stand-in error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)1; return index ? 2 : 0; }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
  rates[0] = figure("busy", 0); rates[1] = 0; return figure("busy_error", 0);
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
  memory[0] = 1000; memory[2] = figure("used", 0); memory[1] = memory[0] - memory[2]; return 0;
}
"""

ASK = """
import pathlib, sys
from shardwright.runtime.telemetry import GpuAddress, GpuProbe, load_nvml
probe = GpuProbe(GpuAddress(), nvml=load_nvml())
for figures in sys.argv[2:]:
    pathlib.Path(sys.argv[1]).write_text(figures)
    sample = probe.sample()
    print(sample.utilization, sample.memory_used, sample.memory_total)
"""


def ask(folder, *figures):
    """What a process sees of a GPU, step by step, whose NVML library lies in the folder."""
    path = folder / "figures"
    run = subprocess.run(
        [sys.executable, "-c", ASK, path, *figures],
        check=True,
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": str(folder), "FIGURES": str(path), "PATH": "/usr/bin:/bin"},
    )
    return run.stdout.splitlines()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for NVIDIA's library is compiled here")
def test_the_real_binding_reads_a_library_whose_figures_change_and_fail(tmp_path):
    source = tmp_path / "nvml.c"
    source.write_text(STAND_IN)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", source], check=True)
    assert ask(
        tmp_path, "init 9", "busy 12 used 300", "busy 77 used 400", "busy 5 busy_error 3 used 1", "busy 1 used 2000"
    ) == ["None None None", "12.0 300 1000", "77.0 400 1000", "None 1 1000", "1.0 None None"]


@pytest.mark.parametrize("content", [None, b"not a library", b""])
def test_a_library_that_is_absent_or_wrong_means_no_gpu(tmp_path, content):
    if content is not None:
        (tmp_path / "libnvidia-ml.so.1").write_bytes(content)
    assert ask(tmp_path, "busy 12 used 300") == ["None None None"]


# --- the machine -------------------------------------------------------------------------------------

COUNTERS = {"epoch": 2, "queue_depth": 3, "steps_done": 4, "busy_s": 1.5, "uptime_s": 60.0, "timings": ()}


def test_a_report_tells_the_machines_load_and_the_stages_counters():
    monitor = MachineMonitor(device="cpu", device_name="some CPU", clock=lambda: 1234.5)
    report = monitor.report(**COUNTERS)
    assert {name: getattr(report, name) for name in COUNTERS} == COUNTERS
    assert (report.timestamp, report.device, report.device_name) == (1234.5, "cpu", "some CPU")
    assert (report.gpu_utilization, report.gpu_memory_used_bytes, report.gpu_memory_total_bytes) == (None, None, None)
    assert 0 <= report.cpu_utilization <= 100
    assert 0 < report.memory_used_bytes < report.memory_total_bytes
    assert 0 < report.process_memory_bytes < report.memory_total_bytes


def test_a_report_tells_the_gpus_load_where_there_is_one():
    watch = GpuWatch(GpuProbe(GpuAddress(), nvml=FakeNvml(gpu(busy=42))), patience_s=5.0)
    report = MachineMonitor(device="cuda:0", device_name="some GPU", gpu=watch).report(**COUNTERS)
    assert (report.gpu_utilization, report.gpu_memory_used_bytes, report.gpu_memory_total_bytes) == (42.0, 30, 100)
    assert abs(report.timestamp - datetime.now(tz=UTC).timestamp()) < 60
