"""A worker's own Prometheus endpoint: what it tells, where from, and when it can't."""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from shardwright import __version__
from shardwright.config import WorkerConfig
from shardwright.errors import AddressInUseError, ConfigError
from shardwright.runtime import worker_metrics
from shardwright.runtime.worker_metrics import FAMILIES, MetricsServer
from shardwright.runtime.worker_process import open_worker
from shardwright.transport.memory import MemoryTransport
from shardwright.types import PHASE_BUCKETS_S, HeartbeatReport, LayerRange, LinkReport, PhaseTimes, RankLoad, StepPhase

HOST = "127.0.0.1"
T = 10.0

IDLE = HeartbeatReport(
    timestamp=5.0, epoch=0, queue_depth=0, steps_done=0, busy_s=0.0, uptime_s=0.0, device="cpu",
    device_name="a CPU", gpu_utilization=None, gpu_memory_used_bytes=None, gpu_memory_total_bytes=None,
    cpu_utilization=12.5, memory_used_bytes=2**33, memory_total_bytes=2**34, process_memory_bytes=2**30,
)  # fmt: skip
PHASES = tuple(
    PhaseTimes(phase=phase, counts=(1, 0, 2, *(0,) * (len(PHASE_BUCKETS_S) - 3), 4), total_s=index + 0.5)
    for index, phase in enumerate(StepPhase)
)
BUSY = replace(
    IDLE, epoch=7, queue_depth=3, steps_done=71, busy_s=1.5, device="cuda:1", device_name='a "GPU"',
    gpu_utilization=64.0, gpu_memory_used_bytes=5, gpu_memory_total_bytes=9, gpu_temperature_c=61.0, gpu_power_w=70.25,
    weight_bytes=2**40, kv_bytes=2**20, phases=PHASES,
    link=LinkReport(peer="rack-2", bytes_sent=4096, steps_sent=70, round_trip_s=0.0005),
    errors=(("LinkLostError", 2), ("other", 1)), loaded_bytes=(("disk", 5), ("cache", 0), ("network", 7)),
    offloaded_bytes=2**39, offload_read_bytes=2**42, offload_wait_s=8.5,
)  # fmt: skip


class Source:
    """A worker whose figures a test sets."""

    def __init__(self) -> None:
        self.now = BUSY
        self.layers: LayerRange | None = LayerRange(4, 9)

    def report(self) -> HeartbeatReport:
        return self.now


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def port(source):
    server = MetricsServer(source, host=HOST, port=0)
    yield server.port
    server.close()
    server.close()  # twice does no harm


def fetch(port: int, accept: str = "text/plain") -> str:
    answer = httpx.get(f"http://{HOST}:{port}/metrics", headers={"Accept": accept}, timeout=T)
    return answer.raise_for_status().text


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name, without the prefix, and labels' values in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith("shardwright_node_")
            found[sample.name.removeprefix("shardwright_node_"), *sample.labels.values()] = sample.value
    return found


def test_a_busy_worker_tells_all_that_its_heartbeat_tells(port):
    found = samples(fetch(port))
    histograms = {name: value for name, value in found.items() if name[0].startswith("stage_phase_seconds")}
    assert {name: value for name, value in found.items() if name not in histograms} == {
        ("worker_info", "cuda:1", 'a "GPU"', __version__): 1,
        ("worker_errors_total", "LinkLostError"): 2,
        ("worker_errors_total", "other"): 1,
        ("weights_loaded_bytes_total", "disk"): 5,
        ("weights_loaded_bytes_total", "cache"): 0,
        ("weights_loaded_bytes_total", "network"): 7,
        ("stage_epoch",): 7,
        ("stage_layers",): 5,
        ("stage_weight_bytes",): 2**40,
        ("stage_kv_bytes",): 2**20,
        ("stage_offloaded_bytes",): 2**39,
        ("offload_read_bytes_total",): 2**42,
        ("offload_wait_seconds_total",): 8.5,
        ("stage_queue_depth",): 3,
        ("stage_steps_total",): 71,
        ("stage_busy_seconds_total",): 1.5,
        ("link_sent_bytes_total", "rack-2"): 4096,
        ("link_steps_total", "rack-2"): 70,
        ("link_round_trip_seconds", "rack-2"): 0.0005,
        ("gpu_utilization_ratio", "cuda:1"): 0.64,
        ("gpu_memory_used_bytes", "cuda:1"): 5,
        ("gpu_memory_total_bytes", "cuda:1"): 9,
        ("gpu_temperature_celsius", "cuda:1"): 61,
        ("gpu_power_watts", "cuda:1"): 70.25,
        ("cpu_utilization_ratio",): 0.125,
        ("memory_used_bytes",): 2**33,
        ("memory_total_bytes",): 2**34,
        ("process_memory_bytes",): 2**30,
    }
    for index, phase in enumerate(("queue", "serialise", "compute", "send", "wait")):
        assert histograms["stage_phase_seconds_sum", phase] == index + 0.5
        assert histograms["stage_phase_seconds_count", phase] == 7
        bucket = "stage_phase_seconds_bucket"
        counts = {name[1]: value for name, value in histograms.items() if (name[0], name[-1]) == (bucket, phase)}
        assert list(counts) == [*map(str, PHASE_BUCKETS_S), "+Inf"]
        assert list(counts.values()) == [1, 1, *[3] * (len(PHASE_BUCKETS_S) - 2), 7]


def test_what_is_not_known_is_absent(port, source):
    source.now, source.layers = IDLE, None
    assert {name[0] for name in samples(fetch(port))} == {
        "worker_info", "stage_epoch", "cpu_utilization_ratio", "memory_used_bytes", "memory_total_bytes",
        "process_memory_bytes",
    }  # fmt: skip
    source.now = replace(BUSY, link=replace(BUSY.link, round_trip_s=None))
    source.layers = LayerRange(0, 1)
    found = samples(fetch(port))
    assert ("link_round_trip_seconds", "rack-2") not in found
    assert found["link_steps_total", "rack-2"] == 70
    source.now = replace(BUSY, link=None)
    assert not [name for name in samples(fetch(port)) if name[0].startswith("link")]


def test_every_rank_of_a_worker_is_told_with_its_device(port, source):
    further = RankLoad(rank=1, device="cuda:2", device_name="a GPU", process_memory_bytes=11, gpu_utilization=25.0)
    source.now = replace(BUSY, ranks=(further, replace(further, rank=2, device="cpu", gpu_utilization=None)))
    found = samples(fetch(port))
    assert {name: value for name, value in found.items() if name[0].startswith("rank_")} == {
        ("rank_process_memory_bytes", "cuda:1", "0"): 2**30,
        ("rank_process_memory_bytes", "cuda:2", "1"): 11,
        ("rank_process_memory_bytes", "cpu", "2"): 11,
        ("rank_gpu_utilization_ratio", "cuda:1", "0"): 0.64,
        ("rank_gpu_utilization_ratio", "cuda:2", "1"): 0.25,
        ("rank_gpu_memory_used_bytes", "cuda:1", "0"): 5,
        ("rank_gpu_memory_total_bytes", "cuda:1", "0"): 9,
    }
    assert found["gpu_utilization_ratio", "cuda:2"] == 0.25


def test_values_are_of_the_moment_of_the_scrape(port, source):
    assert samples(fetch(port))["stage_steps_total",] == 71
    source.now = replace(BUSY, steps_done=72)
    assert samples(fetch(port))["stage_steps_total",] == 72


def test_openmetrics_is_spoken_to_who_prefers_it(port):
    text = fetch(port, "application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert len(list(openmetrics.text_string_to_metric_families(text))) == len(FAMILIES)


def test_a_taken_port_is_named_with_what_to_do(port, source):
    with pytest.raises(AddressInUseError, match=rf"can't tell metrics on {HOST}:{port}: another.*with --metrics-port"):
        MetricsServer(source, host=HOST, port=port)


def test_a_host_that_is_not_this_one_is_refused(source):
    with pytest.raises(ConfigError, match=r"can't tell metrics on 203\.0\.113\.1:0: "):
        MetricsServer(source, host="203.0.113.1", port=0)
    with pytest.raises(ConfigError, match=r"can't tell metrics on no\.such\.host\.invalid:0: "):
        MetricsServer(source, host="no.such.host.invalid", port=0)


def test_clients_that_say_nothing_or_leave_are_given_up_without_a_word(source, monkeypatch, capfd):
    monkeypatch.setattr(worker_metrics._Handler, "timeout", 0.05)
    server = MetricsServer(source, host=HOST, port=0)
    try:
        with socket.create_connection((HOST, server.port), timeout=T) as silent:
            assert silent.recv(1) == b""
        for _ in range(3):
            with socket.create_connection((HOST, server.port), timeout=T) as leaving:
                leaving.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not closed
        assert "stage_steps_total" in fetch(server.port)
    finally:
        server.close()
    assert capfd.readouterr() == ("", "")


async def test_a_workers_description_names_its_port_which_ends_with_it(tmp_path):
    transport = MemoryTransport()
    config = WorkerConfig(host=HOST, device="cpu", threads=1, cache_dir=tmp_path, metrics_port=0)
    async with open_worker(config, transport, "worker:1") as worker:
        client = transport.connect(worker.address)
        assert (await client.describe(timeout_s=T)).metrics_port == worker.metrics_port > 0
        found = samples(await _in_thread(fetch, worker.metrics_port))
        assert found["stage_epoch",] == 0
        assert found["process_memory_bytes",] > 2**20
        assert 0 <= found["cpu_utilization_ratio",] <= 1
        assert found["weights_loaded_bytes_total", "network"] == 0
        assert found["stage_phase_seconds_count", "compute"] == 0
        with pytest.raises(AddressInUseError, match="--metrics-port"):
            async with open_worker(replace(config, metrics_port=worker.metrics_port), transport, "worker:2"):
                pass
        await client.close()
    with pytest.raises(httpx.ConnectError):
        await _in_thread(fetch, worker.metrics_port)


async def test_a_worker_that_was_not_asked_for_metrics_has_no_port(tmp_path):
    transport = MemoryTransport()
    config = WorkerConfig(host=HOST, device="cpu", threads=1, cache_dir=tmp_path)
    async with open_worker(config, transport, "worker:1") as worker:
        assert worker.metrics_port == 0
        client = transport.connect(worker.address)
        assert (await client.describe(timeout_s=T)).metrics_port == 0
        await client.close()


async def _in_thread(function, *arguments):
    return await asyncio.to_thread(function, *arguments)


SECTION = (
    (Path(__file__).parents[2] / "docs" / "monitoring.md")
    .read_text()
    .partition("\n## Metrics of a worker\n")[2]
    .split("\n## ")[0]
)


def test_the_document_lists_every_metric_with_kind_labels_and_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \|$", SECTION, re.MULTILINE)
    assert [(name, kind, tuple(re.findall(r"\w+", labels)), text) for name, kind, labels, text in rows] == [
        (family.name, family.kind, family.labels, family.text) for family in FAMILIES
    ]
