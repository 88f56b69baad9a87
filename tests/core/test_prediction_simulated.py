"""Predictions against a real master and its scheduler over workers of known speed, in simulated time.

The machine has no part in it: what is compared is how stages, links, chunks and steps in flight make a rate.
"""

from statistics import median

import pytest
from timed_line import TrueStage
from timed_master import TimedMaster

from shardwright.core.prediction import Cluster, LinkSpeed, StageOn, WorkerSpeed, Workload, predict
from shardwright.types import ModelCosts

ACTIVATION = 1000
LAYERS = 2  # of each stage
MS = 1e-3

FLAT = TrueStage(base_s=0.010, sequence_s=0.0002, token_s=0.0003)
STEEP = TrueStage(base_s=0.002, sequence_s=0.002, token_s=0.0005)


def line(*stages, delay_s=0.0, bytes_per_s=None):
    """These stages with the same link before each but the first."""
    token_s = 0.0 if bytes_per_s is None else ACTIVATION / bytes_per_s
    found = []
    for index, stage in enumerate(stages):
        fields = {name: getattr(stage, name) for name in ("base_s", "sequence_s", "token_s")}
        link = {"delay_s": delay_s, "link_token_s": token_s} if index else {}
        found.append(TrueStage(**fields, **link))
    return found


def cluster_of(stages):
    """The same as the doctor would have measured it."""
    count = LAYERS * len(stages)
    costs = ModelCosts(
        name="simulated",
        hidden_size=ACTIVATION // 2,
        layer_bytes=(1000,) * count,
        layer_kv_bytes_per_token=(1,) * count,
        embedding_bytes=1,
        head_bytes=0,
        tied_embedding=False,
        activation_bytes_per_token=ACTIVATION,
        max_context=8192,
        element_bytes=2,
    )
    workers = {
        f"w{index}": WorkerSpeed(
            worker_id=f"w{index}",
            host_id=f"w{index}",
            device="cpu",
            read_bandwidth=1e15,
            matrix_rate=1e18,
            prompt_rate=1000 * LAYERS / stage.token_s,
            layer_overheads=tuple((size, stage.step_s(size, 0) / LAYERS) for size in (1, 8)),
        )
        for index, stage in enumerate(stages)
    }
    names = ["", *workers]
    links = {(a, ""): LinkSpeed(latency_s=0.0) for a in names if a}
    for index, stage in enumerate(stages):
        transfers = ((0.0, 0.0), (1e6, stage.link_token_s * 1e6 / ACTIVATION)) if stage.link_token_s else ()
        links[names[index], names[index + 1]] = LinkSpeed(latency_s=stage.delay_s, transfers=transfers)
    cut = tuple(
        StageOn(worker_id=name, start=LAYERS * index, end=LAYERS * (index + 1)) for index, name in enumerate(workers)
    )
    return Cluster(costs=costs, workers=workers, links=links, token_budget=512), cut


def decode_rate(stages, num_sequences):
    """Tokens a second of the last part of a run, once the scheduler knows the pace."""
    master = TimedMaster(line=stages, noise=0.0)
    for number in range(1, num_sequences + 1):
        master.ask(number, 16, new=5000)
    master.run(10.0)
    before, began = master.num_tokens, master.now
    master.run(10.0)
    return (master.num_tokens - before) / (master.now - began)


def first_token_s(stages, num_tokens):
    """Of prompts that come one after the other, the middle one."""
    master = TimedMaster(line=stages, noise=0.0)
    waits = []
    for number in range(1, 4):
        asked = master.now
        master.ask(number, num_tokens, new=1)
        master.run_until(lambda number=number: number in master.times)
        waits.append(master.times[number][0] - asked)
        master.run(5.0)
    return median(waits)


SETTINGS = {
    "even": line(FLAT, FLAT),
    "5 ms": line(FLAT, FLAT, delay_s=5 * MS),
    "20 ms": line(FLAT, FLAT, delay_s=20 * MS),
    "100 Mbit/s": line(FLAT, FLAT, bytes_per_s=12.5e6),
    "10 ms, 10 Mbit/s": line(FLAT, FLAT, delay_s=10 * MS, bytes_per_s=1.25e6),
    "steep, 20 ms": line(STEEP, STEEP, delay_s=20 * MS),
    "unequal": line(FLAT, STEEP),
    "unequal, 10 ms": line(STEEP, FLAT, delay_s=10 * MS),
    "three, 5 ms, 50 Mbit/s": line(STEEP, FLAT, STEEP, delay_s=5 * MS, bytes_per_s=6.25e6),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rates_are_what_the_scheduler_reaches(name):
    stages = SETTINGS[name]
    cluster, cut = cluster_of(stages)
    figures = predict(cluster, cut, Workload(num_sequences=8, prompt_tokens=700, new_tokens=100, context=0))
    assert figures.one.tokens_per_s == pytest.approx(decode_rate(stages, 1), rel=0.05)
    assert figures.many.tokens_per_s == pytest.approx(decode_rate(stages, 8), rel=0.1)
    assert figures.prompt.time_to_first_token_s == pytest.approx(first_token_s(stages, 700), rel=0.05)
