"""The cluster's figures for Prometheus, made from one view of it whenever they are asked for.

Names follow Prometheus' conventions: base units, `_total` for what only grows, `_ratio` for parts from 0 to 1. What
only grows stays at its last value for a worker that is lost, as long as the master knows it; everything else that is
told of such a worker goes, except for `worker_up`, which is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shardwright.engine import TextEngine
from shardwright.observation import ClusterView, Histogram, WorkerView, phase_histogram
from shardwright.types import FinishReason, HeartbeatReport, RankLoad

PREFIX: Final = "shardwright_"
MAX_KINDS: Final = 32  # of errors, that have a label of their own
OTHER: Final = "other"  # the label of all further ones
WIRE: Final = "wire"  # the phase that the master alone can measure


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name without prefix, as it is written, its kind, what it means, its labels."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


_WORKER = ("worker",)
_GPU = ("worker", "device")
_RANK = ("worker", "rank", "device")
_LINK = ("worker", "peer")

FAMILIES: Final = (
    Family("master_info", "gauge", "The served model and how many layers it has; always 1.", ("model", "layers")),
    Family("start_time_seconds", "gauge", "When the master began, in seconds since 1970."),
    Family("ready", "gauge", "Whether a real token went through the pipeline lately."),
    # Sequences and tokens.
    Family("sequences_waiting", "gauge", "Sequences without KV blocks yet."),
    Family("sequences_waiting_limit", "gauge", "Most sequences that may wait; 0: no limit."),
    Family("sequences_running", "gauge", "Sequences that hold KV blocks."),
    Family("sequences_finished_total", "counter", "Sequences that are over, by how they ended.", ("reason",)),
    Family("prompt_tokens_total", "counter", "Tokens of all prompts."),
    Family("cached_prompt_tokens_total", "counter", "Prompt tokens that a cached prefix saved."),
    Family("output_tokens_total", "counter", "Tokens that were generated."),
    Family("preemptions_total", "counter", "Times that a sequence gave its KV blocks up."),
    Family("prefix_cache_hit_ratio", "gauge", "Part of all prompt tokens that cached prefixes saved, 0 to 1."),
    Family("kv_blocks", "gauge", "KV blocks of the pipeline."),
    Family("kv_blocks_used", "gauge", "KV blocks that sequences hold."),
    Family("kv_blocks_cached", "gauge", "Free KV blocks that the prefix cache can give again."),
    # The pipeline.
    Family("pipeline_epoch", "gauge", "Number of the present pipeline."),
    Family("recovering", "gauge", "1 while the model is placed anew after a pipeline broke."),
    Family("recoveries_total", "counter", "Times that a pipeline took steps again after it was broken."),
    Family("recovery_seconds_total", "counter", "From what broke pipelines to the first tokens of the new ones."),
    Family("recomputed_tokens_total", "counter", "Tokens that are computed again, since a pipeline was lost."),
    Family("pipeline_stages", "gauge", "Stages of the present pipeline."),
    Family("steps_in_flight", "gauge", "Steps on their way through the pipeline."),
    Family("steps_in_flight_limit", "gauge", "Most steps that may be under way."),
    Family("errors_total", "counter", "Errors of the master and of all workers, by kind.", ("kind",)),
    # Workers.
    Family("workers", "gauge", "Workers that the master knows, by status.", ("status",)),
    Family("worker_up", "gauge", "1 while the worker answers, 0 once it is lost.", _WORKER),
    Family("worker_info", "gauge", "What a worker is; always 1.", ("worker", "host", "device", "device_name")),
    Family("worker_ranks", "gauge", "Devices of the worker that compute each layer together.", _WORKER),
    Family("worker_errors_total", "counter", "Errors of a worker, by kind.", ("worker", "kind")),
    Family("master_round_trip_seconds", "gauge", "From the master to the worker and back, at best lately.", _WORKER),
    Family("weights_loaded_bytes_total", "counter", "Weights that were loaded, by source.", ("worker", "source")),
    Family("offload_read_bytes_total", "counter", "Offloaded weights that a worker read back for its steps.", _WORKER),
    Family(
        "offload_wait_seconds_total", "counter", "Time that a worker's steps waited for offloaded weights.", _WORKER
    ),
    # Stages.
    Family("stage_busy_ratio", "gauge", "Part of the last seconds that the stage computed, 0 to 1.", _WORKER),
    Family("stage_busy_seconds_total", "counter", "Time that a stage computed since it was loaded.", _WORKER),
    Family("stage_steps_total", "counter", "Steps that a stage computed since it was loaded.", _WORKER),
    Family("stage_queue_depth", "gauge", "Steps that wait for a stage's compute thread.", _WORKER),
    Family(
        "stage_phase_seconds",
        "histogram",
        "Time of a step at a stage, by phase: wire, queue, serialise, compute, send, wait.",
        ("worker", "phase"),
    ),
    Family("stage_layers", "gauge", "Layers of the stage.", _WORKER),
    Family("stage_weight_bytes", "gauge", "Weights that the stage holds.", _WORKER),
    Family("stage_kv_bytes", "gauge", "Memory of the stage's KV blocks.", _WORKER),
    Family("stage_epoch", "gauge", "Number of the pipeline that the stage belongs to; 0: none.", _WORKER),
    # Links from a stage to the next one.
    Family("link_sent_bytes_total", "counter", "Activations that were sent over a link.", _LINK),
    Family("link_steps_total", "counter", "Steps that were sent over a link.", _LINK),
    Family("link_round_trip_seconds", "gauge", "Of a small message over a link, lately.", _LINK),
    # Machines.
    Family("gpu_utilization_ratio", "gauge", "Part of the time that the GPU was busy, 0 to 1.", _GPU),
    Family("gpu_memory_used_bytes", "gauge", "Of the GPU, by all processes.", _GPU),
    Family("gpu_memory_total_bytes", "gauge", "Of the GPU.", _GPU),
    Family("gpu_temperature_celsius", "gauge", "Of the GPU.", _GPU),
    Family("gpu_power_watts", "gauge", "That the GPU draws.", _GPU),
    Family("cpu_utilization_ratio", "gauge", "Of all cores of the worker's machine, 0 to 1.", _WORKER),
    Family("memory_used_bytes", "gauge", "RAM of the worker's machine, or of its container.", _WORKER),
    Family("memory_total_bytes", "gauge", "RAM of the worker's machine, or of its container.", _WORKER),
    Family("process_memory_bytes", "gauge", "RAM of the worker's own process.", _WORKER),
    # The devices of a worker with several ranks; ranks are at most `MAX_RANKS` of the protocol.
    Family("rank_process_memory_bytes", "gauge", "RAM of a rank's process.", _RANK),
    Family("rank_gpu_utilization_ratio", "gauge", "Part of the time that a rank's GPU was busy, 0 to 1.", _RANK),
    Family("rank_gpu_memory_used_bytes", "gauge", "Of a rank's GPU, by all processes.", _RANK),
    Family("rank_gpu_memory_total_bytes", "gauge", "Of a rank's GPU.", _RANK),
)
"""Every metric of the cluster, in the order in which they are told; docs/monitoring.md lists the same."""

_Metrics: TypeAlias = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class ClusterCollector(Collector):
    """Turns the cluster's view into metrics at each scrape."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not scrape in order to know the names."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        """All families, those without a sample too."""
        return _Scrape(self._engine.observatory.view(), self._engine.model.name).families.values()


class _Scrape:
    """One scrape: families by name, filled from one view; the model has the name that it is served under."""

    def __init__(self, view: ClusterView, model_name: str) -> None:
        self.families: dict[str, _Metrics] = {family.name: _empty(family) for family in FAMILIES}
        self._put("master_info", 1, model_name, str(view.num_layers))
        self._master(view)
        self._sequences(view)
        statuses: dict[str, int] = {}
        for worker in view.workers:
            statuses[worker.status] = statuses.get(worker.status, 0) + 1
            self._worker(worker)
        for status, count in sorted(statuses.items()):
            self._put("workers", count, status)
        for kind, count in bounded(view.num_errors):
            self._put("errors_total", count, kind)

    def _put(self, name: str, value: float | None, *labels: str) -> None:
        if value is None:
            return
        family = self.families[name]
        assert not isinstance(family, HistogramMetricFamily), "histograms have counts, not a value"
        family.add_metric(labels, value)

    def _put_histogram(self, name: str, histogram: Histogram, *labels: str) -> None:
        family = self.families[name]
        assert isinstance(family, HistogramMetricFamily), "counts are for histograms"
        buckets, total = [], 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(labels, buckets, sum_value=histogram.total)

    def _master(self, view: ClusterView) -> None:
        snapshot = view.snapshot
        self._put("start_time_seconds", view.started_at)
        self._put("ready", view.is_ready)
        self._put("kv_blocks", snapshot.num_blocks)
        self._put("kv_blocks_used", snapshot.num_blocks - snapshot.num_free_blocks)
        self._put("kv_blocks_cached", snapshot.num_cached_blocks)
        self._put("pipeline_epoch", snapshot.epoch)
        self._put("recovering", bool(snapshot.recovering_from))
        self._put("recoveries_total", snapshot.total_recoveries)
        self._put("recovery_seconds_total", snapshot.total_recovery_s)
        self._put("recomputed_tokens_total", snapshot.total_recomputed_tokens)
        self._put("pipeline_stages", len(snapshot.stages))
        self._put("steps_in_flight", snapshot.num_steps_in_flight)
        self._put("steps_in_flight_limit", snapshot.max_steps_in_flight)

    def _sequences(self, view: ClusterView) -> None:
        snapshot = view.snapshot
        self._put("sequences_waiting", snapshot.num_waiting)
        self._put("sequences_waiting_limit", snapshot.max_waiting)
        self._put("sequences_running", snapshot.num_running)
        counts = dict(snapshot.finished)
        for reason in FinishReason:
            self._put("sequences_finished_total", counts.get(reason, 0), reason.value)
        prompt, cached = snapshot.total_prompt_tokens, snapshot.total_cached_tokens
        self._put("prompt_tokens_total", prompt)
        self._put("cached_prompt_tokens_total", cached)
        self._put("output_tokens_total", snapshot.total_output_tokens)
        self._put("preemptions_total", snapshot.total_preemptions)
        self._put("prefix_cache_hit_ratio", cached / prompt if prompt else 0.0)

    def _worker(self, worker: WorkerView) -> None:
        name, is_up = worker.worker_id, worker.status != "lost"
        self._put("worker_up", is_up, name)
        if worker.wire is not None:
            self._put_histogram("stage_phase_seconds", worker.wire, name, WIRE)
        if is_up:
            self._put("worker_info", 1, name, worker.host_id, worker.device, worker.device_name)
            self._put("worker_ranks", worker.num_ranks, name)
            self._put("master_round_trip_seconds", worker.master_round_trip_s, name)
        if worker.report is None:
            return
        self._counts(name, worker.report)
        if is_up:
            self._machine(name, worker.report)
            self._stage(worker, worker.report)

    def _counts(self, name: str, report: HeartbeatReport) -> None:
        """What only grows."""
        for kind, count in bounded(report.errors):
            self._put("worker_errors_total", count, name, kind)
        for source, num_bytes in report.loaded_bytes:
            self._put("weights_loaded_bytes_total", num_bytes, name, source)
        if report.offloaded_bytes or report.offload_read_bytes:
            self._put("offload_read_bytes_total", report.offload_read_bytes, name)
            self._put("offload_wait_seconds_total", report.offload_wait_s, name)
        for phase in report.phases:
            self._put_histogram("stage_phase_seconds", phase_histogram(phase), name, phase.phase.value)
        if report.epoch:
            self._put("stage_busy_seconds_total", report.busy_s, name)
            self._put("stage_steps_total", report.steps_done, name)
        if (link := report.link) is not None:
            self._put("link_sent_bytes_total", link.bytes_sent, name, link.peer)
            self._put("link_steps_total", link.steps_sent, name, link.peer)

    def _machine(self, name: str, report: HeartbeatReport) -> None:
        self._put("cpu_utilization_ratio", report.cpu_utilization / 100, name)
        self._put("memory_used_bytes", report.memory_used_bytes, name)
        self._put("memory_total_bytes", report.memory_total_bytes, name)
        self._put("process_memory_bytes", report.process_memory_bytes, name)
        devices: tuple[HeartbeatReport | RankLoad, ...] = (report, *report.ranks)
        for load in devices:
            gpu = (name, load.device)
            if load.gpu_utilization is not None:
                self._put("gpu_utilization_ratio", load.gpu_utilization / 100, *gpu)
            self._put("gpu_memory_used_bytes", load.gpu_memory_used_bytes, *gpu)
            self._put("gpu_memory_total_bytes", load.gpu_memory_total_bytes, *gpu)
            self._put("gpu_temperature_celsius", load.gpu_temperature_c, *gpu)
            self._put("gpu_power_watts", load.gpu_power_w, *gpu)
        for load in report.all_ranks:
            rank = (name, str(load.rank), load.device)
            self._put("rank_process_memory_bytes", load.process_memory_bytes, *rank)
            if load.gpu_utilization is not None:
                self._put("rank_gpu_utilization_ratio", load.gpu_utilization / 100, *rank)
            self._put("rank_gpu_memory_used_bytes", load.gpu_memory_used_bytes, *rank)
            self._put("rank_gpu_memory_total_bytes", load.gpu_memory_total_bytes, *rank)

    def _stage(self, worker: WorkerView, report: HeartbeatReport) -> None:
        name = worker.worker_id
        if worker.first_layer is None or worker.end_layer is None:
            return
        self._put("stage_busy_ratio", worker.busy_ratio, name)
        self._put("stage_queue_depth", report.queue_depth, name)
        self._put("stage_layers", worker.end_layer - worker.first_layer, name)
        self._put("stage_weight_bytes", worker.weight_bytes, name)
        self._put("stage_kv_bytes", worker.kv_bytes, name)
        self._put("stage_epoch", report.epoch, name)
        if report.link is not None:
            self._put("link_round_trip_seconds", report.link.round_trip_s, name, report.link.peer)


def bounded(kinds: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Counts by kind, of which those after the first `MAX_KINDS` become one: labels must not grow without end."""
    named = [(kind, count) for kind, count in kinds if kind != OTHER]
    rest = sum(count for kind, count in kinds if kind == OTHER) + sum(count for _, count in named[MAX_KINDS:])
    return [*named[:MAX_KINDS], (OTHER, rest)] if rest else named


def _empty(family: Family) -> _Metrics:
    kinds: dict[str, type[_Metrics]] = {
        "gauge": GaugeMetricFamily,
        "counter": CounterMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[family.kind](PREFIX + family.name, family.text, labels=family.labels)
