"""What Prometheus may know: the engine's snapshot, read when it is asked for, and what requests were like."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from shardwright.engine import TextEngine
from shardwright.types import ClusterSnapshot, FinishReason

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_GAP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
_TOTAL_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """The server's own registry: nothing of the process's other metrics is in it."""

    def __init__(self, engine: TextEngine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_SnapshotCollector(engine))
        self._requests = Counter(
            "shardwright_http_requests",
            "HTTP requests for answers, by endpoint and by how they ended.",
            ("endpoint", "outcome"),
            registry=self.registry,
        )
        self._first_token = Histogram(
            "shardwright_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of its answer.",
            registry=self.registry,
            buckets=_TTFT_BUCKETS,
        )
        self._gap = Histogram(
            "shardwright_inter_token_latency_seconds",
            "Time between two tokens of one choice.",
            registry=self.registry,
            buckets=_GAP_BUCKETS,
        )
        self._duration = Histogram(
            "shardwright_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("endpoint",),
            registry=self.registry,
            buckets=_TOTAL_BUCKETS,
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def begin(self, endpoint: str) -> Meter:
        """Start the clock of one request."""
        return Meter(self, endpoint)


class Meter:
    """Times one request; `done` ends it, once."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._clock = metrics.clock
        self._observe_gap = metrics._gap.observe  # noqa: SLF001  a meter is a part of its metrics
        self._began = self._clock()
        self._last: dict[int, float] = {}  # by choice: when its last token came
        self._is_done = False

    def tokens(self, choice: int, count: int) -> None:
        """More tokens of a choice came."""
        now = self._clock()
        last = self._last.get(choice)
        if last is None:
            if not self._last:
                self._metrics._first_token.observe(now - self._began)  # noqa: SLF001  as above
        else:
            gap = (now - last) / count
            for _ in range(count):
                self._observe_gap(gap)
        self._last[choice] = now

    def done(self, outcome: str) -> float:
        """The request is over; how long it took, in seconds."""
        seconds = self._clock() - self._began
        if not self._is_done:
            self._is_done = True
            self._metrics._requests.labels(self._endpoint, outcome).inc()  # noqa: SLF001  as above
            self._metrics._duration.labels(self._endpoint).observe(seconds)  # noqa: SLF001  as above
        return seconds


class _SnapshotCollector(Collector):
    """Turns the engine's snapshot into metrics at each scrape."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not scrape in order to know the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        snapshot = self._engine.snapshot()
        yield _gauge("ready", "Whether a real token went through the pipeline lately.", self._engine.is_ready())
        yield from _requests(snapshot)
        yield from _tokens(snapshot)
        yield from _blocks(snapshot)
        yield from _pipeline(snapshot)


def _requests(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    yield _gauge("sequences_waiting", "Sequences without KV blocks yet.", snapshot.num_waiting)
    yield _gauge("sequences_waiting_limit", "Most sequences that may wait; 0: no limit.", snapshot.max_waiting)
    yield _gauge("sequences_running", "Sequences that hold KV blocks.", snapshot.num_running)
    finished = CounterMetricFamily(
        "shardwright_sequences_finished", "Sequences that are over, by how they ended.", labels=("reason",)
    )
    counts = dict(snapshot.finished)
    for reason in FinishReason:
        finished.add_metric((reason.value,), counts.get(reason, 0))
    yield finished


def _tokens(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    yield _counter("prompt_tokens", "Tokens of all prompts.", snapshot.total_prompt_tokens)
    yield _counter("cached_prompt_tokens", "Prompt tokens that a cached prefix saved.", snapshot.total_cached_tokens)
    yield _counter("output_tokens", "Tokens that were generated.", snapshot.total_output_tokens)
    yield _counter("preemptions", "Times that a sequence gave its KV blocks up.", snapshot.total_preemptions)
    ratio = snapshot.total_cached_tokens / snapshot.total_prompt_tokens if snapshot.total_prompt_tokens else 0.0
    yield _gauge("prefix_cache_hit_ratio", "Part of all prompt tokens that cached prefixes saved, 0 to 1.", ratio)


def _blocks(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    yield _gauge("kv_blocks", "KV blocks of the pipeline.", snapshot.num_blocks)
    yield _gauge("kv_blocks_used", "KV blocks that sequences hold.", snapshot.num_blocks - snapshot.num_free_blocks)
    yield _gauge("kv_blocks_cached", "Free KV blocks that the prefix cache can give again.", snapshot.num_cached_blocks)


def _pipeline(snapshot: ClusterSnapshot) -> Iterator[Metric]:
    yield _gauge("pipeline_epoch", "Number of the present pipeline.", snapshot.epoch)
    yield _gauge("pipeline_stages", "Stages of the present pipeline.", len(snapshot.stages))
    yield _gauge("steps_in_flight", "Steps on their way through the pipeline.", snapshot.num_steps_in_flight)
    yield _gauge("steps_in_flight_limit", "Most steps that may be under way.", snapshot.max_steps_in_flight)
    ratio = GaugeMetricFamily(
        "shardwright_stage_busy_ratio",
        "Part of its time that a stage computed since it was loaded.",
        labels=("worker",),
    )
    busy = CounterMetricFamily(
        "shardwright_stage_busy_seconds", "Time that a stage computed since it was loaded.", labels=("worker",)
    )
    queue = GaugeMetricFamily(
        "shardwright_stage_queue_depth", "Steps that wait for a stage's compute thread.", labels=("worker",)
    )
    workers = GaugeMetricFamily("shardwright_workers", "Workers that the master knows, by status.", labels=("status",))
    statuses: dict[str, int] = {}
    for worker in snapshot.workers:
        statuses[worker.status] = statuses.get(worker.status, 0) + 1
        report = worker.report
        if report is None or worker.layers is None:
            continue
        label = (worker.worker_id,)
        ratio.add_metric(label, min(1.0, report.busy_s / report.uptime_s) if report.uptime_s > 0 else 0.0)
        busy.add_metric(label, report.busy_s)
        queue.add_metric(label, report.queue_depth)
    for status, count in sorted(statuses.items()):
        workers.add_metric((status,), count)
    yield from (ratio, busy, queue, workers)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"shardwright_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"shardwright_{name}", text, value=value)
