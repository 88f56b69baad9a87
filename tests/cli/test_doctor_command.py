"""`doctor` from the shell's side: tables, sentences, JSON, a running server, and options that can't be."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from api_server import server_in_thread
from fake_observatory import FakeObservatory
from fake_text_engine import FakeTextEngine

from shardwright.cli import doctor as doctor_module
from shardwright.core.calibration import StageProbe, TimedStep, calibrated_workers
from shardwright.core.diagnosis import all_changes, cut_of
from shardwright.core.placement import place
from shardwright.core.placement_costs import PlacementSettings, StageWeights
from shardwright.core.prediction import Cluster, decode_load, predict, prompt_loads
from shardwright.errors import WorkerUnreachableError
from shardwright.runtime.doctor import Examination, MeasuredLink, MeasuredWorker, _sentences
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.short_load import Achieved
from shardwright.types import LinkMeasures, MachineMeasures, ModelCosts, WorkerCapacity

COSTS = ModelCosts(
    name="toy", hidden_size=512, layer_bytes=(8 * 2**20,) * 12, layer_kv_bytes_per_token=(512,) * 12,
    embedding_bytes=2**24, head_bytes=2**24, tied_embedding=True, activation_bytes_per_token=1024, max_context=4096,
)  # fmt: skip
FAST = LinkMeasures(round_trip_s=0.0004, transfers=((1200, 0.0005), (600_000, 0.006)))
SLOW = LinkMeasures(round_trip_s=0.04, transfers=((1200, 0.0405), (600_000, 0.2)))


def examination(workload, *, is_loaded):
    """Two workers, the second behind a slow link; a silent third."""
    known = [
        SimpleNamespace(
            worker_id=name,
            entry=WorkerEntry(username=name, ip="10.0.0.1", port=port),
            description=SimpleNamespace(host_id=name, device="cpu", num_threads=4),
            capacity=WorkerCapacity(
                worker_id=name, host_id=name, device="cpu", memory_bytes=2**31, read_bandwidth=1e10, matrix_rate=1e12
            ),
        )
        for port, name in enumerate(("near", "far"), start=1)
    ]
    measures = MachineMeasures(
        dtype="bfloat16", num_threads=4, read_bandwidth=1e10, matrix_rate=1e12, disk_bandwidth=5e8
    )
    workers = tuple(MeasuredWorker(worker=each, measures=measures, slowdown=0.0) for each in known)
    links = tuple(
        MeasuredLink(sender=sender, receiver=receiver, measures=SLOW if "far" in {sender, receiver} else FAST)
        for sender, receiver in (("", "near"), ("", "far"), ("near", "far"), ("far", "near"))
    )
    settings = PlacementSettings()
    cut = cut_of(place(COSTS, [each.capacity for each in known], settings))
    speeds = {each.worker.worker_id: each.speed for each in workers}
    cluster = Cluster(costs=COSTS, workers=speeds, links={(each.sender, each.receiver): each.speed for each in links})
    probes = ()
    if is_loaded:
        chunk = replace(prompt_loads(cluster, workload.prompt_tokens)[0], num_sampled=0)
        probes = tuple(
            StageProbe(
                stage=stage,
                decodes=(TimedStep(load=decode_load(1, context=100), seconds=0.02),),
                prompt=TimedStep(load=chunk, seconds=0.2),
                hand_over_s=0.001,
            )
            for stage in cut
        )
        cluster = replace(cluster, workers=calibrated_workers(StageWeights(COSTS, settings), speeds, probes))
    figures = predict(cluster, cut, workload)
    achieved = Achieved(one_tokens_per_s=8.0, many_tokens_per_s=50.0, time_to_first_token_s=0.9, prompt_tokens=512)
    return Examination(
        model=SimpleNamespace(costs=COSTS, dtype="bfloat16"),
        workers=workers,
        silent=((WorkerEntry(username="gone", ip="10.0.0.9", port=1), WorkerUnreachableError("nobody answers")),),
        links=links,
        probes=probes,
        cluster=cluster,
        cut=cut,
        figures=figures,
        achieved=achieved if is_loaded else None,
        sentences=tuple(_sentences(figures)),
        changes=all_changes(cluster, [each.capacity for each in known], cut, workload),
    )


@pytest.fixture
def wishes(monkeypatch):
    """What was asked for; the examination itself is made up."""
    asked = []

    async def fake(config, wish, *, local_workers, worker_options):
        asked.append(wish)
        return examination(wish.workload, is_loaded=wish.loads_model)

    monkeypatch.setattr(doctor_module, "_examine", fake)
    return asked


def test_tables_have_units_and_the_sentences_name_the_culprit_and_the_changes(run_cli, wishes):
    outcome = run_cli("doctor", "--model", "toy")
    assert outcome.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert rows[0][:5] == ["near", "cpu", "4", "10.0", "1000"]
    assert ["master", "near", "0.40"] in [row[:3] for row in rows]
    achieved = next(row for row in rows if row[0].startswith("decode of 1 sequence"))
    assert achieved[2] == "8.0"
    assert float(achieved[3]) == pytest.approx(float(achieved[1]) / 8.0, abs=0.02)
    assert "memory GB/s" in outcome.out
    assert "Decode of one sequence is bound by" in outcome.out
    assert "The link from worker near to worker far takes 20" in outcome.out
    assert "1. Leave out worker far: near 0-11: +" in outcome.out
    assert "warning: examined without gone: nobody answers" in outcome.err
    assert wishes[0].workload.num_sequences == 8
    assert not wishes[0].is_quick


def test_without_a_run_the_bound_is_called_one(run_cli, wishes):
    outcome = run_cli("doctor", "--model", "toy", "--no-run", "--sequences", "2", "--prompt-tokens", "100")
    assert outcome.code == 0
    assert "Nothing was loaded" in outcome.out
    assert not wishes[0].loads_model
    assert (wishes[0].workload.num_sequences, wishes[0].workload.prompt_tokens) == (2, 100)


def test_json_has_all_of_it_in_seconds_and_bytes(run_cli, wishes):
    outcome = run_cli("doctor", "--model", "toy", "--json", "--quick")
    content = json.loads(outcome.out)
    assert wishes[0].is_quick
    assert [worker["worker"] for worker in content["workers"]] == ["near", "far"]
    assert content["workers"][0]["disk_bandwidth"] == 5e8
    assert content["links"][0] == {
        "sender": None,
        "receiver": "near",
        "round_trip_s": 0.0004,
        "transfers": [{"bytes": 1200, "seconds": 0.0005}, {"bytes": 600000, "seconds": 0.006}],
        "bytes_per_s": content["links"][0]["bytes_per_s"],
    }
    predicted = content["predicted"]
    assert sum(part["seconds"] for part in predicted["decode_one_parts"]) == pytest.approx(
        1 / predicted["decode_one_tokens_per_s"]
    )
    assert content["is_calibrated"]
    assert content["achieved"]["decode_tokens_per_s"] == 50.0
    first = content["changes"][0]
    assert first["kind"] == "leave out"
    assert first["workers"] == ["far"]
    assert first["gain"] == pytest.approx(first["predicted"]["new_tokens_per_s"] / predicted["new_tokens_per_s"] - 1)


@pytest.mark.parametrize("option", [["--no-run"], ["--quick"], ["--model", "x"], ["--local-workers", "2"]])
def test_options_that_mean_nothing_to_a_running_server_are_refused(run_cli, option):
    outcome = run_cli("doctor", "--url", "http://127.0.0.1:1", *option)
    assert outcome.code == 2
    assert f"error: {option[0]} says what to measure" in outcome.err


def test_more_sequences_than_run_at_once_are_refused(run_cli, wishes):
    outcome = run_cli("doctor", "--model", "toy", "--sequences", "100")
    assert (outcome.code, wishes) == (2, [])
    assert "error: --sequences is 100, but at most 64 run at once" in outcome.err


def test_a_registry_without_workers_says_what_to_do(run_cli, tmp_path):
    outcome = run_cli("doctor", "--model", tmp_path / "none")
    assert outcome.code == 2
    assert outcome.err.startswith("error: workers.json lists no worker; add one")


def test_a_running_server_is_judged_by_its_own_steps(run_cli):
    seen = FakeObservatory()
    with server_in_thread(FakeTextEngine(observatory=seen)) as server:
        outcome = run_cli("doctor", "--url", server.url)
        as_json = run_cli("doctor", "--url", server.url, "--json")
    with server_in_thread(FakeTextEngine(observatory=FakeObservatory(passages=()))) as server:
        nothing = run_cli("doctor", "--url", server.url)
    assert outcome.code == 0, outcome.err
    assert "part of a step" in outcome.out
    assert "is bound by" in outcome.out
    content = json.loads(as_json.out)
    kinds = [content["decode"], content["prefill"]]
    assert any(kinds)
    for summary in kinds:
        if summary is not None:
            assert sum(part["seconds"] for part in summary["parts"]) > 0
            assert summary["sentences"]
    assert nothing.code == 3
    assert "has no steps to judge by; send it requests" in nothing.err
