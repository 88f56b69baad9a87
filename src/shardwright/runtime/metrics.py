"""Writes what the master knows of its cluster to `metrics.json`, for people, scripts and Grafana's JSON sources.

The same figures of each worker are made into flat rows, one for each moment: `metrics_rows`.

The schema is stable: fields are added, never renamed or removed, without a higher `SCHEMA_VERSION`. The tables here
are the schema; `docs/monitoring.md` shows the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from shardwright.observation import ClusterView, WorkerView
from shardwright.types import HeartbeatReport, LayerRange

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
    "answering": "whether a real token went through the pipeline lately: a request's, or the master's own when idle",
    "failure": "why no request can be answered; empty while there is a pipeline",
    "errors": "errors of the master and of all workers so far, by kind",
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
    "recent_busy_ratio": "the part of the last seconds spent computing, 0 to 1; null before two heartbeats of a stage",
    "gpu_temperature_celsius": "null where NVML does not tell",
    "gpu_power_watts": "what the GPU draws; null where NVML does not tell",
    "weight_bytes": "memory that the stage's weights take",
    "kv_bytes": "memory set aside for K and V",
    "round_trip_seconds": "from the master to the worker and back, the fastest of the last heartbeats",
    "wire_seconds": "mean time of the last steps on the link to the worker; null before the first",
    "link_bytes_per_second": "of tensors to the next stage, over the last seconds; null on the last stage",
    "ranks": "the devices beside its first that compute with it, as objects: rank, device, device_name, "
    "process_memory_bytes and the GPU's figures",
}

ROW_FIELDS: Final[Mapping[str, str]] = {
    "time": "when the row was made, in UTC, ISO 8601; one moment's rows share it",
    "timestamp": "the same in seconds since 1970",
    "worker": "its name",
    "device": "what it computes on: cpu, cuda:0, mps",
    "device_name": "the device's own name",
    "status": "its state in the master's eyes: joining, loading, ready, lost",
    "epoch": "of the stage that it holds; 0: none",
    "stage": "its place in the pipeline, from 0; null: none",
    "layers": "its layers, as first-last; null: none",
    "num_layers": "how many these are",
    "gpu_utilization": "percent of the time that the GPU was busy (NVML); null without an NVIDIA GPU",
    "gpu_memory_used_bytes": "of all processes; null without an NVIDIA GPU",
    "gpu_memory_total_bytes": "null without an NVIDIA GPU",
    "gpu_temperature_celsius": "null where NVML does not tell",
    "gpu_power_watts": "what the GPU draws; null where NVML does not tell",
    "memory_utilization": "percent of the GPU's memory in use; of the machine's without an NVIDIA GPU",
    "cpu_utilization": "percent of all the machine's cores",
    "memory_used_bytes": "RAM of the machine, or of the container",
    "memory_total_bytes": "RAM of the machine, or of the container",
    "process_memory_bytes": "RAM of the worker's own process",
    "weight_bytes": "memory that the stage's weights take",
    "kv_bytes": "memory set aside for K and V",
    "busy_ratio": "the part of the last seconds spent computing, 0 to 1; null without a stage",
    "queue_depth": "steps that wait for its compute thread",
    "steps_done": "steps computed since the stage was loaded",
    "round_trip_seconds": "from the master to the worker and back, the fastest of the last heartbeats",
    "wire_seconds": "mean time of the last steps on the link to the worker; null before the first",
    "link_bytes_per_second": "of tensors to the next stage, over the last seconds; null on the last stage",
    "report_age_seconds": "how long ago the worker told these figures",
}


def metrics_document(view: ClusterView) -> dict[str, object]:
    """The content of `metrics.json`. Plain JSON values only."""
    return {
        "version": SCHEMA_VERSION,
        "timestamp": round(view.at, 3),
        "time": _iso(view.at),
        "cluster": _cluster(view),
        "workers": [_worker(worker, view) for worker in _by_arrival(view)],
    }


def metrics_rows(view: ClusterView) -> list[dict[str, object]]:
    """A flat row for each worker: of one that is lost its name and state, its last figures being of the past."""
    return [_row(worker, view) for worker in _by_arrival(view)]


def _by_arrival(view: ClusterView) -> list[WorkerView]:
    """In the order in which they joined, whatever place a new pipeline gives them."""
    order = {worker.worker_id: index for index, worker in enumerate(view.snapshot.workers)}
    return sorted(view.workers, key=lambda worker: order.get(worker.worker_id, len(order)))


def _cluster(view: ClusterView) -> dict[str, object]:
    snapshot = view.snapshot
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
        "answering": view.is_ready,
        "failure": view.failure,
        "errors": dict(view.num_errors),
    }


def _worker(worker: WorkerView, view: ClusterView) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(WORKER_FIELDS)
    row |= _identity(worker)
    row["reason"] = worker.reason
    if worker.report is None:
        return row
    row |= _figures(worker.report)
    row["recent_busy_ratio"] = _rounded(worker.busy_ratio, 4)
    return _finite(row | _measured(worker, view))


def _row(worker: WorkerView, view: ClusterView) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(ROW_FIELDS)
    row |= _identity(worker)
    if worker.report is not None and worker.status != "lost":
        figures = _figures(worker.report)
        row |= {name: figures[name] for name in ROW_FIELDS if name in figures}
        row["busy_ratio"] = _rounded(worker.busy_ratio, 4)
        row |= _measured(worker, view)
        row["report_age_seconds"] = _rounded(worker.report_age_s, 3)
    row |= {"device": worker.device, "device_name": worker.device_name}
    row |= {"timestamp": round(view.at, 3), "time": _iso(view.at)}
    return _finite(row)


def _identity(worker: WorkerView) -> dict[str, object]:
    layers = None
    if worker.first_layer is not None and worker.end_layer is not None:
        layers = LayerRange(worker.first_layer, worker.end_layer)
    return {
        "worker": worker.worker_id,
        "status": worker.status,
        "stage": worker.stage_index,
        "layers": None if layers is None else str(layers),
        "num_layers": 0 if layers is None else len(layers),
    }


def _measured(worker: WorkerView, view: ClusterView) -> dict[str, object]:
    """What the master measured of it and its links."""
    to_it = next((link for link in view.links if link.receiver == worker.worker_id), None)
    from_it = next((link for link in view.links if link.sender == worker.worker_id), None)
    return {
        "weight_bytes": worker.weight_bytes,
        "kv_bytes": worker.kv_bytes,
        "round_trip_seconds": _rounded(worker.master_round_trip_s, 6),
        "wire_seconds": None if to_it is None else _rounded(to_it.wire_s, 6),
        "link_bytes_per_second": None if from_it is None else _rounded(from_it.bytes_per_s, 1),
    }


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
        "gpu_temperature_celsius": report.gpu_temperature_c,
        "gpu_power_watts": report.gpu_power_w,
        "ranks": [
            {
                "rank": load.rank,
                "device": load.device,
                "device_name": load.device_name,
                "process_memory_bytes": load.process_memory_bytes,
                "gpu_utilization": load.gpu_utilization,
                "gpu_memory_used_bytes": load.gpu_memory_used_bytes,
                "gpu_memory_total_bytes": load.gpu_memory_total_bytes,
                "gpu_temperature_celsius": load.gpu_temperature_c,
                "gpu_power_watts": load.gpu_power_w,
            }
            for load in report.ranks
        ],
    }


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole > 0 else None


def _finite(row: dict[str, object]) -> dict[str, object]:
    """With null for what is no number: JSON has none of these, and one worker's mad figure must not stop the file."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _iso(timestamp: float) -> str | None:
    """A time as text; None for a clock so wrong that no date exists for it."""
    try:
        # Milliseconds are cut off, not rounded: a little more gives those that `timestamp` shows.
        return datetime.fromtimestamp(round(timestamp, 3) + 1e-5, tz=UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


class MetricsWriter:
    """Keeps one metrics file up to date. A reader sees the old file or the new one, never a part.

    A file that can't be written is worth one warning, not a crash; the next warning comes after it worked again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_failing = False

    def write(self, view: ClusterView) -> None:
        """Replace the file. Blocks on the disk: call it off the event loop."""
        text = json.dumps(metrics_document(view), indent=2, allow_nan=False) + "\n"
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
