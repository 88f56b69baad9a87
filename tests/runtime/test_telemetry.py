"""Step times, the machine's load, and NVML in all the ways it can fail."""

import json
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
    CpuMeter,
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

    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetTemperature(self, gpu, sensor):  # noqa: N802  the binding's name
        assert sensor == self.NVML_TEMPERATURE_GPU
        self._call("nvmlDeviceGetTemperature")
        return gpu["temperature"]

    def nvmlDeviceGetPowerUsage(self, gpu):  # noqa: N802  the binding's name
        self._call("nvmlDeviceGetPowerUsage")
        return gpu["power"]


def gpu(**figures):
    """A GPU with some figures of its own."""
    usual = {"busy": 10, "used": 30, "total": 100, "uuid": "GPU-a", "temperature": 55, "power": 99_500}
    return usual | figures


def sample(utilization=10.0, memory_used=30, memory_total=100, temperature=55.0, power=99.5):
    """What `gpu` gives, with other figures where they are named."""
    return GpuSample(
        utilization=utilization,
        memory_used=memory_used,
        memory_total=memory_total,
        temperature=temperature,
        power=power,
    )


def test_a_probe_follows_the_gpu():
    card = gpu()
    probe = GpuProbe(GpuAddress(), nvml=FakeNvml(card))
    assert probe.sample() == sample()
    card |= {"busy": 95, "used": 60, "temperature": 81, "power": 300_250}
    assert probe.sample() == sample(utilization=95.0, memory_used=60, temperature=81.0, power=300.25)


def test_the_gpu_is_found_by_its_uuid_where_numbers_differ():
    nvml = FakeNvml(gpu(busy=1, uuid="GPU-a"), gpu(busy=2, uuid="GPU-b"), gpu(busy=3, uuid="MIG-c"))
    for uuid, busy in (("b", 2), ("c", 3), ("unknown", 1), ("", 1)):
        assert GpuProbe(GpuAddress(index=0, uuid=uuid), nvml=nvml).sample().utilization == busy


def test_a_call_that_fails_leaves_the_others():
    nvml = FakeNvml(gpu())
    probe = GpuProbe(GpuAddress(), nvml=nvml)
    nvml.broken = {"nvmlDeviceGetUtilizationRates"}
    assert probe.sample() == sample(utilization=None)
    nvml.broken = {"nvmlDeviceGetMemoryInfo"}
    assert probe.sample() == sample(memory_used=None, memory_total=None)
    nvml.broken = {"nvmlDeviceGetTemperature"}
    assert probe.sample() == sample(temperature=None)
    nvml.broken = {"nvmlDeviceGetPowerUsage"}
    assert probe.sample() == sample(power=None)
    nvml.broken = set()
    assert probe.sample() == sample()


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
    card = gpu(busy=4_000_000_000, used=200, total=100, temperature=2**32 - 40, power=2**32 - 1)
    probe = GpuProbe(GpuAddress(), nvml=FakeNvml(card))
    assert probe.sample() == NO_GPU
    card |= {"busy": 50, "used": 0, "total": 0}
    assert probe.sample() == GpuSample(utilization=50.0, memory_used=None, memory_total=None)


def test_a_driver_that_has_only_the_newer_call_for_the_temperature_is_asked_with_it():
    class NewerNvml(FakeNvml):
        def nvmlDeviceGetTemperatureV(self, gpu, sensor):  # noqa: N802  the binding's name
            assert sensor == self.NVML_TEMPERATURE_GPU
            return gpu["temperature"] + 1

    nvml = NewerNvml(gpu())
    probe = GpuProbe(GpuAddress(), nvml=nvml)
    assert probe.sample().temperature == 55.0
    nvml.broken = {"nvmlDeviceGetTemperature"}
    assert probe.sample().temperature == 56.0


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
/* Two GPUs. The file has lines like `0.busy 12`: the GPU's number, what is asked, the answer. */
static int figure(int gpu, const char *name, int otherwise) {
  char wanted[64], line[64]; int value; FILE *file = fopen(getenv("FIGURES"), "r");
  snprintf(wanted, sizeof wanted, "%d.%s", gpu, name);
  while (file && fscanf(file, "%63s %d", line, &value) == 2)
    if (!strcmp(line, wanted)) { fclose(file); return value; }
  if (file) fclose(file);
  return otherwise;
}
static int status(int gpu, const char *name) {
  char wanted[64];
  snprintf(wanted, sizeof wanted, "%s_error", name);
  return figure(gpu, "error", figure(gpu, wanted, 0));
}
static int number(void *handle) { return (int)(long)handle - 1; }
int nvmlInitWithFlags(unsigned flags) { return figure(0, "init", 0); }
int nvmlInit_v2(void) { return figure(0, "init", 0); }
const char *nvmlErrorString(int code) { return "stand-in error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (void *)(long)(index + 1); return index < 2 ? 0 : 2;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (strcmp(uuid, "GPU-zero") && strcmp(uuid, "GPU-one")) return 6;
  *handle = (void *)(long)(strcmp(uuid, "GPU-one") ? 1 : 2); return 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
  static int calls[2]; int gpu = number(handle);
  rates[0] = figure(gpu, "busy", 0) + figure(gpu, "busier", 0) * calls[gpu]++; rates[1] = 0;
  return status(gpu, "busy");
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
  int gpu = number(handle);
  memory[0] = 1000 * (gpu + 1); memory[2] = figure(gpu, "used", 0); memory[1] = memory[0] - memory[2];
  return status(gpu, "used");
}
#ifndef OLD
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
  *degrees = figure(number(handle), "degrees", 40); return sensor ? 2 : status(number(handle), "degrees");
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
  *milliwatts = figure(number(handle), "milliwatts", 0); return status(number(handle), "milliwatts");
}
#endif
"""

WATCH = """
import json, pathlib, sys
from shardwright.runtime.telemetry import GpuAddress, GpuProbe, GpuWatch, MachineMonitor, load_nvml
addresses = [GpuAddress(index=1), GpuAddress(index=7, uuid="zero")]
watches = [GpuWatch(GpuProbe(address, nvml=load_nvml()), patience_s=10.0) for address in addresses]
monitors = [MachineMonitor(device="cuda", device_name="stand-in", gpu=watch) for watch in watches]
counters = {"epoch": 0, "queue_depth": 0, "steps_done": 0, "busy_s": 0.0, "uptime_s": 0.0, "timings": ()}
for figures in sys.argv[2:]:
    pathlib.Path(sys.argv[1]).write_text(figures)
    reports = [monitor.report(**counters) for monitor in monitors]
    print(json.dumps([
        [r.gpu_utilization, r.gpu_memory_used_bytes, r.gpu_memory_total_bytes, r.gpu_temperature_c, r.gpu_power_w]
        for r in reports
    ]))
"""


def watch(folder, *figures):
    """What heartbeats tell, step by step, of GPU 1 and of GPU 0, whose NVML library lies in the folder."""
    path = folder / "figures"
    run = subprocess.run(
        [sys.executable, "-c", WATCH, path, *figures],
        check=True,
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": str(folder), "FIGURES": str(path), "PATH": "/usr/bin:/bin"},
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture
def compile_library(tmp_path):
    """Makes a folder with the library; `old` leaves out what a very old driver lacks."""
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in for NVIDIA's library is compiled here")

    def compile_it(*flags):
        source = tmp_path / "nvml.c"
        source.write_text(STAND_IN)
        library = tmp_path / "libnvidia-ml.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", library, source], check=True)
        return tmp_path

    return compile_it


NOTHING = [None] * 5


def test_the_real_binding_reads_two_gpus_whose_figures_change_and_fail(compile_library):
    steady = "1.busy 12 1.used 300 1.degrees 51 1.milliwatts 70500"
    assert watch(
        compile_library(),
        "0.init 9",  # no driver is loaded yet
        f"{steady} 0.busy 20 0.busier 5 0.used 100 0.milliwatts 250",
        f"{steady} 0.busy 20 0.busier 5 0.used 900 0.degrees 88 0.milliwatts 333000",
        f"{steady} 0.busy_error 15 0.used 5 0.degrees_error 3 0.milliwatts 1",
        f"{steady} 0.busy 1 0.used_error 999 0.degrees 1 0.milliwatts_error 3",
        f"{steady} 0.error 15",  # fallen off the bus
        f"{steady} 0.busy 1 0.used 2000 0.degrees 999 0.milliwatts -1",  # figures that mean nothing
        "1.busy 13 1.used 301 1.degrees 52 1.milliwatts 70501",
    ) == [
        [NOTHING, NOTHING],
        [[12.0, 300, 2000, 51.0, 70.5], [20.0, 100, 1000, 40.0, 0.25]],
        [[12.0, 300, 2000, 51.0, 70.5], [25.0, 900, 1000, 88.0, 333.0]],
        [[12.0, 300, 2000, 51.0, 70.5], [None, 5, 1000, None, 0.001]],
        [[12.0, 300, 2000, 51.0, 70.5], [1.0, None, None, 1.0, None]],
        [[12.0, 300, 2000, 51.0, 70.5], NOTHING],
        [[12.0, 300, 2000, 51.0, 70.5], [1.0, None, None, None, None]],
        [[13.0, 301, 2000, 52.0, 70.501], [0.0, 0, 1000, 40.0, 0.0]],
    ]


def test_a_driver_without_some_of_the_calls_tells_the_rest(compile_library):
    assert watch(compile_library("-DOLD"), "0.busy 3 1.busy 4") == [
        [[4.0, 0, 2000, None, None], [3.0, 0, 1000, None, None]]
    ]


@pytest.mark.parametrize("content", [None, b"not a library", b""])
def test_a_library_that_is_absent_or_wrong_means_no_gpu(tmp_path, content):
    if content is not None:
        (tmp_path / "libnvidia-ml.so.1").write_bytes(content)
    assert watch(tmp_path, "1.busy 12") == [[NOTHING, NOTHING]]


# --- the machine -------------------------------------------------------------------------------------


def test_the_cores_load_is_of_the_time_since_somebody_asked_last():
    now, seconds = [0.0], [(100.0, 1000.0)]
    meter = CpuMeter(min_interval_s=0.5, clock=lambda: now[0], read=lambda: seconds[0])
    seconds[0] = (101.0, 1002.0)
    assert meter.percent() == 50.0
    now[0], seconds[0] = 0.4, (103.0, 1004.0)
    assert meter.percent() == 50.0  # too soon: who asks now takes nothing away from who asks later
    now[0] = 0.6
    assert meter.percent() == 100.0
    now[0] = 2.0
    assert meter.percent() == 100.0  # no core's time has gone by
    now[0], seconds[0] = 4.0, (102.5, 1010.0)
    assert meter.percent() == 0.0  # the kernel's counts of idle time may go back a little


def test_the_cores_load_is_seen_by_every_thread():
    meter = CpuMeter(min_interval_s=0.0)
    end = time.process_time() + 0.1
    while time.process_time() < end:
        sum(range(10_000))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(meter.percent()))
    thread.start()
    thread.join()
    assert 0 < seen[0] <= 100


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
    assert (report.gpu_temperature_c, report.gpu_power_w) == (55.0, 99.5)
    assert abs(report.timestamp - datetime.now(tz=UTC).timestamp()) < 60
