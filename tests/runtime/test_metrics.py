"""The metrics file: its content, its documentation, and disks that don't take it."""

import json
import logging
import re
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from shardwright.runtime.metrics import (
    CLUSTER_FIELDS,
    DOCUMENT_FIELDS,
    SCHEMA_VERSION,
    WORKER_FIELDS,
    MetricsWriter,
    metrics_document,
)
from shardwright.types import (
    ClusterSnapshot,
    FinishReason,
    HeartbeatReport,
    LayerRange,
    StageAssignment,
    StepTiming,
    WorkerSnapshot,
)

NOW = 1_767_225_605.25  # 2026-01-01T00:00:05.250Z
MONITORING = Path(__file__).parents[2] / "docs" / "monitoring.md"


def stage(worker_id, index, layers):
    return StageAssignment(
        epoch=3,
        worker_id=worker_id,
        stage_index=index,
        num_stages=2,
        layers=layers,
        num_blocks=400,
        block_size=16,
        next_worker_id=None,
    )


GPU_REPORT = HeartbeatReport(
    timestamp=NOW - 0.5,
    epoch=3,
    queue_depth=1,
    steps_done=1200,
    busy_s=30.0,
    uptime_s=120.0,
    device="cuda:0",
    device_name="NVIDIA L4",
    gpu_utilization=64.0,
    gpu_memory_used_bytes=18_000_000_000,
    gpu_memory_total_bytes=24_000_000_000,
    cpu_utilization=12.5,
    memory_used_bytes=8_000_000_000,
    memory_total_bytes=64_000_000_000,
    process_memory_bytes=1_500_000_000,
    timings=(
        StepTiming(num_sequences=1, num_tokens=1, mean_s=0.02, count=3),
        StepTiming(num_sequences=2, num_tokens=2, mean_s=0.04, count=1),
    ),
)
CPU_REPORT = replace(
    GPU_REPORT,
    timestamp=NOW - 1.0,
    queue_depth=0,
    busy_s=90.0,
    device="cpu",
    device_name="AMD EPYC",
    gpu_utilization=None,
    gpu_memory_used_bytes=None,
    gpu_memory_total_bytes=None,
    cpu_utilization=97.0,
    memory_used_bytes=16_000_000_000,
    timings=(),
)


def example():
    """Two workers of one pipeline, one of them on a GPU."""
    first, second = LayerRange(0, 20), LayerRange(20, 26)
    return ClusterSnapshot(
        epoch=3,
        ready=True,
        stages=(stage("rack-1", 0, first), stage("desk", 1, second)),
        workers=(
            WorkerSnapshot(worker_id="rack-1", status="ready", layers=first, last_heard_s=7.0, report=GPU_REPORT),
            WorkerSnapshot(worker_id="desk", status="ready", layers=second, last_heard_s=6.5, report=CPU_REPORT),
        ),
        num_blocks=400,
        num_free_blocks=300,
        num_waiting=2,
        num_running=8,
        num_steps_in_flight=2,
        max_steps_in_flight=4,
        total_prompt_tokens=5120,
        total_cached_tokens=1024,
        total_output_tokens=1900,
        total_preemptions=1,
        finished=((FinishReason.STOP, 11), (FinishReason.LENGTH, 2)),
    )


def rows(snapshot):
    return {row["worker"]: row for row in metrics_document(snapshot, NOW)["workers"]}


# --- the document ------------------------------------------------------------------------------------


def test_every_documented_field_is_there_and_no_other():
    document = metrics_document(example(), NOW)
    assert list(document) == list(DOCUMENT_FIELDS)
    assert list(document["cluster"]) == list(CLUSTER_FIELDS)
    assert [list(row) for row in document["workers"]] == [list(WORKER_FIELDS)] * 2
    assert document["version"] == SCHEMA_VERSION


def test_times_are_of_the_file_and_of_each_worker():
    document = metrics_document(example(), NOW)
    assert (document["timestamp"], document["time"]) == (NOW, "2026-01-01T00:00:05.250+00:00")
    assert [row["timestamp"] for row in document["workers"]] == [NOW - 0.5, NOW - 1.0]
    assert document["workers"][0]["time"] == "2026-01-01T00:00:04.750+00:00"


def test_a_gpu_worker_tells_of_its_gpu():
    row = rows(example())["rack-1"]
    assert (row["gpu_utilization"], row["memory_utilization"], row["cpu_utilization"]) == (64.0, 75.0, 12.5)
    assert (row["stage"], row["layers"], row["num_layers"], row["epoch"]) == (0, "0-19", 20, 3)
    assert (row["busy_ratio"], row["step_seconds"], row["queue_depth"]) == (0.25, 0.025, 1)


def test_a_cpu_worker_tells_of_its_machine():
    row = rows(example())["desk"]
    assert (row["gpu_utilization"], row["memory_utilization"], row["cpu_utilization"]) == (None, 25.0, 97.0)
    assert (row["gpu_memory_used_bytes"], row["gpu_memory_total_bytes"]) == (None, None)
    assert (row["busy_ratio"], row["step_seconds"]) == (0.75, None)


def test_half_of_a_gpus_figures_leave_the_machines_memory():
    report = replace(GPU_REPORT, gpu_memory_used_bytes=None, gpu_memory_total_bytes=None)
    worker = replace(example().workers[0], report=report)
    row = rows(replace(example(), workers=(worker,)))["rack-1"]
    assert (row["gpu_utilization"], row["memory_utilization"]) == (64.0, 12.5)


def test_a_worker_never_heard_has_a_row_of_nulls():
    worker = WorkerSnapshot(worker_id="new", status="joining", layers=None, last_heard_s=None, report=None)
    row = rows(replace(example(), workers=(worker,)))["new"]
    known = {"worker": "new", "status": "joining", "reason": "", "num_layers": 0}
    assert row == dict.fromkeys(WORKER_FIELDS) | known


def test_a_lost_worker_is_counted_and_keeps_its_last_figures():
    lost = replace(example().workers[1], status="lost", layers=None, reason="its heartbeat is late")
    snapshot = replace(example(), ready=False, stages=(), workers=(example().workers[0], lost))
    assert metrics_document(snapshot, NOW)["cluster"]["workers_lost"] == 1
    row = rows(snapshot)["desk"]
    assert (row["status"], row["reason"]) == ("lost", "its heartbeat is late")
    assert (row["timestamp"], row["stage"], row["layers"]) == (NOW - 1.0, None, None)


def test_the_cluster_tells_its_totals():
    cluster = metrics_document(example(), NOW)["cluster"]
    assert cluster["requests_finished"] == {"stop": 11, "length": 2}
    assert (cluster["kv_blocks"], cluster["kv_blocks_free"], cluster["kv_utilization"]) == (400, 300, 25.0)
    assert (cluster["workers"], cluster["workers_lost"], cluster["stages"]) == (2, 0, 2)


def test_before_there_is_a_pipeline_nothing_is_divided_by_zero():
    snapshot = replace(example(), ready=False, stages=(), workers=(), num_blocks=0, num_free_blocks=0)
    document = metrics_document(snapshot, NOW)
    assert document["cluster"]["kv_utilization"] is None
    assert document["workers"] == []


def test_a_worker_with_a_mad_clock_harms_nobody():
    worker = replace(example().workers[0], report=replace(GPU_REPORT, timestamp=1e300))
    assert rows(replace(example(), workers=(worker,)))["rack-1"]["time"] is None


# --- the documentation -------------------------------------------------------------------------------


def test_the_documentation_has_the_codes_tables():
    text = MONITORING.read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
    assert documented == [*DOCUMENT_FIELDS.items(), *CLUSTER_FIELDS.items(), *WORKER_FIELDS.items()]


def test_the_documentations_example_is_what_the_code_writes():
    text = MONITORING.read_text(encoding="utf-8")
    shown = text.partition("```json\n")[2].partition("```")[0]
    assert json.loads(shown) == metrics_document(example(), NOW)


# --- the file ----------------------------------------------------------------------------------------


def test_the_file_is_the_document(tmp_path):
    path = tmp_path / "metrics.json"
    MetricsWriter(path, clock=lambda: NOW).write(example())
    assert json.loads(path.read_text(encoding="utf-8")) == metrics_document(example(), NOW)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_reader_never_sees_a_part(tmp_path):
    """Files of very different lengths replace each other while another thread parses them."""
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(path, clock=lambda: NOW)
    long = replace(example(), workers=example().workers * 200)
    short = replace(example(), workers=())
    writer.write(short)
    seen, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            seen.append(len(json.loads(path.read_text(encoding="utf-8"))["workers"]))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        writer.write(long)
        writer.write(short)
    stop.set()
    reader.join()
    assert set(seen) <= {0, 400}
    assert seen


@pytest.mark.parametrize("obstacle", ["missing folder", "a folder in its place"])
def test_a_file_that_cannot_be_written_is_one_warning_until_it_works_again(tmp_path, caplog, obstacle):
    folder = tmp_path / "out"
    path = folder / "metrics.json"
    if obstacle == "a folder in its place":
        (path / "full").mkdir(parents=True)
    writer = MetricsWriter(path, clock=lambda: NOW)
    with caplog.at_level(logging.WARNING):
        writer.write(example())
        writer.write(example())
        assert len(caplog.records) == 1
        assert str(path) in caplog.records[0].getMessage()
        if obstacle == "a folder in its place":
            (path / "full").rmdir()
            path.rmdir()
        else:
            folder.mkdir()
        writer.write(example())
        assert json.loads(path.read_text(encoding="utf-8"))["cluster"]["ready"] is True
        assert [file.name for file in folder.iterdir()] == ["metrics.json"]
        path.unlink()
        path.mkdir()
        writer.write(example())
    assert len(caplog.records) == 2


def test_a_disk_that_takes_only_a_part_leaves_the_old_file(tmp_path, caplog):
    """A limit on file sizes stands for a full disk: the write fails in the middle."""
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(path, clock=lambda: NOW)
    writer.write(example())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            writer.write(replace(example(), ready=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
