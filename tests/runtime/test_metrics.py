"""The metrics file: its content, its documentation, and disks that don't take it."""

import json
import logging
import re
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_observatory import example_view, example_worker

from shardwright.runtime.metrics import (
    CLUSTER_FIELDS,
    DOCUMENT_FIELDS,
    ROW_FIELDS,
    SCHEMA_VERSION,
    WORKER_FIELDS,
    MetricsWriter,
    metrics_document,
    metrics_rows,
)
from shardwright.types import FinishReason, HeartbeatReport, RankLoad, StepTiming

NOW = 1_767_225_605.25  # 2026-01-01T00:00:05.250Z
TIME = "2026-01-01T00:00:05.250+00:00"
MONITORING = Path(__file__).parents[2] / "docs" / "monitoring.md"


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
    gpu_temperature_c=61.0,
    gpu_power_w=70.5,
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
    gpu_temperature_c=None,
    gpu_power_w=None,
    cpu_utilization=97.0,
    memory_used_bytes=16_000_000_000,
    timings=(),
)


def example():
    """Two workers of one pipeline, one of them on a GPU."""
    first = example_worker(
        "rack-1",
        0,
        first_layer=0,
        end_layer=20,
        device="cuda:0",
        device_name="NVIDIA L4",
        weight_bytes=8_000_000_000,
        kv_bytes=2_000_000_000,
        busy_ratio=0.3125,
        report=GPU_REPORT,
        report_age_s=0.5,
        master_round_trip_s=0.0006,
    )
    second = example_worker(
        "desk",
        1,
        first_layer=20,
        end_layer=26,
        device="cpu",
        device_name="AMD EPYC",
        weight_bytes=3_000_000_000,
        kv_bytes=600_000_000,
        busy_ratio=0.875,
        report=CPU_REPORT,
        report_age_s=1.0,
        master_round_trip_s=0.0009,
    )
    view = example_view((first, second), at=NOW, num_errors=(("LinkLostError", 1),))
    snapshot = replace(
        view.snapshot,
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
    return replace(view, snapshot=snapshot)


def with_workers(*workers, **changes):
    """The example with these workers."""
    return replace(example_view(workers, at=NOW), **changes)


def rows(view):
    return {row["worker"]: row for row in metrics_document(view)["workers"]}


# --- the document ------------------------------------------------------------------------------------


def test_every_documented_field_is_there_and_no_other():
    document = metrics_document(example())
    assert list(document) == list(DOCUMENT_FIELDS)
    assert list(document["cluster"]) == list(CLUSTER_FIELDS)
    assert [list(row) for row in document["workers"]] == [list(WORKER_FIELDS)] * 2
    assert document["version"] == SCHEMA_VERSION


def test_times_are_of_the_file_and_of_each_worker():
    document = metrics_document(example())
    assert (document["timestamp"], document["time"]) == (NOW, TIME)
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


def test_a_worker_of_several_ranks_tells_of_each_further_one():
    load = RankLoad(
        rank=1, device="cuda:1", device_name="NVIDIA L4", process_memory_bytes=7, gpu_utilization=50.0,
        gpu_memory_used_bytes=8, gpu_memory_total_bytes=9,
    )  # fmt: skip
    worker = replace(example().workers[0], report=replace(GPU_REPORT, ranks=(load,)))
    listed = {
        "rank": 1, "device": "cuda:1", "device_name": "NVIDIA L4", "process_memory_bytes": 7, "gpu_utilization": 50.0,
        "gpu_memory_used_bytes": 8, "gpu_memory_total_bytes": 9, "gpu_temperature_celsius": None,
        "gpu_power_watts": None,
    }  # fmt: skip
    assert rows(with_workers(worker))["rack-1"]["ranks"] == [listed]


def test_half_of_a_gpus_figures_leave_the_machines_memory():
    report = replace(GPU_REPORT, gpu_memory_used_bytes=None, gpu_memory_total_bytes=None)
    worker = replace(example().workers[0], report=report)
    row = rows(with_workers(worker))["rack-1"]
    assert (row["gpu_utilization"], row["memory_utilization"]) == (64.0, 12.5)


def test_a_worker_never_heard_has_a_row_of_nulls():
    worker = example_worker("new", None, report=None, report_age_s=None, master_round_trip_s=None)
    view = with_workers(worker)
    known = {"worker": "new", "status": "joining", "reason": "", "num_layers": 0}
    assert rows(view)["new"] == dict.fromkeys(WORKER_FIELDS) | known
    (row,) = metrics_rows(view)
    known |= {"device": "cpu", "device_name": "AMD EPYC", "timestamp": NOW, "time": TIME}
    del known["reason"]
    assert row == dict.fromkeys(ROW_FIELDS) | known


def test_a_lost_worker_is_counted_and_keeps_its_last_figures_in_the_file_but_not_in_the_rows():
    lost = replace(
        example().workers[1],
        status="lost",
        reason="its heartbeat is late",
        stage_index=None,
        first_layer=None,
        end_layer=None,
    )
    view = with_workers(example().workers[0], lost)
    assert metrics_document(view)["cluster"]["workers_lost"] == 1
    row = rows(view)["desk"]
    assert (row["status"], row["reason"]) == ("lost", "its heartbeat is late")
    assert (row["timestamp"], row["stage"], row["layers"]) == (NOW - 1.0, None, None)
    assert row["cpu_utilization"] == 97.0
    flat = metrics_rows(view)[1]
    assert (flat["worker"], flat["status"], flat["timestamp"]) == ("desk", "lost", NOW)
    assert (flat["cpu_utilization"], flat["queue_depth"], flat["busy_ratio"]) == (None, None, None)


def test_rows_share_the_moment_and_have_every_documented_field():
    first, second = metrics_rows(example())
    assert list(first) == list(second) == list(ROW_FIELDS)
    assert [(row["timestamp"], row["time"]) for row in (first, second)] == [(NOW, TIME)] * 2
    assert (first["worker"], first["stage"], first["layers"], first["busy_ratio"]) == ("rack-1", 0, "0-19", 0.3125)
    assert (first["gpu_temperature_celsius"], first["gpu_power_watts"]) == (61.0, 70.5)
    assert (first["link_bytes_per_second"], first["wire_seconds"]) == (64_000.0, 0.0003)
    assert (second["link_bytes_per_second"], second["round_trip_seconds"]) == (None, 0.0009)
    assert (second["gpu_utilization"], second["memory_utilization"], second["report_age_seconds"]) == (None, 25.0, 1.0)


def test_the_cluster_tells_its_totals():
    cluster = metrics_document(example())["cluster"]
    assert cluster["requests_finished"] == {"stop": 11, "length": 2}
    assert (cluster["kv_blocks"], cluster["kv_blocks_free"], cluster["kv_utilization"]) == (400, 300, 25.0)
    assert (cluster["workers"], cluster["workers_lost"], cluster["stages"]) == (2, 0, 2)


def test_before_there_is_a_pipeline_nothing_is_divided_by_zero():
    view = with_workers()
    document = metrics_document(replace(view, snapshot=replace(view.snapshot, num_blocks=0, num_free_blocks=0)))
    assert document["cluster"]["kv_utilization"] is None
    assert document["workers"] == []


def test_a_worker_with_a_mad_clock_harms_nobody():
    worker = replace(example().workers[0], report=replace(GPU_REPORT, timestamp=1e300))
    assert rows(with_workers(worker))["rack-1"]["time"] is None


def test_figures_that_are_no_numbers_become_null(tmp_path):
    report = replace(GPU_REPORT, gpu_power_w=float("nan"), cpu_utilization=float("inf"), timestamp=float("nan"))
    view = with_workers(replace(example().workers[0], report=report))
    row = rows(view)["rack-1"]
    assert (row["gpu_power_watts"], row["cpu_utilization"], row["timestamp"], row["time"]) == (None,) * 4
    assert metrics_rows(view)[0]["gpu_power_watts"] is None
    MetricsWriter(tmp_path / "metrics.json").write(view)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["workers"] == [row]


# --- the documentation -------------------------------------------------------------------------------


def test_the_documentation_has_the_codes_tables():
    text = MONITORING.read_text(encoding="utf-8").partition("\n## The file\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
    tables = (DOCUMENT_FIELDS, CLUSTER_FIELDS, WORKER_FIELDS, ROW_FIELDS)
    assert documented == [item for table in tables for item in table.items()]


def test_the_documentations_example_is_what_the_code_writes():
    text = MONITORING.read_text(encoding="utf-8").partition("\n## Example\n")[2]
    shown = text.partition("```json\n")[2].partition("```")[0]
    assert json.loads(shown) == metrics_document(example())


# --- the file ----------------------------------------------------------------------------------------


def test_the_file_is_the_document(tmp_path):
    path = tmp_path / "metrics.json"
    MetricsWriter(path).write(example())
    assert json.loads(path.read_text(encoding="utf-8")) == metrics_document(example())
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_reader_never_sees_a_part(tmp_path):
    """Files of very different lengths replace each other while another thread parses them."""
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(path)
    long = replace(example(), workers=example().workers * 200)
    short = with_workers()
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
    writer = MetricsWriter(path)
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
    writer = MetricsWriter(path)
    writer.write(example())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            writer.write(with_workers())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
