"""What bounds a pipeline, in sentences, and the changes that are proposed: those that pay, and no others."""

from dataclasses import replace

import pytest

from shardwright.core.diagnosis import (
    LEAST_GAIN,
    Alternatives,
    ChangeKind,
    all_changes,
    best_changes,
    bound_sentences,
    cut_of,
    prediction_sentences,
)
from shardwright.core.placement import PlacementSettings, place
from shardwright.core.prediction import Cluster, LinkSpeed, Part, PartKind, WorkerSpeed, Workload, predict
from shardwright.types import ModelCosts, WorkerCapacity

MIB = 2**20
COSTS = ModelCosts(
    name="toy",
    hidden_size=512,
    layer_bytes=(8 * MIB,) * 20,
    layer_kv_bytes_per_token=(512,) * 20,
    embedding_bytes=16 * MIB,
    head_bytes=16 * MIB,
    tied_embedding=True,
    activation_bytes_per_token=1024,
    max_context=4096,
    element_bytes=2,
)
LAN = LinkSpeed(latency_s=0.0002, transfers=((0.0, 0.0), (1e6, 0.01)))
WORKLOAD = Workload(num_sequences=4, prompt_tokens=256, new_tokens=64)


def measured(*workers, links=None, costs=COSTS, **more):
    """A cluster and its capacities from (name, bytes/s, operations/s)."""
    speeds = {
        name: WorkerSpeed(worker_id=name, host_id=name, device="cpu", read_bandwidth=bandwidth, matrix_rate=rate)
        for name, bandwidth, rate in workers
    }
    capacities = [
        WorkerCapacity(
            worker_id=name, host_id=name, device="cpu", memory_bytes=2**31, read_bandwidth=bandwidth, matrix_rate=rate
        )
        for name, bandwidth, rate in workers
    ]
    ends = ["", *speeds]
    known = {(a, b): LAN for a in ends for b in ends if a != b}
    toy = Cluster(costs=costs, workers=speeds, links={**known, **(links or {})}, placement=PlacementSettings(), **more)
    return toy, capacities, cut_of(place(costs, capacities, toy.placement))


def changes_of(case, **more):
    return all_changes(*case, WORKLOAD, Alternatives(most_requests=4, **more))


def kinds(changes):
    return [change.kind for change in changes]


EVEN = (("a", 1e10, 1e12), ("b", 1e10, 1e12))


def test_the_largest_part_is_named_with_who_has_it_and_its_share():
    parts = [
        Part(kind=PartKind.MEMORY, worker_id="a", seconds=0.001),
        Part(kind=PartKind.LINK, worker_id="b", sender="a", seconds=0.002),
        Part(kind=PartKind.MEMORY, worker_id="b", seconds=0.009),
    ]
    assert bound_sentences("Decode", parts) == ["Decode is bound by reading weights on worker b (83% of a step)."]
    parts[1] = Part(kind=PartKind.LINK, worker_id="b", sender="a", seconds=0.022)
    assert bound_sentences("Decode", parts) == [
        "Decode is bound by links (69% of a step).",
        "The link from worker a to worker b takes 22.0 ms of a 32.0 ms step.",
    ]
    assert bound_sentences("Decode", []) == []


def test_a_cause_that_several_share_is_told_of_each():
    parts = [Part(kind=PartKind.OVERHEAD, worker_id=name, seconds=s) for name, s in (("a", 0.003), ("b", 0.005))]
    (sentence,) = bound_sentences("Prefill", parts)
    assert sentence.startswith("Prefill is bound by work of each layer")
    assert sentence.endswith("(100% of a step: worker b 62%, worker a 38%).")


def test_a_stage_that_all_steps_wait_for_is_named():
    grows = ((1, 0.001), (8, 0.008))
    toy, _, cut = measured(("a", 1e13, 1e16), ("b", 1e13, 1e16))
    workers = {name: replace(speed, layer_overheads=grows) for name, speed in toy.workers.items()}
    workers["b"] = replace(workers["b"], layer_overheads=((1, 0.003), (8, 0.024)))
    figures = predict(replace(toy, workers=workers), cut, Workload(num_sequences=8))
    assert figures.many.steps_in_flight > 1
    (sentence,) = prediction_sentences("Decode of 8 sequences", figures.many)
    assert sentence.startswith("Decode of 8 sequences is bound by worker b, which computes all the time while")


def test_a_worker_behind_a_slow_link_is_left_out_with_the_gain_of_the_same_model():
    far = LinkSpeed(latency_s=0.02, transfers=((0.0, 0.0), (1e6, 0.5)))
    links = dict.fromkeys((("", "b"), ("b", ""), ("a", "b"), ("b", "a")), far)
    toy, _, cut = case = measured(*EVEN, links=links)
    found = changes_of(case)
    change = found[0]
    assert (change.kind, change.workers) == (ChangeKind.LEAVE_OUT, ("b",))
    assert change.sentence == "leave out worker b: a 0-19"
    now, then = predict(toy, cut, WORKLOAD), predict(toy, change.cut, WORKLOAD)
    assert change.gain == pytest.approx(then.new_tokens_per_s / now.new_tokens_per_s - 1)
    assert change.gain > 1
    assert all(each.gain >= LEAST_GAIN for each in found)
    assert ChangeKind.LINK in kinds(found)


def test_a_pipeline_that_nothing_helps_is_told_nothing():
    alone = measured(("a", 1e10, 1e12))
    assert all_changes(*alone, WORKLOAD, Alternatives(most_requests=4)) == ()


def test_another_order_is_found_where_one_way_is_much_longer_than_the_other():
    """Three workers that are all needed for their memory; the planner, which knows no links, keeps their order."""
    names = [(name, 1e10, 1e12) for name in "abc"]
    long = LinkSpeed(latency_s=0.05, transfers=((0.0, 0.0), (1e6, 0.01)))
    toy, capacities, _ = measured(*names, links={("a", "b"): long, ("b", "a"): long})
    capacities = [replace(each, memory_bytes=200 * MIB) for each in capacities]
    cut = cut_of(place(COSTS, capacities, toy.placement))
    assert [stage.worker_id for stage in cut] == ["a", "b", "c"]
    change = all_changes(toy, capacities, cut, WORKLOAD, Alternatives(most_requests=4))[0]
    assert change.kind is ChangeKind.ORDER
    order = [stage.worker_id for stage in change.cut]
    assert order in (["a", "c", "b"], ["b", "c", "a"])


def test_only_what_was_measured_is_proposed():
    case = measured(*EVEN)
    assert ChangeKind.DTYPE not in kinds(changes_of(case))
    assert ChangeKind.THREADS not in kinds(changes_of(case))
    toy = case[0]
    half = replace(COSTS, layer_bytes=(4 * MIB,) * 20, head_bytes=8 * MIB, activation_bytes_per_token=512)
    dtype = [each for each in changes_of(case, bfloat16=(half, {})) if each.kind is ChangeKind.DTYPE]
    assert dtype[0].gain > 0.5
    faster = {"a": (4, replace(toy.workers["a"], read_bandwidth=4e10, matrix_rate=4e12))}
    (threads,) = [each for each in changes_of(case, more_threads=faster) if each.kind is ChangeKind.THREADS]
    assert "give worker a 4 threads" in threads.sentence


def test_steps_that_are_fixed_too_low_and_more_requests_are_proposed_where_they_pay():
    toy, capacities, cut = measured(*EVEN, steps_in_flight=1)
    grows = ((1, 0.001), (4, 0.004))
    workers = {name: replace(speed, layer_overheads=grows) for name, speed in toy.workers.items()}
    toy = replace(toy, workers=workers)
    found = all_changes(toy, capacities, cut, WORKLOAD)
    (steps,) = [each for each in found if each.kind is ChangeKind.STEPS]
    assert "instead of 1: --steps-in-flight 0" in steps.sentence
    flat = measured(*EVEN)
    (requests,) = [each for each in all_changes(*flat, WORKLOAD) if each.kind is ChangeKind.REQUESTS]
    assert requests.sentence == "answer 8 requests at once instead of 4"
    no_room = all_changes(*flat, WORKLOAD, Alternatives(kv_tokens=2000))
    assert ChangeKind.REQUESTS not in kinds(no_room)


def test_one_more_worker_gets_its_part_from_the_planner_and_its_links_from_its_like():
    found = changes_of(measured(("a", 1e10, 1e11), ("b", 4e9, 1e11)))
    for change in found:
        if change.kind is ChangeKind.ADD:
            assert change.workers == ("a",)
            assert len(change.cut) == 3
            assert change.cut[-1].end == 20


def test_no_more_than_three_are_chosen_and_none_twice():
    far = LinkSpeed(latency_s=0.02, transfers=((0.0, 0.0), (1e6, 0.5)))
    links = dict.fromkeys((("", "b"), ("b", ""), ("a", "b"), ("b", "a")), far)
    toy, capacities, cut = measured(*EVEN, links=links)
    found = all_changes(toy, capacities, cut, WORKLOAD, Alternatives(bfloat16=(COSTS, {})))
    chosen = best_changes([*found, *found])
    assert len(chosen) == min(3, len(found))
    assert [change.gain for change in chosen] == sorted((change.gain for change in chosen), reverse=True)


def test_where_weights_come_anew_for_each_step_memory_is_proposed_with_what_it_would_give():
    toy, capacities, _ = measured(("a", 1e9, 1e12))
    short = [replace(capacities[0], memory_bytes=400 * MIB, offload="nvme", offload_bytes=2**31, offload_bandwidth=1e8)]
    worker = replace(toy.workers["a"], offload="nvme", offload_bandwidth=1e8)
    toy = replace(toy, workers={"a": worker}, placement=PlacementSettings(workspace_bytes=280 * MIB))
    cut = cut_of(place(COSTS, short, toy.placement))
    assert cut[0].offloaded_bytes > 0
    now = predict(toy, cut, WORKLOAD)
    assert "waiting for weights that are not kept in memory on worker a" in prediction_sentences("Decode", now.one)[0]
    (change,) = [each for each in all_changes(toy, short, cut, WORKLOAD) if each.kind is ChangeKind.MEMORY]
    assert change.workers == ("a",)
    assert change.sentence.startswith("give worker a 0.5 GiB of memory for its stage, ")
    assert change.cut == (replace(cut[0], offloaded_bytes=0),)
    assert change.gain > 1.0


def test_memory_is_not_proposed_where_all_weights_are_kept():
    assert ChangeKind.MEMORY not in kinds(changes_of(measured(("a", 1e9, 1e12))))
