"""What a running master can tell: steps on one clock, requests, workers, links, losses, the past."""

import asyncio
import dataclasses
import json
from dataclasses import replace
from typing import ClassVar

import pytest
from fake_observatory import example_view
from observed_cluster import BYTES_OUT, observed_cluster

from shardwright.config import MasterConfig
from shardwright.runtime.observatory import MasterObservatory
from shardwright.runtime.session import _MetricsFiles
from shardwright.types import GREEDY, FinishReason, StopConditions, WorkerDescription


async def until(condition):
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110  nobody announces what the observatory has learned
            await asyncio.sleep(0.005)


async def answer(cluster, prompt=(5, 6, 7), count=6):
    """Have one request answered; gives its id."""
    seq_id, reader = await cluster.engine.submit(prompt, GREEDY, StopConditions(max_new_tokens=count))
    async for _ in reader:
        pass
    return seq_id


def whole_steps(observatory):
    return [s for s in observatory.steps() if s.returned_at is not None and len(s.stages) == s.num_stages]


async def everything_told(cluster):
    observatory = cluster.observatory
    await until(lambda: len(whole_steps(observatory)) == len(observatory.steps()))


# --- steps -------------------------------------------------------------------------------------------


async def test_steps_are_seen_on_the_masters_clock_whatever_the_workers_clocks_show():
    async with observed_cluster({"a": 1e6, "b": 86_400.5}) as cluster:
        await answer(cluster)
        await everything_told(cluster)
        steps = cluster.observatory.steps()
        now = cluster.observatory.view().at
    assert [step.number for step in steps] == list(range(1, 8)), "the probe, the prompt, a step for each further token"
    for step in steps:
        first, second = step.stages
        assert (first.worker_id, first.stage_index, second.worker_id, second.stage_index) == ("a", 0, "b", 1)
        times = [step.sent_at]
        for stage in step.stages:
            times += [stage.arrived_at, stage.started_at, stage.finished_at, stage.sent_at]
            assert stage.finished_at - stage.started_at >= 0.0039, "a stage's own time is not changed"
        times.append(step.returned_at)
        assert times == sorted(times)
        assert second.wire_s >= 0.0
        links = first.wire_s + second.wire_s + step.returned_at - second.sent_at
        assert links >= 0.0019, "the delay of the link is somewhere on the way"
        assert (first.bytes_out, second.bytes_in, second.bytes_out) == (BYTES_OUT, BYTES_OUT, 0)
    assert now - 10.0 < steps[0].sent_at < steps[-1].returned_at <= now


async def test_steps_can_be_followed_while_they_grow():
    async with observed_cluster() as cluster:
        observatory = cluster.observatory
        cursor, latest = 0, {}

        def follow():
            nonlocal cursor
            cursor, steps = observatory.steps_changed(cursor)
            latest.update({step.number: step for step in steps})
            return len(steps)

        answering = asyncio.create_task(answer(cluster, count=20))
        while not answering.done():
            follow()
            await asyncio.sleep(0.003)
        await everything_told(cluster)
        follow()
        assert [latest[number] for number in sorted(latest)] == list(observatory.steps())
        assert follow() == 0, "nothing is told twice"


async def test_workers_are_asked_for_each_trace_once():
    async with observed_cluster() as cluster:
        await answer(cluster, count=10)
        await everything_told(cluster)
        stage = cluster.stages["a"]
        await until(lambda: stage.asked[-1] == len(stage.traces) == 11)
        assert stage.asked == sorted(stage.asked)


# --- requests ----------------------------------------------------------------------------------------


async def test_a_request_is_told_of_from_its_arrival_to_its_end():
    async with observed_cluster(token_budget=8) as cluster:
        seq_id = await answer(cluster, prompt=tuple(range(5, 25)), count=4)
        trace = cluster.observatory.request(seq_id)
        assert [(step.num_tokens, step.is_prompt) for step in trace.steps] == [
            (8, True),
            (8, True),
            (4, True),
            (1, False),
            (1, False),
            (1, False),
        ]
        numbers = {step.number for step in cluster.observatory.steps()}
        assert {step.number for step in trace.steps} < numbers, "the steps can be found in the timeline"
        assert trace.submitted_at <= trace.started_at < trace.first_token_at < trace.finished_at
        assert (trace.reason, trace.num_prompt_tokens, trace.num_output_tokens) == (FinishReason.LENGTH, 20, 4)
        assert cluster.observatory.requests() == (replace(trace, steps=()),)
        view = cluster.observatory.view()
        assert sum(view.time_to_first_token.counts) == 1
        assert sum(view.inter_token_latency.counts) == 3
        assert view.inter_token_latency.total == pytest.approx(trace.finished_at - trace.first_token_at, abs=1e-6)


async def test_a_cached_prefix_is_told_of():
    async with observed_cluster() as cluster:
        prompt = tuple(range(5, 25))
        await answer(cluster, prompt)
        seq_id = await answer(cluster, prompt)
        trace = cluster.observatory.request(seq_id)
        assert trace.num_cached_tokens == cluster.engine.snapshot().total_cached_tokens == 16
        assert trace.steps[0].num_tokens == 4


async def test_preemptions_are_counted_while_requests_run_and_when_they_are_over():
    async with observed_cluster(max_kv_tokens=32, prefix_cache=False) as cluster:
        running = [asyncio.create_task(answer(cluster, (5, 6, 7, 8), 16)) for _ in range(3)]
        await until(lambda: cluster.engine.snapshot().total_preemptions)
        open_ = cluster.observatory.requests()
        assert sum(trace.num_preemptions for trace in open_) == cluster.engine.snapshot().total_preemptions
        await asyncio.gather(*running)
        ended = cluster.observatory.requests()
        assert sum(trace.num_preemptions for trace in ended) == cluster.engine.snapshot().total_preemptions
        victim = next(trace for trace in ended if trace.num_preemptions)
        steps = cluster.observatory.request(victim.seq_id).steps
        assert sum(step.num_tokens for step in steps if step.is_prompt) > 4, "some tokens were computed again"


async def test_aborted_rejected_and_closed_requests_end_in_the_trace_too():
    async with observed_cluster(max_waiting=1, max_running=1) as cluster:
        engine = cluster.engine
        stop = StopConditions(max_new_tokens=99)
        first, _reader1 = await engine.submit((5,), GREEDY, stop)
        await until(lambda: engine.snapshot().num_running)
        second, _reader2 = await engine.submit((6,), GREEDY, stop)
        with pytest.raises(Exception, match="queue is full"):
            await engine.submit((7,), GREEDY, stop)
        await engine.abort(second)
        assert [(t.seq_id, t.reason) for t in engine.observatory.requests()] == [
            (second, FinishReason.ABORT),
            (first, None),
        ]
    assert [t.reason for t in engine.observatory.requests()] == [FinishReason.ABORT] * 2


def leaves(told):
    """Every value in nested dataclasses, dictionaries and sequences."""
    match told:
        case dict():
            return [leaf for value in told.values() for leaf in leaves(value)]
        case list() | tuple():
            return [leaf for value in told for leaf in leaves(value)]
    return leaves(dataclasses.asdict(told)) if dataclasses.is_dataclass(told) else [told]


async def test_nothing_of_what_was_asked_or_answered_is_kept():
    marks = (700_000_001, 700_000_002, 700_000_003)
    async with observed_cluster(history_interval_s=0.05) as cluster:
        seq_id = await answer(cluster, marks, count=6)
        await everything_told(cluster)
        observatory = cluster.observatory
        told = leaves([observatory.view(), observatory.steps(), observatory.request(seq_id), observatory.history()])
        told += leaves([observatory.requests(), observatory.metrics_rows()])
    assert len(told) > 500
    assert not [leaf for leaf in told if isinstance(leaf, int) and 700_000_000 <= leaf <= 700_000_100]
    assert not [leaf for leaf in told if "70000000" in str(leaf) and isinstance(leaf, str)]


class Unmoved:
    """An engine to which nothing happens."""

    loaded: ClassVar = {}
    failure = ""

    def snapshot(self):
        return example_view(()).snapshot

    def is_ready(self):
        return False

    def num_preemptions(self, seq_id):
        return 0


def test_times_of_day_stay_in_order_until_somebody_sets_the_systems_clock():
    clocks = {"own": 100.0, "wall": 1_000_100.0}
    observatory = MasterObservatory(
        Unmoved(),
        addresses={},
        model_name="m",
        num_layers=1,
        clock=lambda: clocks["own"],
        wall_clock=lambda: clocks["wall"],
    )
    observatory.submitted(1, 3, 100.0)
    assert (observatory.view().at, observatory.view().started_at) == (1_000_100.0, 1_000_100.0)
    clocks["own"], clocks["wall"] = 101.0, 1_000_101.2
    assert observatory.view().at == 1_000_101.0, "a clock that is set right a little at a time is not followed"
    clocks["own"], clocks["wall"] = 102.0, 900_000.0
    assert observatory.view().at == 900_000.0
    assert observatory.requests()[0].submitted_at == 899_998.0, "what was told before moves with it"


# --- workers and links -------------------------------------------------------------------------------


async def test_workers_and_links_are_shown_in_the_pipelines_order():
    async with observed_cluster() as cluster:
        await answer(cluster, count=30)
        await everything_told(cluster)
        view = cluster.observatory.view()
    first, second = view.workers
    assert (first.worker_id, first.stage_index, second.worker_id, second.stage_index) == ("a", 0, "b", 1)
    assert (first.first_layer, second.end_layer, first.end_layer) == (0, 4, second.first_layer)
    assert (first.address, first.host_id, first.device) == (cluster.addresses["a"], "host-a", "cpu")
    assert (first.memory_limit_bytes, first.weight_bytes, first.kv_bytes) == (4500, 1000, 500)
    assert 0.0 <= first.report_age_s < 5.0
    assert 0.0 < first.master_round_trip_s < 0.05
    assert 0.2 < first.busy_ratio <= 1.0, "each stage computes 4 of a step's 10 ms, at least"
    assert first.report.traces == (), "the steps tell of them"
    assert [sum(worker.wire.counts) for worker in view.workers] == [31, 31]
    assert [(link.sender, link.receiver) for link in view.links] == [("", "a"), ("a", "b"), ("b", "")]
    there, between, back = view.links
    assert (there.round_trip_s, back.round_trip_s) == (first.master_round_trip_s, second.master_round_trip_s)
    assert (between.round_trip_s, there.bytes_per_s, back.bytes_per_s) == (0.004, None, None)
    assert between.bytes_per_s > 5 * BYTES_OUT
    assert there.wire_s + between.wire_s + back.wire_s >= 0.0019
    assert (view.model_name, view.num_layers, view.is_ready, view.failure, view.num_errors) == ("fake", 4, True, "", ())
    assert view.started_at < view.at


async def test_what_a_worker_says_of_itself_is_shown():
    async with observed_cluster() as cluster:
        description = WorkerDescription(
            protocol_version=3,
            package_version="0",
            torch_version="0",
            transformers_version="0",
            host_id="host-a",
            pid=1,
            device="cpu",
            device_name="some CPU",
            memory_total_bytes=1,
            memory_available_bytes=1,
            read_bandwidth=1.0,
            matrix_rate=1.0,
            num_threads=1,
            num_ranks=2,
            metrics_port=9464,
        )
        cluster.observatory.worker_described("a", description, "rack-1.example:50051")
        first, second = cluster.observatory.view().workers
    assert (first.metrics_target, first.device_name, first.address) == (
        "rack-1.example:9464",
        "some CPU",
        "rack-1.example:50051",
    )
    assert second.metrics_target == ""
    assert (first.num_ranks, second.num_ranks) == (2, 1)


async def test_a_lost_worker_is_seen_with_its_errors_and_so_is_the_end_of_the_pipeline():
    async with observed_cluster() as cluster:
        cluster.stages["b"].errors = (("FrameError", 2),)
        await answer(cluster)
        await until(lambda: dict(cluster.observatory.view().num_errors) == {"FrameError": 2})
        cluster.lose("b")
        await until(lambda: cluster.engine.failure)
        view = cluster.observatory.view()
        lost = next(worker for worker in view.workers if worker.worker_id == "b")
        assert (lost.status, lost.stage_index, lost.busy_ratio) == ("lost", None, None)
        assert "cut" in lost.reason
        assert (view.is_ready, view.links) == (False, ())
        assert view.failure == cluster.engine.failure
        errors = dict(view.num_errors)
        assert (errors["WorkerLostError"], errors["FrameError"]) == (1, 2)
        noticed = {"LinkLostError", "WorkerUnreachableError"} & errors.keys()
        assert noticed, "by the links or by the heartbeat, whichever came first"
        assert dict(cluster.observatory.view().num_errors)["WorkerLostError"] == 1, "a loss is counted once"


async def test_a_recovery_is_seen_as_a_new_epoch_with_other_stages():
    async with observed_cluster({"a": 10.0, "b": 7.0, "c": 0.0}, recover=True) as cluster:
        await until(lambda: cluster.engine.snapshot().ready)
        before = cluster.observatory.view()
        first = [worker.worker_id for worker in before.workers if worker.stage_index is not None]
        stop = StopConditions(max_new_tokens=40)
        seq_id, reader = await cluster.engine.submit((5, 6), GREEDY, stop)
        await anext(reader)
        cluster.lose(first[0])
        async for _ in reader:
            pass
        after = cluster.observatory.view()
        trace = cluster.observatory.request(seq_id)
        steps = {step.number: step for step in cluster.observatory.steps()}
        assert after.snapshot.epoch == before.snapshot.epoch + 1
        names = [worker.worker_id for worker in after.workers if worker.stage_index is not None]
        assert first[0] not in names
        assert [worker.worker_id for worker in after.workers][: len(names)] == names, "those with stages come first"
        assert [link.sender for link in after.links] == ["", *names]
        assert {steps[part.number].epoch for part in trace.steps} == {before.snapshot.epoch, after.snapshot.epoch}
        numbers = [part.number for part in trace.steps]
        assert numbers == sorted(numbers)
        assert trace.num_output_tokens == 40
        assert any(step.returned_at is None for step in steps.values()), "one was under way and never came back"


# --- the past ----------------------------------------------------------------------------------------


async def test_the_past_is_noted_point_by_point():
    async with observed_cluster(history_interval_s=0.05) as cluster:
        await answer(cluster, tuple(range(5, 25)), count=20)
        ended = cluster.observatory.view().at
        await until(lambda: [point for point in cluster.observatory.history() if point.at > ended][2:])
        points = cluster.observatory.history()
        rows = cluster.observatory.metrics_rows()
        last = cluster.observatory.view().at
    tokens = sum(point.output_tokens_per_s * point.interval_s for point in points)
    prompts = sum(point.prompt_tokens_per_s * point.interval_s for point in points)
    assert (tokens, prompts) == (pytest.approx(20), pytest.approx(20))
    assert sum(point.ttft_p50_s is not None for point in points) == 1
    assert any(point.inter_token_p95_s is not None for point in points)
    assert all(0.04 < point.interval_s < 1.0 for point in points)
    assert [point.at for point in points] == sorted(point.at for point in points)
    assert points[-1].at <= last
    assert points[-1].is_ready
    assert {row["worker"] for row in rows} == {"a", "b"}
    assert len(rows) >= 2 * len(points)


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def test_the_files_are_kept_up_and_a_master_that_follows_goes_on_with_them(tmp_path):
    config = MasterConfig(metrics=tmp_path / "metrics.json", metrics_interval_s=0.05)

    async def run_for(seconds):
        async with observed_cluster(history_interval_s=config.metrics_interval_s) as cluster:
            files = _MetricsFiles(cluster.engine, config)
            task = asyncio.create_task(files.keep())
            await answer(cluster)
            await asyncio.sleep(seconds)
            await files.end(task)
            return cluster.observatory.metrics_rows()

    first = await run_for(0.2)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["cluster"]["output_tokens"] == 6
    written = rows_in(tmp_path / "metrics.jsonl")
    assert len(written) >= 6
    assert written == first[: len(written)], "each row once, in order"
    second = await run_for(0.1)
    assert second[: len(written)] == written, "what the file had is known to the next master"
    assert rows_in(tmp_path / "metrics.jsonl")[: len(written)] == written
    assert rows_in(tmp_path / "metrics.jsonl") == second[: len(rows_in(tmp_path / "metrics.jsonl"))]
    assert len(rows_in(tmp_path / "metrics.jsonl")) >= len(written) + 4


async def test_without_a_history_there_is_no_file_of_it(tmp_path):
    config = MasterConfig(metrics=tmp_path / "metrics.json", write_history=False)
    async with observed_cluster() as cluster:
        files = _MetricsFiles(cluster.engine, config)
        await files.end(asyncio.create_task(files.keep()))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
