"""What Prometheus may know of one worker, told by the worker itself on a port of its own.

Values are read when they are scraped, from the counters that heartbeats tell too; a scrape takes nothing from them.
Names begin with `shardwright_node_`: the master tells the same of all its workers as `shardwright_`, and whoever
scrapes both must not count twice.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shardwright import __version__
from shardwright.errors import AddressInUseError, ConfigError, ShardwrightError
from shardwright.types import PHASE_BUCKETS_S, HeartbeatReport, LayerRange, PhaseTimes, RankLoad

PREFIX: Final = "shardwright_node_"
CLIENT_TIMEOUT_S: Final = 10.0
"""How long a client may hold a connection without asking for anything: each has a thread."""


class ReportSource(Protocol):
    """Where the figures come from: a worker's shell."""

    @property
    def layers(self) -> LayerRange | None:
        """Of the stage that is held."""
        ...

    def report(self) -> HeartbeatReport:
        """All counters now; takes nothing away. Called on the server's threads."""
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name without prefix, as it is written, its kind, what it means, its labels."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


_RANK = ("rank", "device")

FAMILIES: Final = (
    Family("worker_info", "gauge", "What the worker is; always 1.", ("version", "device", "device_name")),
    Family("worker_errors_total", "counter", "Errors since the process began, by kind.", ("kind",)),
    Family("weights_loaded_bytes_total", "counter", "Weights loaded since the process began, by source.", ("source",)),
    # The stage.
    Family("stage_epoch", "gauge", "Number of the pipeline that the stage belongs to; 0: no stage."),
    Family("stage_layers", "gauge", "Layers of the stage."),
    Family("stage_weight_bytes", "gauge", "Weights that the stage holds."),
    Family("stage_kv_bytes", "gauge", "Memory of the stage's KV blocks."),
    Family("stage_offloaded_bytes", "gauge", "Weights that the stage keeps beside its memory and reads in each step."),
    Family("offload_read_bytes_total", "counter", "Offloaded weights read back since the process began."),
    Family("offload_wait_seconds_total", "counter", "Time that steps waited for offloaded weights, since then."),
    Family("stage_queue_depth", "gauge", "Steps that wait for the compute thread."),
    Family("stage_steps_total", "counter", "Steps computed since the stage was loaded."),
    Family("stage_busy_seconds_total", "counter", "Time spent on them."),
    Family(
        "stage_phase_seconds",
        "histogram",
        "Time of a step since the process began, by phase: queue, serialise, compute, send, wait.",
        ("phase",),
    ),
    # The link to the next stage.
    Family("link_sent_bytes_total", "counter", "Activations sent to the next stage since the link opened.", ("peer",)),
    Family("link_steps_total", "counter", "Steps sent to the next stage since the link was opened.", ("peer",)),
    Family("link_round_trip_seconds", "gauge", "Of a small message to the next stage, at best lately.", ("peer",)),
    # The machine.
    Family("gpu_utilization_ratio", "gauge", "Part of the time that the GPU was busy, 0 to 1.", ("device",)),
    Family("gpu_memory_used_bytes", "gauge", "Of the GPU, by all processes.", ("device",)),
    Family("gpu_memory_total_bytes", "gauge", "Of the GPU.", ("device",)),
    Family("gpu_temperature_celsius", "gauge", "Of the GPU.", ("device",)),
    Family("gpu_power_watts", "gauge", "That the GPU draws.", ("device",)),
    Family("cpu_utilization_ratio", "gauge", "Of all the machine's cores, 0 to 1."),
    Family("memory_used_bytes", "gauge", "RAM of the machine, or of the container."),
    Family("memory_total_bytes", "gauge", "RAM of the machine, or of the container."),
    Family("process_memory_bytes", "gauge", "RAM of the worker's process."),
    # The worker's devices, with --tensor-parallel.
    Family("rank_process_memory_bytes", "gauge", "RAM of a rank's process.", _RANK),
    Family("rank_gpu_utilization_ratio", "gauge", "Part of the time that a rank's GPU was busy, 0 to 1.", _RANK),
    Family("rank_gpu_memory_used_bytes", "gauge", "Of a rank's GPU, by all processes.", _RANK),
    Family("rank_gpu_memory_total_bytes", "gauge", "Of a rank's GPU.", _RANK),
)
"""Every metric of a worker, in the order in which they are told; docs/monitoring.md lists the same."""

_Metrics: TypeAlias = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class MetricsServer:
    """Answers Prometheus from threads of its own until it is closed."""

    def __init__(self, source: ReportSource, *, host: str, port: int) -> None:
        """Listen at once; port 0 takes a free one. Blocks while the host's name is looked up.

        Raises `AddressInUseError` for a taken port and `ConfigError` for one that can't be listened on.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_ReportCollector(source))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as exc:
            raise _why_not_bound(host, port, exc) from exc
        self._server.RequestHandlerClass = _Handler
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def port(self) -> int:
        """The port really bound."""
        return self._server.server_port

    def close(self) -> None:
        """Stop listening; waits for the server's thread, so call it off the event loop. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._server.shutdown()
                self._server.server_close()
                self._thread.join()


class _Handler(WSGIRequestHandler):
    """Says nothing about requests, and gives clients up that say nothing, or are gone."""

    timeout = CLIENT_TIMEOUT_S

    def handle(self) -> None:
        """Answer one request."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its name in the base class
        """Nothing: a scrape every few seconds is no news."""


def _why_not_bound(host: str, port: int, error: OSError) -> ShardwrightError:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(
            f"can't tell metrics on {where}: another process has the port; choose another with --metrics-port"
        )
    if isinstance(error, PermissionError):
        return ConfigError(
            f"can't tell metrics on {where}: this user may not open port {port}; choose one above 1023 with "
            "--metrics-port"
        )
    return ConfigError(f"can't tell metrics on {where}: {error.strerror or error}")


class _ReportCollector(Collector):
    """Turns a worker's report into metrics at each scrape."""

    def __init__(self, source: ReportSource) -> None:
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not scrape in order to know the names."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        """All families, those without a sample too."""
        layers = self._source.layers
        return _Scrape(self._source.report(), layers).families.values()


class _Scrape:
    """One scrape: families by name, filled from one report."""

    def __init__(self, report: HeartbeatReport, layers: LayerRange | None) -> None:
        self.families: dict[str, _Metrics] = {family.name: _empty(family) for family in FAMILIES}
        self._put("worker_info", 1, __version__, report.device, report.device_name)
        for kind, count in report.errors:
            self._put("worker_errors_total", count, kind)
        for source, num_bytes in report.loaded_bytes:
            self._put("weights_loaded_bytes_total", num_bytes, source)
        if report.offloaded_bytes or report.offload_read_bytes:
            self._put("stage_offloaded_bytes", report.offloaded_bytes)
            self._put("offload_read_bytes_total", report.offload_read_bytes)
            self._put("offload_wait_seconds_total", report.offload_wait_s)
        for phase in report.phases:
            self._put_phase(phase)
        self._put("stage_epoch", report.epoch)
        if report.epoch and layers is not None:
            self._stage(report, layers)
        self._machine(report)

    def _stage(self, report: HeartbeatReport, layers: LayerRange) -> None:
        self._put("stage_layers", layers.end - layers.start)
        self._put("stage_weight_bytes", report.weight_bytes)
        self._put("stage_kv_bytes", report.kv_bytes)
        self._put("stage_queue_depth", report.queue_depth)
        self._put("stage_steps_total", report.steps_done)
        self._put("stage_busy_seconds_total", report.busy_s)
        if (link := report.link) is not None:
            self._put("link_sent_bytes_total", link.bytes_sent, link.peer)
            self._put("link_steps_total", link.steps_sent, link.peer)
            self._put("link_round_trip_seconds", link.round_trip_s, link.peer)

    def _machine(self, report: HeartbeatReport) -> None:
        devices: tuple[HeartbeatReport | RankLoad, ...] = (report, *report.ranks)
        for load in devices:
            if load.gpu_utilization is not None:
                self._put("gpu_utilization_ratio", load.gpu_utilization / 100, load.device)
            self._put("gpu_memory_used_bytes", load.gpu_memory_used_bytes, load.device)
            self._put("gpu_memory_total_bytes", load.gpu_memory_total_bytes, load.device)
            self._put("gpu_temperature_celsius", load.gpu_temperature_c, load.device)
            self._put("gpu_power_watts", load.gpu_power_w, load.device)
        for load in report.all_ranks:
            rank = (str(load.rank), load.device)
            self._put("rank_process_memory_bytes", load.process_memory_bytes, *rank)
            if load.gpu_utilization is not None:
                self._put("rank_gpu_utilization_ratio", load.gpu_utilization / 100, *rank)
            self._put("rank_gpu_memory_used_bytes", load.gpu_memory_used_bytes, *rank)
            self._put("rank_gpu_memory_total_bytes", load.gpu_memory_total_bytes, *rank)
        self._put("cpu_utilization_ratio", report.cpu_utilization / 100)
        self._put("memory_used_bytes", report.memory_used_bytes)
        self._put("memory_total_bytes", report.memory_total_bytes)
        self._put("process_memory_bytes", report.process_memory_bytes)

    def _put(self, name: str, value: float | None, *labels: str) -> None:
        """Set one value; one that is not known is left out."""
        if value is None:
            return
        family = self.families[name]
        assert not isinstance(family, HistogramMetricFamily), "histograms have counts, not a value"
        family.add_metric(labels, value)

    def _put_phase(self, times: PhaseTimes) -> None:
        family = self.families["stage_phase_seconds"]
        assert isinstance(family, HistogramMetricFamily), "phases are counted in buckets"
        buckets, total = [], 0
        for bound, count in zip((*map(str, PHASE_BUCKETS_S), "+Inf"), times.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric((times.phase.value,), buckets, sum_value=times.total_s)


def _empty(family: Family) -> _Metrics:
    kinds: dict[str, type[_Metrics]] = {
        "gauge": GaugeMetricFamily,
        "counter": CounterMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[family.kind](PREFIX + family.name, family.text, labels=family.labels)
