"""A worker's speed after its stage was probed: the prediction for the probed steps is what they took."""

from dataclasses import replace

import pytest

from shardwright.core.calibration import StageProbe, TimedStep, calibrated, calibrated_workers
from shardwright.core.placement_costs import PlacementSettings, StageWeights
from shardwright.core.prediction import StageOn, StepLoad, WorkerSpeed, decode_load, stage_seconds
from shardwright.types import ModelCosts

COSTS = ModelCosts(
    name="toy", hidden_size=50, layer_bytes=(1000,) * 6, layer_kv_bytes_per_token=(1,) * 6, embedding_bytes=500,
    head_bytes=600, tied_embedding=False, activation_bytes_per_token=100, max_context=4096, element_bytes=2,
)  # fmt: skip
WEIGHTS = StageWeights(COSTS, PlacementSettings(block_size=2, min_kv_tokens=4, max_kv_tokens=64, workspace_bytes=0))
CHUNK = StepLoad(num_sequences=1, num_tokens=100, num_sampled=0, effective=110.0)


def speed(name="a", *, bandwidth=1000.0, rate=1e6, device="cpu"):
    return WorkerSpeed(worker_id=name, host_id="host", device=device, read_bandwidth=bandwidth, matrix_rate=rate)


def probe(*seconds, name="a", start=2, end=6, sampled=None, prompt_s=None, slowdown=0.0, offloaded_bytes=0):
    """Of a stage that took so many seconds for 1, 2, 4 ... sequences."""
    decodes = tuple(
        TimedStep(
            load=decode_load(2**index, context=10),
            seconds=each,
            sampled_s=None if sampled is None else sampled[index],
        )
        for index, each in enumerate(seconds)
    )
    return StageProbe(
        stage=StageOn(worker_id=name, start=start, end=end, offloaded_bytes=offloaded_bytes),
        decodes=decodes,
        prompt=None if prompt_s is None else TimedStep(load=CHUNK, seconds=prompt_s),
        hand_over_s=0.25,
        slowdown=slowdown,
    )


def predicted(worker, step, found, *, sampled):
    load = step.load if sampled else StepLoad(**{**as_fields(step.load), "num_sampled": 0})
    return stage_seconds(WEIGHTS, worker, found.stage, load=load).compute_s


def as_fields(load):
    return {
        name: getattr(load, name) for name in ("num_sequences", "num_tokens", "num_sampled", "effective", "context")
    }


@pytest.mark.parametrize("seconds", [(5.0, 5.5, 7.0), (5.0, 4.5, 9.0), (2.0, 4.1, 8.0)])
def test_every_probed_step_is_predicted_as_it_was_timed(seconds):
    found = probe(*seconds, sampled=[each + 0.9 for each in seconds], prompt_s=30.0)
    worker = calibrated(WEIGHTS, speed(), found)
    for step in found.decodes:
        assert predicted(worker, step, found, sampled=False) == pytest.approx(step.seconds)
        assert predicted(worker, step, found, sampled=True) == pytest.approx(step.sampled_s)
    assert found.prompt is not None
    assert predicted(worker, found.prompt, found, sampled=False) == pytest.approx(30.0)
    assert worker.hand_over_s == 0.25
    assert worker.matrix_rate == 1e6, "of large products; only prompts get the rate that they reach"


def test_a_stage_that_caches_hold_reads_faster_than_its_memory():
    worker = calibrated(WEIGHTS, speed(bandwidth=1000.0), probe(2.0))
    assert worker.read_bandwidth == pytest.approx((4000 + 10 * 4) / 2.0)
    assert worker.layer_overheads == ((1.0, 0.0),)


def test_what_was_not_probed_is_taken_from_who_was():
    speeds = {name: speed(name) for name in "abc"}
    speeds["c"] = speed("c", rate=2e6)
    probes = [
        probe(4.5, 5.0, name="a", start=0, end=4, prompt_s=20.0, slowdown=0.4),
        probe(2.5, 3.0, name="b", start=4, end=6, sampled=(3.5, 4.5), prompt_s=12.0),
    ]
    workers = calibrated_workers(WEIGHTS, speeds, probes)
    a, b, c = (workers[name] for name in "abc")
    assert a.head_overheads == b.head_overheads != ()
    worst = max((a, b), key=lambda each: each.layer_overheads[0][1])
    assert c.layer_overheads == worst.layer_overheads
    assert c.prompt_rate == pytest.approx(2 * worst.prompt_rate)
    assert c.slowdown == 0.4
    assert calibrated_workers(WEIGHTS, speeds, []) == speeds


def test_a_stage_that_waits_for_offloaded_weights_tells_what_a_layer_takes_beside_that():
    """3,000 bytes at 500 a second: six seconds, which a step takes at the least."""
    offloading = replace(speed(bandwidth=1000.0), offload="nvme", offload_bandwidth=500.0)
    found = probe(6.4, 7.2, prompt_s=6.2, offloaded_bytes=3000)
    worker = calibrated(WEIGHTS, offloading, found)
    assert worker.read_bandwidth == 1000.0
    assert [seconds for _, seconds in worker.layer_overheads] == pytest.approx([0.4 / 4, 1.2 / 4])
    assert worker.prompt_rate is None, "such a prompt tells nothing of arithmetic"
    slow = calibrated(WEIGHTS, offloading, replace(found, prompt=replace(found.prompt, seconds=30.0)))
    assert slow.prompt_rate is not None
