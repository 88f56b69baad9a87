"""The cluster's metrics: names and units by Prometheus' conventions, values from one view, labels bounded."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_observatory import NOW, FakeObservatory, example_report, example_view, example_worker, spread
from fake_text_engine import FakeTextEngine
from prometheus_client.parser import text_string_to_metric_families

from shardwright.api.app import create_app
from shardwright.api.cluster_metrics import FAMILIES, MAX_KINDS, bounded
from shardwright.api.metrics import Metrics
from shardwright.config import ServeConfig
from shardwright.types import PHASE_BUCKETS_S, FinishReason

MIB = 1024 * 1024
UNITS = ("seconds", "bytes", "ratio", "celsius", "watts", "info")
COUNTED = {
    "recovering",
    "event_listeners", "kv_blocks", "kv_blocks_cached", "kv_blocks_used", "pipeline_epoch", "pipeline_stages", "ready",
    "sequences_running", "sequences_waiting", "sequences_waiting_limit", "stage_epoch", "stage_layers",
    "stage_queue_depth", "steps_in_flight", "steps_in_flight_limit", "worker_ranks", "worker_up", "workers",
}  # fmt: skip


@pytest.fixture
def seen():
    """A cluster of two workers, one of them with a GPU, and a third one without a stage."""
    workers = (example_worker("rack-1", 0), example_worker("desk", 1), example_worker("late", None, report=None))
    return FakeObservatory(cluster=example_view(workers))


def render(seen):
    return Metrics(FakeTextEngine(observatory=seen)).render().decode()


def samples(seen):
    """Values by name without prefix and label values in the order of the labels' names."""
    found = {}
    for family in text_string_to_metric_families(render(seen)):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found[(sample.name.removeprefix("shardwright_"), *labels)] = sample.value
    return found


def about(found, worker):
    """The names of all samples that have this worker as a label."""
    return {name for name, *labels in found if worker in labels}


def test_every_family_has_the_type_and_the_labels_that_it_is_listed_with(seen):
    text = render(seen)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for listed in FAMILIES:
        family = families[f"shardwright_{listed.name}".removesuffix("_total")]
        assert (family.type, family.documentation) == (listed.kind, listed.text)
        assert family.samples, f"{listed.name} has no sample in a cluster that has everything"
        for sample in family.samples:
            assert {name for name in sample.labels if name != "le"} == set(listed.labels), listed.name
    types = re.findall(r"^# TYPE shardwright_(\w+) (\w+)$", text, re.MULTILINE)
    assert {name: kind for name, kind in types if name in {each.name for each in FAMILIES}} == {
        each.name: each.kind for each in FAMILIES
    }


def test_names_end_in_base_units_or_name_what_is_counted(seen):
    for name, kind in re.findall(r"^# TYPE shardwright_(\w+) (\w+)$", render(seen), re.MULTILINE):
        if name.endswith("_created"):
            continue  # the client library's own
        assert (kind == "counter") == name.endswith("_total"), name
        if kind == "gauge":
            assert name in COUNTED or name.rpartition("_")[2] in UNITS, name
        if kind == "histogram":
            assert name.endswith("_seconds"), name
        assert not re.search(r"_(ms|us|milli|kb|mb|gb|percent|minutes|hours)(_|$)", name), name
    assert all(re.fullmatch(r"[a-z_]+", label) for family in FAMILIES for label in family.labels)


def test_values_are_those_of_the_view(seen):
    found = samples(seen)
    expected = {
        ("ready",): 1,
        ("start_time_seconds",): NOW - 3600,
        ("master_info", "8", "fake/characters-1"): 1,
        ("sequences_waiting",): 2,
        ("sequences_waiting_limit",): 8,
        ("sequences_running",): 3,
        ("sequences_finished_total", "stop"): 9,
        ("sequences_finished_total", "error"): 0,
        ("prompt_tokens_total",): 1000,
        ("cached_prompt_tokens_total",): 250,
        ("output_tokens_total",): 770,
        ("preemptions_total",): 4,
        ("prefix_cache_hit_ratio",): 0.25,
        ("kv_blocks",): 100,
        ("kv_blocks_used",): 40,
        ("kv_blocks_cached",): 5,
        ("pipeline_epoch",): 3,
        ("pipeline_stages",): 2,
        ("steps_in_flight",): 1,
        ("steps_in_flight_limit",): 2,
        ("errors_total", "LinkLostError"): 1,
        ("workers", "ready"): 2,
        ("workers", "joining"): 1,
        ("worker_up", "rack-1"): 1,
        ("worker_up", "late"): 1,
        ("worker_info", "cuda:0", "NVIDIA L4", "host-of-desk", "desk"): 1,
        ("worker_errors_total", "LinkLostError", "rack-1"): 1,
        ("master_round_trip_seconds", "desk"): 0.0006,
        ("weights_loaded_bytes_total", "cache", "rack-1"): 300 * MIB,
        ("weights_loaded_bytes_total", "disk", "desk"): 1600 * MIB,
        ("offload_read_bytes_total", "rack-1"): 240_000 * MIB,
        ("offload_wait_seconds_total", "rack-1"): 12.5,
        ("stage_busy_ratio", "rack-1"): 0.5,
        ("stage_busy_seconds_total", "rack-1"): 30,
        ("stage_steps_total", "desk"): 400,
        ("stage_queue_depth", "rack-1"): 1,
        ("stage_queue_depth", "desk"): 0,
        ("stage_layers", "desk"): 4,
        ("stage_weight_bytes", "desk"): 800 * MIB,
        ("stage_kv_bytes", "desk"): 200 * MIB,
        ("stage_epoch", "rack-1"): 3,
        ("link_sent_bytes_total", "desk", "rack-1"): 4_000_000,
        ("link_steps_total", "desk", "rack-1"): 400,
        ("link_round_trip_seconds", "desk", "rack-1"): 0.0004,
        ("gpu_utilization_ratio", "cuda:0", "desk"): 0.64,
        ("gpu_memory_used_bytes", "cuda:0", "desk"): 18_000 * MIB,
        ("gpu_memory_total_bytes", "cuda:0", "desk"): 24_000 * MIB,
        ("gpu_temperature_celsius", "cuda:0", "desk"): 61,
        ("gpu_power_watts", "cuda:0", "desk"): 70.5,
        ("cpu_utilization_ratio", "rack-1"): 0.97,
        ("memory_used_bytes", "rack-1"): 16_000 * MIB,
        ("memory_total_bytes", "rack-1"): 64_000 * MIB,
        ("process_memory_bytes", "rack-1"): 1_500 * MIB,
        ("worker_ranks", "rack-1"): 1,
        ("worker_ranks", "desk"): 2,
        ("gpu_utilization_ratio", "cuda:1", "desk"): 0.6,
        ("rank_process_memory_bytes", "cuda:0", "0", "desk"): 1_500 * MIB,
        ("rank_process_memory_bytes", "cuda:1", "1", "desk"): 1_400 * MIB,
        ("rank_gpu_utilization_ratio", "cuda:0", "0", "desk"): 0.64,
        ("rank_gpu_utilization_ratio", "cuda:1", "1", "desk"): 0.6,
        ("rank_gpu_memory_used_bytes", "cuda:1", "1", "desk"): 17_000 * MIB,
        ("rank_gpu_memory_total_bytes", "cuda:1", "1", "desk"): 24_000 * MIB,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert len([name for name in found if name[0] == "sequences_finished_total"]) == len(FinishReason)


def test_phases_are_histograms_whose_buckets_add_up(seen):
    found = samples(seen)
    counts = spread(400, peak=4)  # of the phase `queue`
    bounds = [*map(str, PHASE_BUCKETS_S), "+Inf"]
    assert [found["stage_phase_seconds_bucket", bound, "queue", "rack-1"] for bound in bounds] == [
        sum(counts[: index + 1]) for index in range(len(bounds))
    ]
    assert found["stage_phase_seconds_count", "queue", "rack-1"] == 400
    assert found["stage_phase_seconds_sum", "queue", "rack-1"] == 0.5
    assert found["stage_phase_seconds_sum", "wire", "desk"] == 0.16
    phases = {labels[-2] for name, *labels in found if name == "stage_phase_seconds_count"}
    assert phases == {"wire", "queue", "serialise", "compute", "send", "wait"}


def test_what_is_not_known_is_not_told(seen):
    found = samples(seen)
    assert about(found, "late") == {"worker_up", "worker_info", "worker_ranks", "master_round_trip_seconds"}
    assert not any(name.startswith(("gpu_", "rank_")) for name in about(found, "rack-1"))
    assert not any(name.startswith("link_") for name, *labels in found if labels[-1:] == ["desk"])
    seen.change_worker("rack-1", busy_ratio=None, master_round_trip_s=None, wire=None)
    found = samples(seen)
    assert not {"stage_busy_ratio", "master_round_trip_seconds"} & about(found, "rack-1")
    assert ("stage_phase_seconds_count", "wire", "rack-1") not in found
    assert ("stage_phase_seconds_count", "queue", "rack-1") in found


def test_a_lost_worker_keeps_what_only_grows_and_nothing_else(seen):
    before = samples(seen)
    seen.change_worker("rack-1", status="lost", reason="the link broke")
    found = samples(seen)
    assert found["worker_up", "rack-1"] == 0
    assert found["workers", "lost"] == 1
    kinds = {each.name: each.kind for each in FAMILIES}
    kept = about(found, "rack-1")
    assert {name for name in kept if kinds.get(name) == "gauge"} == {"worker_up"}
    grows = {name for name in about(before, "rack-1") if kinds.get(name) != "gauge"}
    assert kept == grows | {"worker_up"}
    assert found["stage_steps_total", "rack-1"] == before["stage_steps_total", "rack-1"]


def test_a_master_without_a_pipeline_still_answers(seen):
    seen.cluster = example_view(())
    seen.cluster = replace(seen.cluster, snapshot=replace(seen.cluster.snapshot, total_prompt_tokens=0))
    found = samples(seen)
    assert (found["ready",], found["pipeline_stages",], found["prefix_cache_hit_ratio",]) == (0, 0, 0)


def test_kinds_of_errors_without_end_become_one_label(seen):
    many = tuple((f"Error{number}", number) for number in range(1, 101))
    seen.change_worker("rack-1", report=example_report(errors=many))
    kinds = {name[1]: value for name, value in samples(seen).items() if name[0] == "worker_errors_total"}
    assert len(kinds) == MAX_KINDS + 1
    assert kinds["other"] == sum(range(MAX_KINDS + 1, 101))
    assert sum(kinds.values()) == sum(range(1, 101))
    assert bounded((("other", 2), ("a", 1))) == [("a", 1), ("other", 2)]
    assert bounded(()) == []


def test_labels_that_workers_choose_can_not_break_the_format(seen):
    name = 'a"b\\c\nd 🐢'
    odd = replace(example_worker("desk", 1), worker_id=name, device_name="x\n# TYPE y counter")
    seen.change_view(workers=(seen.cluster.workers[0], odd))
    assert samples(seen)["worker_up", name] == 1


SECTION = (
    (Path(__file__).parents[2] / "docs" / "monitoring.md")
    .read_text()
    .partition("\n## Over HTTP\n")[2]
    .split("\n## ")[0]
)


def test_the_document_lists_every_metric_with_kind_labels_and_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (gauge|counter|histogram) \|([^|]*)\| ([^|]+) \|$", SECTION, re.MULTILINE)
    listed = {name: (kind, tuple(re.findall(r"\w+", labels)), text) for name, kind, labels, text in rows}
    assert {name: each for name, each in listed.items() if name in {family.name for family in FAMILIES}} == {
        family.name: (family.kind, family.labels, family.text) for family in FAMILIES
    }
    metrics = create_app(FakeTextEngine(), ServeConfig()).state.service.metrics
    served = {
        family.name.removeprefix("shardwright_") + "_total" * (family.type == "counter"): family
        for family in metrics.registry.collect()
    }
    assert set(listed) == set(served)
    assert {name: (kind, text) for name, (kind, _, text) in listed.items()} == {
        name: (family.type, family.documentation) for name, family in served.items()
    }


def test_the_document_names_every_path_and_setting_of_this():
    paths = [path for path in create_app(FakeTextEngine(), ServeConfig()).openapi()["paths"] if "/v1/" not in path]
    observing = [path for path in paths if path not in ("/health", "/ready")]
    assert len(observing) == 9
    assert [path for path in observing if f"`{path}" not in SECTION.replace("GET ", "")] == []
