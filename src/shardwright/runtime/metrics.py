"""Writes what the master knows of its cluster to `metrics.json`, for people, scripts and Grafana's JSON sources.

The schema is stable: fields are added, never renamed or removed, without a higher `SCHEMA_VERSION`. The tables here
are the schema; `docs/monitoring.md` shows the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from shardwright.types import ClusterSnapshot, HeartbeatReport, StageAssignment, WorkerSnapshot

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1

DOCUMENT_FIELDS: Final[Mapping[str, str]] = {
    "version": "of this schema",
    "timestamp": "when the file was written, in seconds since 1970",
    "time": "the same in UTC, ISO 8601",
    "cluster": "totals of the pipeline",
    "workers": "one row for each worker that was asked to take part",
}

CLUSTER_FIELDS: Final[Mapping[str, str]] = {
    "ready": "whether the pipeline takes requests now",
    "epoch": "number of the present pipeline; rises with each new placement",
    "stages": "stages of the present pipeline",
    "workers": "workers known to the master",
    "workers_lost": "those that have failed",
    "requests_waiting": "requests without KV blocks yet",
    "requests_running": "requests that hold KV blocks",
    "requests_finished": "requests that are over, by the way they ended",
    "steps_in_flight": "steps on their way through the pipeline",
    "max_steps_in_flight": "most steps that the scheduler lets be under way",
    "kv_blocks": "KV blocks of the pipeline",
    "kv_blocks_free": "those that hold nothing that is in use",
    "kv_utilization": "percent of the KV blocks in use; null without a pipeline",
    "prompt_tokens": "tokens of all prompts so far",
    "cached_tokens": "those whose computation a shared prefix saved",
    "output_tokens": "tokens generated so far",
    "preemptions": "times that a request gave its KV blocks up, to be computed again later",
}

WORKER_FIELDS: Final[Mapping[str, str]] = {
    "worker": "its name",
    "status": "its state in the master's eyes: joining, loading, ready, lost",
    "reason": "why it was lost; empty otherwise",
    "timestamp": "when the worker took the figures of this row, its own clock, in seconds since 1970; "
    "null before its first heartbeat, and with it all figures below",
    "time": "the same in UTC, ISO 8601",
    "device": "what it computes on: cpu, cuda:0, mps",
    "device_name": "the device's own name",
    "gpu_utilization": "percent of the time that the GPU was busy (NVML); null without an NVIDIA GPU",
    "memory_utilization": "percent of the GPU's memory in use; of the machine's without an NVIDIA GPU",
    "cpu_utilization": "percent of all the machine's cores",
    "gpu_memory_used_bytes": "of all processes; null without an NVIDIA GPU",
    "gpu_memory_total_bytes": "null without an NVIDIA GPU",
    "memory_used_bytes": "RAM of the machine, or of the container",
    "memory_total_bytes": "RAM of the machine, or of the container",
    "process_memory_bytes": "RAM of the worker's own process",
    "epoch": "of the stage that it holds; 0: none",
    "stage": "its place in the present pipeline, from 0; null: none",
    "layers": "its layers, as first-last; null: none",
    "num_layers": "how many these are",
    "queue_depth": "steps that wait for its compute thread",
    "steps_done": "steps computed since the stage was loaded",
    "busy_seconds": "time spent on them",
    "uptime_seconds": "time since the stage was loaded",
    "busy_ratio": "the part of that time spent computing, 0 to 1; null without a stage",
    "step_seconds": "mean time of the steps since the heartbeat before; null if there was none",
}


def metrics_document(snapshot: ClusterSnapshot, now: float) -> dict[str, object]:
    """The content of `metrics.json` for a snapshot; `now` is in seconds since 1970. Plain JSON values only."""
    stages = {stage.worker_id: stage for stage in snapshot.stages}
    return {
        "version": SCHEMA_VERSION,
        "timestamp": round(now, 3),
        "time": _iso(now),
        "cluster": _cluster(snapshot),
        "workers": [_worker(worker, stages.get(worker.worker_id)) for worker in snapshot.workers],
    }


def _cluster(snapshot: ClusterSnapshot) -> dict[str, object]:
    return {
        "ready": snapshot.ready,
        "epoch": snapshot.epoch,
        "stages": len(snapshot.stages),
        "workers": len(snapshot.workers),
        "workers_lost": sum(worker.status == "lost" for worker in snapshot.workers),
        "requests_waiting": snapshot.num_waiting,
        "requests_running": snapshot.num_running,
        "requests_finished": {reason.value: count for reason, count in snapshot.finished},
        "steps_in_flight": snapshot.num_steps_in_flight,
        "max_steps_in_flight": snapshot.max_steps_in_flight,
        "kv_blocks": snapshot.num_blocks,
        "kv_blocks_free": snapshot.num_free_blocks,
        "kv_utilization": _percent(snapshot.num_blocks - snapshot.num_free_blocks, snapshot.num_blocks),
        "prompt_tokens": snapshot.total_prompt_tokens,
        "cached_tokens": snapshot.total_cached_tokens,
        "output_tokens": snapshot.total_output_tokens,
        "preemptions": snapshot.total_preemptions,
    }


def _worker(worker: WorkerSnapshot, stage: StageAssignment | None) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(WORKER_FIELDS)
    row |= {
        "worker": worker.worker_id,
        "status": worker.status,
        "reason": worker.reason,
        "stage": stage.stage_index if stage is not None else None,
        "layers": str(worker.layers) if worker.layers is not None else None,
        "num_layers": len(worker.layers) if worker.layers is not None else 0,
    }
    if worker.report is not None:
        row |= _figures(worker.report)
    return row


def _figures(report: HeartbeatReport) -> dict[str, object]:
    used, total = report.gpu_memory_used_bytes, report.gpu_memory_total_bytes
    if used is None or total is None:
        used, total = report.memory_used_bytes, report.memory_total_bytes
    steps = sum(timing.count for timing in report.timings)
    return {
        "timestamp": round(report.timestamp, 3),
        "time": _iso(report.timestamp),
        "device": report.device,
        "device_name": report.device_name,
        "gpu_utilization": report.gpu_utilization,
        "memory_utilization": _percent(used, total),
        "cpu_utilization": report.cpu_utilization,
        "gpu_memory_used_bytes": report.gpu_memory_used_bytes,
        "gpu_memory_total_bytes": report.gpu_memory_total_bytes,
        "memory_used_bytes": report.memory_used_bytes,
        "memory_total_bytes": report.memory_total_bytes,
        "process_memory_bytes": report.process_memory_bytes,
        "epoch": report.epoch,
        "queue_depth": report.queue_depth,
        "steps_done": report.steps_done,
        "busy_seconds": round(report.busy_s, 6),
        "uptime_seconds": round(report.uptime_s, 6),
        "busy_ratio": round(min(report.busy_s / report.uptime_s, 1.0), 4) if report.uptime_s > 0 else None,
        "step_seconds": round(sum(t.mean_s * t.count for t in report.timings) / steps, 6) if steps > 0 else None,
    }


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole > 0 else None


def _iso(timestamp: float) -> str | None:
    """A time as text; None for a clock so wrong that no date exists for it."""
    try:
        return datetime.fromtimestamp(timestamp, tz=UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


class MetricsWriter:
    """Keeps one metrics file up to date. A reader sees the old file or the new one, never a part.

    A file that can't be written is worth one warning, not a crash; the next warning comes after it worked again.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] | None = None) -> None:
        self._path = path
        self._now = clock or _wall_clock
        self._is_failing = False

    def write(self, snapshot: ClusterSnapshot) -> None:
        """Replace the file. Blocks on the disk: call it off the event loop."""
        text = json.dumps(metrics_document(snapshot, self._now()), indent=2, allow_nan=False) + "\n"
        # Named by process: two masters told to write the same file don't mix their halves.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._is_failing:
                log.warning("%s can't be written (%s); the cluster goes on without it", self._path, exc.strerror or exc)
            self._is_failing = True
            return
        self._is_failing = False


def _wall_clock() -> float:
    """Seconds since 1970."""
    return datetime.now(tz=UTC).timestamp()
