"""What Prometheus may know: the cluster, looked at when it is asked for, and what requests over HTTP were like."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from shardwright.api.cluster_metrics import ClusterCollector
from shardwright.engine import TextEngine

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_GAP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
_TOTAL_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """The server's own registry: nothing of the process's other metrics is in it."""

    def __init__(self, engine: TextEngine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(ClusterCollector(engine))
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

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A figure of the server's own, read at each scrape."""
        Gauge(f"shardwright_{name}", text, registry=self.registry).set_function(read)

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
