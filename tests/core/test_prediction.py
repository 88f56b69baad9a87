"""Predictions against sums done by hand, and against what the formula promises."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core import best_cut as best_cut_module
from shardwright.core.best_cut import best_cut
from shardwright.core.placement import PlacementSettings, place
from shardwright.core.prediction import (
    Cluster,
    LinkSpeed,
    PartKind,
    StageOn,
    WorkerSpeed,
    Workload,
    between,
    predict,
    predict_decode,
    predict_prompt,
    stage_on,
)
from shardwright.types import LayerRange, LinkMeasures, ModelCosts, StageAssignment, WorkerCapacity

SMALL = PlacementSettings(block_size=2, min_kv_tokens=4, max_kv_tokens=64, workspace_bytes=0)


def model(layers=(1000,) * 6, *, head=600, kv=0, context_costs=()):
    """A model with two bytes a weight whose activation is 100 bytes a token."""
    return ModelCosts(
        name="toy",
        hidden_size=50,
        layer_bytes=tuple(layers),
        layer_kv_bytes_per_token=(kv,) * len(layers),
        embedding_bytes=500,
        head_bytes=head,
        tied_embedding=False,
        activation_bytes_per_token=100,
        max_context=4096,
        element_bytes=2,
        context_costs=context_costs,
    )


def speed(name, *, bandwidth=1000.0, rate=1e9, layer=(), head=(), hand_over=0.0, slowdown=0.0, host=None):
    return WorkerSpeed(
        worker_id=name,
        host_id=host or name,
        device="cpu",
        read_bandwidth=bandwidth,
        matrix_rate=rate,
        layer_overheads=layer,
        head_overheads=head,
        hand_over_s=hand_over,
        slowdown=slowdown,
    )


def cluster(costs, *speeds, links=None, **more):
    """Links that take nothing, where none are given."""
    ends = ["", *(each.worker_id for each in speeds)]
    free = {(a, b): LinkSpeed(latency_s=0.0) for a in ends for b in ends if a != b}
    return Cluster(
        costs=costs,
        workers={each.worker_id: each for each in speeds},
        links={**free, **(links or {})},
        placement=SMALL,
        **more,
    )


def on(*stages):
    return tuple(StageOn(worker_id=name, start=start, end=end) for name, start, end in stages)


AB = on(("a", 0, 3), ("b", 3, 6))


def test_a_step_of_one_sequence_reads_every_weight_once_and_adds_what_is_measured_beside_it():
    workers = (speed("a", layer=((1, 0.1),)), speed("b", bandwidth=500.0, head=((1, 0.5),), hand_over=0.05))
    links = {("a", "b"): LinkSpeed(latency_s=0.2), ("", "a"): LinkSpeed(latency_s=0.01)}
    step = predict_decode(cluster(model(), *workers, links=links), AB, num_sequences=1, context=0)
    first, second = step.stages
    assert (first.memory_s, first.overhead_s, first.head_s) == pytest.approx((3.0, 0.3, 0.0))
    assert (second.memory_s, second.head_s) == pytest.approx((6.0, 600 / 500 + 0.5))
    assert first.matrix_s == second.matrix_s == 0.0
    assert step.trip_s == pytest.approx(0.01 + 3.3 + 0.2 + 6.0 + 1.7 + 0.05)
    assert step.cycle_s == pytest.approx(step.trip_s)
    assert step.tokens_per_s == pytest.approx(1 / step.trip_s)
    assert [part.kind for part in step.parts] == [
        PartKind.LINK, PartKind.MEMORY, PartKind.OVERHEAD, PartKind.LINK, PartKind.MEMORY, PartKind.HEAD,
        PartKind.HAND_OVER,
    ]  # fmt: skip


def test_kv_is_read_by_each_sequence_and_arithmetic_counts_once_it_takes_longer_than_reading():
    costs = model(kv=2)
    one = predict_decode(cluster(costs, speed("a")), on(("a", 0, 6)), num_sequences=4, context=50, steps_in_flight=1)
    assert one.stages[0].memory_s == pytest.approx((6000 + 4 * 50 * 6 * 2) / 1000)
    slow = cluster(costs, speed("a", rate=2000.0))
    many = predict_decode(slow, on(("a", 0, 6)), num_sequences=4, context=0, steps_in_flight=1)
    assert many.stages[0].memory_s == 0.0
    assert many.stages[0].matrix_s == pytest.approx(2 * 3000 * 4 / 2000)
    assert many.stages[0].head_s == pytest.approx(2 * 300 * 4 / 2000)


def test_with_several_steps_in_flight_the_busiest_stage_or_the_trip_is_what_a_cycle_takes():
    """The formula of DESIGN's section 3: B / max(S (t(B/m) + l), m t(B/m))."""
    overheads = ((1, 1.0), (8, 8.0))  # t grows in proportion: splitting pays
    workers = [speed(name, bandwidth=1e12, rate=1e15, layer=overheads) for name in "ab"]
    links = {("a", "b"): LinkSpeed(latency_s=2.0)}
    toy = cluster(model(head=0), *workers, links=links)
    for num_steps, size in ((1, 8), (2, 4), (4, 2), (8, 1)):
        step = predict_decode(toy, AB, num_sequences=8, context=0, steps_in_flight=num_steps)
        expected = max(2 * 3 * size + 2.0, num_steps * 3 * size)
        assert step.tokens_per_s == pytest.approx(8 / expected, rel=1e-3)
    chosen = predict_decode(toy, AB, num_sequences=8, context=0)
    assert chosen.steps_in_flight == 3  # with 2 the trip is longer than two steps; 4 bring no more
    assert chosen.busiest is not None


def test_workers_of_one_device_slow_each_other_only_while_both_compute():
    workers = [speed(name, host="one", slowdown=1.0) for name in "ab"]
    alone, both = (
        predict_decode(cluster(model(), *workers), AB, num_sequences=2, context=0, steps_in_flight=steps)
        for steps in (1, 2)
    )
    assert both.stages[0].memory_s == pytest.approx(2 * alone.stages[0].memory_s)


def test_a_prompt_goes_through_in_chunks_of_the_budget_and_samples_once():
    toy = cluster(model(), speed("a", bandwidth=1e9, rate=1e4), token_budget=100)
    prompt = predict_prompt(toy, on(("a", 0, 6)), num_tokens=250)
    assert [chunk.num_tokens for chunk in prompt.chunks] == [100, 100, 50]
    assert [chunk.stages[0].head_s > 0 for chunk in prompt.chunks] == [False, False, True]
    assert prompt.time_to_first_token_s == pytest.approx(2 * 3000 * 250 / 1e4 + 2 * 300 / 1e4)
    longer = cluster(model(context_costs=((4096, 0.01),)), speed("a", bandwidth=1e9, rate=1e4), token_budget=100)
    sizes = [chunk.num_tokens for chunk in predict_prompt(longer, on(("a", 0, 6)), num_tokens=250).chunks]
    assert sum(sizes) == 250
    assert sizes[0] == 100 > sizes[1], "behind a prefix a token costs more, so the scheduler takes fewer"


def test_a_prompts_activation_takes_the_link_as_long_as_such_a_message_was_measured_to():
    link = LinkSpeed.measured(LinkMeasures(round_trip_s=0.02, transfers=((1000, 0.12), (101_000, 1.12))))
    assert link.latency_s == 0.01
    assert link.seconds(1000) == pytest.approx(0.11)
    assert link.seconds(51_000) == pytest.approx(0.61)
    assert link.seconds(201_000) == pytest.approx(2.11), "beyond what was measured on the last line"
    assert link.seconds(0) == 0.01
    toy = cluster(model(), speed("a"), speed("b"), links={("a", "b"): link})
    chunk = predict_prompt(toy, AB, num_tokens=500).chunks[0]
    assert chunk.links[1].num_bytes >= 500 * 100
    assert chunk.links[1].seconds == pytest.approx(link.seconds(chunk.links[1].num_bytes))


def test_noise_that_makes_larger_messages_quicker_is_smoothed_out_and_the_bandwidth_is_fitted():
    link = LinkSpeed.measured(LinkMeasures(round_trip_s=0.01, transfers=((100, 0.03), (200, 0.02), (300, 0.04))))
    assert [seconds for _, seconds in link.transfers] == pytest.approx([0.0, 0.02, 0.02, 0.03])
    exact = LinkSpeed.measured(LinkMeasures(round_trip_s=0.01, transfers=((1000, 1.01), (5000, 5.01))))
    assert exact.bytes_per_s == pytest.approx(1000.0)
    instant = LinkSpeed.measured(LinkMeasures(round_trip_s=0.01, transfers=((1000, 0.01),)))
    assert instant.bytes_per_s is None
    assert instant.seconds(10**6) == 0.005


def test_values_between_measured_points_lie_on_the_line():
    points = ((1, 1.0), (3, 2.0))
    assert [between(points, x) for x in (0, 1, 2, 3, 5)] == [1.0, 1.0, 1.5, 2.0, 3.0]
    assert between((), 5) == 0.0
    assert between(((4, 7.0),), 9) == 7.0


def test_the_planners_own_step_time_is_the_predicted_one_where_nothing_else_was_measured():
    costs = model(layers=(1000, 900, 1300, 800), head=700)
    capacities = [capacity("a", bandwidth=900.0), capacity("b", bandwidth=400.0)]
    plan = place(costs, capacities, SMALL)
    speeds = [speed(each.worker_id, bandwidth=each.read_bandwidth, rate=each.matrix_rate) for each in capacities]
    cut = on(*((stage.worker_id, stage.layers.start, stage.layers.end) for stage in plan.stages))
    step = predict_decode(cluster(costs, *speeds), cut, num_sequences=1, context=0)
    assert [stage.compute_s for stage in step.stages] == pytest.approx([stage.step_s for stage in plan.stages])
    assert step.trip_s == pytest.approx(plan.latency_s)


# --- the search --------------------------------------------------------------------------------------


def capacity(name, *, memory=10**6, bandwidth=1000.0, host=None):
    return WorkerCapacity(
        worker_id=name,
        host_id=host or name,
        device="cpu",
        memory_bytes=memory,
        read_bandwidth=bandwidth,
        matrix_rate=1e9,
    )


@st.composite
def clusters(draw):
    num_layers = draw(st.integers(1, 5))
    costs = model(layers=[draw(st.integers(500, 1500)) for _ in range(num_layers)], head=draw(st.integers(0, 2000)))
    names = "abcd"[: draw(st.integers(1, 4))]
    speeds = [
        speed(
            name,
            bandwidth=draw(st.sampled_from([300.0, 1000.0, 2500.0])),
            rate=draw(st.sampled_from([5e3, 1e6])),
            layer=((1, draw(st.sampled_from([0.0, 0.5]))), (4, draw(st.sampled_from([0.5, 2.0])))),
            head=((1, draw(st.sampled_from([0.0, 1.0]))),),
            hand_over=draw(st.sampled_from([0.0, 0.2])),
            host=draw(st.sampled_from([None, "shared"])),
            slowdown=draw(st.sampled_from([0.0, 0.8])),
        )
        for name in names
    ]
    links = {
        (a, b): LinkSpeed(latency_s=draw(st.sampled_from([0.01, 0.3, 2.0])), transfers=((0.0, 0.0), (1000.0, 0.5)))
        for a, b in itertools.permutations(["", *names], 2)
    }
    capacities = [
        capacity(each.worker_id, memory=draw(st.sampled_from([2000, 4000, 10**6])), host=each.host_id)
        for each in speeds
    ]
    return cluster(costs, *speeds, links=links), capacities


def every_cut(toy, capacities):
    """All sets, orders and cuts that fit."""
    by_id = {each.worker_id: each for each in capacities}
    num_layers = toy.costs.num_layers
    weights = best_cut_module.StageWeights(toy.costs, toy.placement)
    for count in range(1, min(len(capacities), num_layers) + 1):
        for names in itertools.permutations(by_id, count):
            for inner in itertools.combinations(range(1, num_layers), count - 1):
                bounds = (0, *inner, num_layers)
                cut = on(*zip(names, bounds[:-1], bounds[1:], strict=True))
                needs = {}
                for stage in cut:
                    need = weights.needed(stage.start, stage.end)
                    host = by_id[stage.worker_id].host_id
                    needs[host] = needs.get(host, 0) + need
                    if need > by_id[stage.worker_id].memory_bytes:
                        break
                else:
                    most = {
                        host: max(by_id[name].memory_bytes for name in names if by_id[name].host_id == host)
                        for host in needs
                    }
                    if all(needs[host] <= most[host] for host in needs):
                        yield cut


@settings(max_examples=120, deadline=None)
@given(clusters(), st.sampled_from([1, 4]))
def test_no_other_set_order_or_cut_is_much_better_than_the_one_that_is_found(case, num_sequences):
    toy, capacities = case
    workload = Workload(num_sequences=num_sequences, prompt_tokens=20, new_tokens=30, context=10)

    def seconds(cut):
        """With the best number of steps that share the sequences out evenly, as the search has it."""
        prompt_s = predict_prompt(toy, cut, num_tokens=20).time_to_first_token_s
        cycles = [
            predict_decode(
                toy, cut, num_sequences=num_sequences, context=workload.context, steps_in_flight=steps
            ).cycle_s
            for steps in (1, 2, 4)
            if num_sequences % steps == 0
        ]
        return num_sequences * prompt_s + 30 * min(cycles)

    found = best_cut(toy, capacities, workload)
    cuts = list(every_cut(toy, capacities))
    assert (found is None) == (not cuts)
    if found is not None:
        assert found.is_exact
        assert found.cut in cuts
        assert seconds(found.cut) <= min(map(seconds, cuts)) * 1.006


def test_a_search_that_is_given_up_says_so_and_keeps_the_best_it_knew(monkeypatch):
    toy = cluster(model(), speed("a"), speed("b", bandwidth=200.0))
    monkeypatch.setattr(best_cut_module, "_MOST_STATES", 0)
    found = best_cut(toy, [capacity("a"), capacity("b")], Workload(), known=[AB])
    assert (found.cut, found.is_exact) == (AB, False)


def test_a_way_whose_link_was_not_measured_is_not_taken():
    toy = cluster(model(), speed("a"), speed("b"))
    links = {ends: link for ends, link in toy.links.items() if set(ends) not in ({"a", "b"}, {"", "a"})}
    unknown = Cluster(costs=toy.costs, workers=toy.workers, links=links, placement=SMALL)
    found = best_cut(unknown, [capacity("a"), capacity("b")], Workload(prompt_tokens=5))
    assert found.cut == on(("b", 0, 6))


def test_all_figures_come_from_one_placement():
    toy = cluster(model(), speed("a"), speed("b"))
    workload = Workload(num_sequences=4, prompt_tokens=30, new_tokens=10)
    figures = predict(toy, AB, workload)
    assert figures.workload_s == pytest.approx(
        4 * figures.prompt.time_to_first_token_s + 40 / figures.many.tokens_per_s
    )
    assert figures.new_tokens_per_s == pytest.approx(40 / figures.workload_s)
    assert figures.one.num_tokens == 1


def offloading(name, bandwidth, *, host=None, offload="nvme", **more):
    return replace(speed(name, **more), host_id=host or name, offload=offload, offload_bandwidth=bandwidth)


def test_offloaded_weights_are_waited_for_where_they_take_longer_than_all_the_rest():
    """A stage computes for three seconds; 1,000 bytes come meanwhile."""
    cut = (StageOn(worker_id="a", start=0, end=3, offloaded_bytes=1000), *on(("b", 3, 6)))
    waits = {}
    for bandwidth in (1000.0, 500.0, 200.0):
        toy = cluster(model(head=0), offloading("a", bandwidth), speed("b"))
        step = predict_decode(toy, cut, num_sequences=1, context=0)
        waits[bandwidth] = step.stages[0].offload_s
        assert step.stages[0].compute_s == pytest.approx(max(3.0, 1000 / bandwidth))
        assert (PartKind.OFFLOAD in [part.kind for part in step.parts]) == (bandwidth < 1000 / 3)
    assert waits == pytest.approx({1000.0: 0.0, 500.0: 0.0, 200.0: 2.0})


def test_stages_that_compute_at_once_share_a_disk_but_not_the_way_to_their_gpus():
    cut = tuple(replace(stage, offloaded_bytes=3000) for stage in AB)
    waits = {}
    for offload in ("nvme", "cpu"):
        workers = [
            replace(offloading(name, 500.0, host="h", offload=offload), device=f"cuda:{index}")
            for index, name in enumerate("ab")
        ]
        for num_steps in (1, 2):
            step = predict_decode(
                cluster(model(head=0), *workers), cut, num_sequences=2, context=0, steps_in_flight=num_steps
            )
            waits[offload, num_steps] = [stage.offload_s for stage in step.stages]
    assert waits["nvme", 1] == waits["cpu", 1] == waits["cpu", 2] == pytest.approx([3.0, 3.0])
    assert waits["nvme", 2] == pytest.approx([9.0, 9.0])


def test_an_assignment_says_which_bytes_come_for_each_step():
    assignment = StageAssignment(
        epoch=1, worker_id="a", stage_index=0, num_stages=2, layers=LayerRange(0, 3), num_blocks=1, block_size=1,
        next_worker_id="b", offloaded_layers=(0, 2),
    )  # fmt: skip
    assert stage_on(assignment, model()) == StageOn(worker_id="a", start=0, end=3, offloaded_bytes=2000)
