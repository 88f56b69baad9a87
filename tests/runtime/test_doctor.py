"""The doctor on real workers in this process: what it measures, what it predicts from that, what it leaves behind."""

import contextlib

import pytest
import torch
from live_sessions import Silence
from tiny_models import prompt_of, save_whole

from shardwright.config import MasterConfig, WorkerConfig
from shardwright.core.calibration import calibrated_workers
from shardwright.core.diagnosis import LEAST_GAIN
from shardwright.core.placement_costs import StageWeights
from shardwright.core.prediction import Workload, stage_seconds
from shardwright.engine import FinishEvent, TokenEvent
from shardwright.errors import ClusterError, PlacementError, WorkerUnreachableError
from shardwright.runtime.doctor import Wish, cluster_of, examine, measure_workers, present_cut
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.session import open_model, open_session, placement_settings
from shardwright.runtime.short_load import TokenIds, run_load
from shardwright.runtime.stage_prober import probe_stages
from shardwright.runtime.worker_process import open_worker
from shardwright.transport.memory import MemoryTransport
from shardwright.types import GREEDY, StopConditions

WORKLOAD = Workload(num_sequences=4, prompt_tokens=40, new_tokens=12, context=20)


class Notes(Silence):
    """A listener that writes down what the doctor does."""

    def __init__(self):
        self.told = []

    def doing(self, what):
        self.told.append(what)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_whole("llama", tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def two_workers(whole, tmp_path):
    """Config, model, transport and entries of two workers with a thread each."""
    config = MasterConfig(model=str(whole.folder), cache_dir=tmp_path, kv_tokens=2048, token_budget=32, block_size=4)
    transport = MemoryTransport()
    async with contextlib.AsyncExitStack() as stack:
        entries = []
        for name in ("one", "two"):
            settings = WorkerConfig(host=name, device="cpu", threads=1, cache_dir=tmp_path / name)
            await stack.enter_async_context(open_worker(settings, transport, f"{name}:1"))
            entries.append(WorkerEntry(username=name, ip=name, port=1))
        yield config, await open_model(config, Silence()), transport, entries


async def test_an_examination_measures_predicts_runs_and_compares(whole, tmp_path):
    notes = Notes()
    async with two_workers(whole, tmp_path) as (config, model, transport, entries):
        wish = Wish(workload=WORKLOAD, is_quick=True)
        found = await examine(config, entries, wish, transport=transport, model=model, listener=notes)
    assert [each.worker.worker_id for each in found.workers] == ["one", "two"]
    assert all(each.measures.read_bandwidth > 1e8 and each.measures.matrix_rate > 1e8 for each in found.workers)
    assert all(each.bfloat16 is not None for each in found.workers), "the model is in float32"
    assert {(link.sender, link.receiver) for link in found.links} == {
        ("", "one"), ("", "two"), ("one", "two"), ("two", "one"),
    }  # fmt: skip
    sizes = [size for size, _ in found.links[0].measures.transfers]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 32 * model.costs.activation_bytes_per_token
    assert [probe.stage for probe in found.probes] == list(found.cut)
    for probe in found.probes:
        assert [step.load.num_sequences for step in probe.decodes] == [1, 2, 4]
        assert all(step.seconds > 0 for step in probe.decodes)
        assert all((step.sampled_s is not None) == (probe is found.probes[-1]) for step in probe.decodes)
        assert probe.prompt is not None
        assert probe.prompt.load.num_tokens == 32
    assert found.figures.one.tokens_per_s > 1
    assert found.achieved is not None
    assert found.achieved.one_tokens_per_s > 1
    assert found.achieved.many_tokens_per_s > 1
    assert 0 < found.achieved.time_to_first_token_s < 5
    assert any("bound by" in sentence for sentence in found.sentences)
    assert len(found.best_changes) <= 3
    assert all(change.gain >= LEAST_GAIN for change in found.changes)
    assert [note for note in notes.told if note.startswith("measuring the link")]
    assert notes.told.index("loading the stages") < next(
        index for index, note in enumerate(notes.told) if note.startswith("running the load")
    )


async def test_without_a_run_nothing_is_loaded_and_a_slow_link_is_the_culprit(whole, tmp_path):
    async with two_workers(whole, tmp_path) as (config, model, transport, entries):
        transport.delay_s = 0.01
        notes = Notes()
        wish = Wish(workload=WORKLOAD, loads_model=False)
        found = await examine(config, entries, wish, transport=transport, model=model, listener=notes)
        for entry in entries:
            client = transport.connect(entry.address)
            assert (await client.heartbeat(timeout_s=5.0)).epoch == 0
            await client.close()
    assert found.probes == ()
    assert found.achieved is None
    assert all(link.measures.round_trip_s >= 0.02 for link in found.links)
    assert found.sentences[0].startswith("Decode of one sequence is bound by links")
    assert any(sentence.startswith("The link") and "ms step" in sentence for sentence in found.sentences)
    assert not any("loading" in note for note in notes.told)


async def test_a_stage_whose_weights_come_anew_for_each_step_is_examined_as_it_is(whole, tmp_path):
    """A byte too little memory: layers are offloaded, and room for two of them is needed besides."""
    config = MasterConfig(model=str(whole.folder), cache_dir=tmp_path, kv_tokens=2048, token_budget=32, block_size=4)
    transport, model = MemoryTransport(), await open_model(config, Silence())
    weights = StageWeights(model.costs, placement_settings(config, model.costs))
    memory_bytes = weights.needed(0, model.costs.num_layers) - 1
    worker = WorkerConfig(
        host="one", device="cpu", threads=1, cache_dir=tmp_path / "one", offload="nvme", memory_bytes=memory_bytes
    )
    async with open_worker(worker, transport, "one:1"):
        entries = [WorkerEntry(username="one", ip="one", port=1)]
        wish = Wish(workload=WORKLOAD, is_quick=True)
        found = await examine(config, entries, wish, transport=transport, model=model, listener=Notes())
    (stage,) = found.cut
    assert stage.offloaded_bytes >= 3 * max(model.costs.layer_bytes)
    assert [probe.stage for probe in found.probes] == [stage]
    assert found.cluster.workers["one"].offload_bandwidth > 1e6
    assert found.achieved is not None
    (predicted,) = found.figures.one.stages
    assert predicted.compute_s >= stage.offloaded_bytes / found.cluster.workers["one"].offload_bandwidth


async def test_after_the_probe_a_stage_is_predicted_as_it_was_timed_and_the_model_answers_as_ever(whole, tmp_path):
    """Steps by hand write into the pool's blocks; no request may ever see that."""
    prompt = tuple(prompt_of(30, seed=3))
    async with (
        two_workers(whole, tmp_path) as (config, model, transport, entries),
        open_session(
            config, entries, listener=Silence(), transport=transport, model=model, write_metrics=False
        ) as session,
    ):
        workers = await measure_workers(session.workers, model.dtype, Notes())
        cluster = cluster_of(model, config, workers, ())
        probes = await probe_stages(session, cluster, WORKLOAD, Notes())
        cut = present_cut(session)
        _, events = await session.submit(prompt, GREEDY, StopConditions(max_new_tokens=10))
        answer = []
        async for event in events:
            if isinstance(event, TokenEvent):
                answer.append(event.token_id)
            else:
                assert isinstance(event, FinishEvent)
        await run_load(session, WORKLOAD, Notes(), rounds=1)
    ids = torch.tensor([prompt])
    expected = whole.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answer == expected[0, len(prompt) :].tolist()
    weights = StageWeights(model.costs, cluster.placement)
    speeds = calibrated_workers(weights, cluster.workers, probes)
    for stage, probe in zip(cut, probes, strict=True):
        for step in probe.decodes:
            told = step.seconds if step.sampled_s is None else step.sampled_s
            worker = speeds[stage.worker_id]
            predicted = stage_seconds(weights, worker, stage, load=step.load)
            # on a busy machine more sequences may take less time than fewer; no part of a prediction is below zero then
            is_clipped = predicted.overhead_s == 0 or (step.sampled_s is not None and predicted.head_s == 0)
            assert predicted.compute_s == pytest.approx(told) or (is_clipped and predicted.compute_s > told)


async def test_workers_that_serve_another_master_are_left_in_peace(whole, tmp_path):
    async with two_workers(whole, tmp_path) as (config, model, transport, entries):
        opening = open_session(
            config, entries, listener=Silence(), transport=transport, model=model, write_metrics=False
        )
        async with opening:
            with pytest.raises(ClusterError, match="serving another master"):
                await examine(
                    config, entries, Wish(workload=WORKLOAD), transport=transport, model=model, listener=Notes()
                )


async def test_what_can_not_be_examined_is_told(whole, tmp_path):
    async with two_workers(whole, tmp_path) as (config, model, transport, entries):
        nobody = [WorkerEntry(username="gone", ip="gone", port=1)]
        wish = Wish(workload=WORKLOAD, loads_model=False)
        with pytest.raises(WorkerUnreachableError, match="gone"):
            await examine(config, nobody, wish, transport=transport, model=model, listener=Notes())
        many = Wish(workload=Workload(num_sequences=2000), loads_model=False)
        with pytest.raises(PlacementError, match="too few for 2000 sequences"):
            await examine(config, entries, many, transport=transport, model=model, listener=Notes())


def test_token_ids_lie_in_the_vocabulary_repeat_from_run_to_run_and_differ_from_prompt_to_prompt():
    ids = TokenIds(151, first=0)
    first, second = ids.take(500), ids.take(500)
    assert first == TokenIds(151, first=0).take(500)
    assert first != second
    assert 0 <= min(first) <= max(first) < 151
    assert len(set(first)) > 140
