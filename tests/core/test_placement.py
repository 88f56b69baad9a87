"""Placement against a brute force that tries everything, and the rules that it must keep."""

import functools
import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core import placement_search
from shardwright.core.placement import PlacementSettings, place
from shardwright.errors import PlacementError
from shardwright.types import LayerRange, ModelCosts, WorkerCapacity

MIB = 1024**2
GIB = 1024**3


def model(layers, *, kv=None, embedding=0, head=0, tied=False):
    """A model of the given layer weights in bytes."""
    return ModelCosts(
        name="tiny",
        hidden_size=8,
        layer_bytes=tuple(layers),
        layer_kv_bytes_per_token=tuple(kv or [1] * len(layers)),
        embedding_bytes=embedding,
        head_bytes=head,
        tied_embedding=tied,
        activation_bytes_per_token=16,
        max_context=1024,
    )


def worker(
    name, memory=10**6, *, speed=1.0, host=None, device="cpu", link=0.0, shared=0, matrix_rate=1e12, offload=(0, 0.0)
):
    """A worker that reads `speed` bytes a second; on a host of its own unless told."""
    return WorkerCapacity(
        worker_id=name,
        host_id=host or f"host of {name}",
        device=device,
        memory_bytes=memory,
        read_bandwidth=speed,
        matrix_rate=matrix_rate,
        link_delay_s=link,
        shared_memory_bytes=shared,
        offload="nvme" if offload[0] else "",
        offload_bytes=offload[0],
        offload_bandwidth=offload[1],
    )


SMALL = PlacementSettings(block_size=2, min_kv_tokens=4, max_kv_tokens=64, workspace_bytes=3)


def ranges(plan):
    return {stage.worker_id: (stage.layers.start, stage.layers.end) for stage in plan.stages}


# --- brute force -------------------------------------------------------------------------------------


def stage_cost(costs, limits, start, end):
    """(bytes held, bytes streamed, bytes needed) of a stage, from the definition."""
    layers = sum(costs.layer_bytes[start:end])
    is_last = end == costs.num_layers
    held = layers + (costs.embedding_bytes if start == 0 else 0) + (costs.head_bytes if is_last else 0)
    if start == 0 and is_last and costs.tied_embedding:
        held -= min(costs.embedding_bytes, costs.head_bytes)
    blocks = -(-limits.min_kv_tokens // limits.block_size)
    kv = sum(costs.layer_kv_bytes_per_token[start:end]) * limits.block_size * blocks
    return held, layers + (costs.head_bytes if is_last else 0), held + kv + limits.workspace_bytes


def brute_force(costs, workers, limits):
    """The best (-stages, bottleneck, latency) of every order of every subset and every cut; None if nothing fits.

    Only where nothing fits in memory alone, what workers may keep beside it is used.
    """
    return try_all(costs, workers, limits, offloading=False) or try_all(costs, workers, limits, offloading=True)


def try_all(costs, workers, limits, *, offloading):
    num_layers = costs.num_layers
    least = min(stage_cost(costs, limits, i, i + 1)[2] for i in range(num_layers))
    usable = [w for w in workers if w.memory_bytes >= least]
    best = None
    for count in range(1, min(len(usable), num_layers) + 1):
        for chosen in itertools.permutations(usable, count):
            for inner in itertools.combinations(range(1, num_layers), count - 1):
                bounds = (0, *inner, num_layers)
                value = rate(costs, limits, usable, chosen, bounds, offloading=offloading)
                if value is None:
                    continue
                value = tuple(float(f"{part:.12g}") for part in value)  # a sum's rounding must not decide a tie
                if best is None or value < best:
                    best = value
    return best


def elsewhere(costs, limits, stage, memory, room):
    """Bytes of a stage that have to be kept beside that much memory: 0 if none; None if it fits in no way.

    `room` is for them; None: nothing can be kept elsewhere. Of n layers the fewest k, of which the i-th is one if
    floor((i + 1) k / n) is above floor(i k / n), that make room for the rest and for two of the largest layer.
    """
    _, _, needed = stage_cost(costs, limits, *stage)
    if needed <= memory:
        return 0
    if room is None:
        return None
    layers = costs.layer_bytes[slice(*stage)]
    count = len(layers)
    for number in range(1, count + 1):
        moved = [layers[i] for i in range(count) if (i + 1) * number // count > i * number // count]
        if needed - sum(moved) + 2 * max(layers) <= memory:
            return sum(moved) if sum(moved) <= room else None
    return None


def rate(costs, limits, usable, chosen, bounds, *, offloading=False):
    """The value of one placement, or None if it does not fit."""
    on_device, bottleneck, latency = {}, 0.0, 0.0
    for member, start, end in zip(chosen, bounds[:-1], bounds[1:], strict=True):
        _, streamed, needed = stage_cost(costs, limits, start, end)
        device = (member.host_id, member.device)
        peers = [w for w in usable if (w.host_id, w.device) == device]
        shared = max(max(w.memory_bytes, w.shared_memory_bytes) for w in peers)
        transfer_s, readers = 0.0, []
        if offloading:  # with an equal part of the device's memory
            readers = [w for w in usable if w.host_id == member.host_id and w.offload_bytes and member.offload_bytes]
            memory = min(member.memory_bytes, shared // len(peers))
            room = member.offload_bytes // len(readers) if readers else None
            moved = elsewhere(costs, limits, (start, end), memory, room)
            if moved is None:
                return None
            transfer_s = moved / max(w.offload_bandwidth for w in readers) if moved else 0.0
        elif needed > member.memory_bytes:
            return None
        else:
            on_device[device] = on_device.get(device, 0) + needed
            if on_device[device] > shared:
                return None
        step_s = functools.partial(byte_s, costs, peers)
        head = streamed - sum(costs.layer_bytes[start:end])
        decode_s = limits.new_tokens / limits.num_sequences * streamed * step_s(limits.num_sequences)
        prefill_s = (streamed - head) * step_s(limits.prompt_tokens) if limits.prompt_tokens else 0.0
        waiting_s = transfer_s * len(readers)  # of each step, while others read too
        prefill_s = max(prefill_s * len(peers), waiting_s if limits.prompt_tokens else 0.0)
        decode_s = max(decode_s * len(peers), waiting_s * limits.new_tokens / limits.num_sequences)
        bottleneck = max(bottleneck, prefill_s + decode_s)
        latency += max(streamed * step_s(1), transfer_s) + member.link_delay_s
    return -len(chosen), bottleneck, latency


def byte_s(costs, peers, num_tokens):
    """Time for each byte that a step of so many tokens reads, on the device of these workers."""
    arithmetic = 2 * num_tokens / costs.element_bytes / max(w.matrix_rate for w in peers)
    return max(1 / max(w.read_bandwidth for w in peers), arithmetic)


NOTHING = (0, 0.0)


@st.composite
def cases(draw, offloads=(NOTHING,)):
    num_layers = draw(st.integers(1, 6))
    layers = draw(st.lists(st.integers(1, 20), min_size=num_layers, max_size=num_layers))
    kv = draw(st.lists(st.integers(0, 3), min_size=num_layers, max_size=num_layers))
    costs = model(
        layers, kv=kv, embedding=draw(st.integers(0, 30)), head=draw(st.integers(0, 30)), tied=draw(st.booleans())
    )
    kinds = draw(
        st.lists(
            st.tuples(
                st.integers(5, 150),
                st.sampled_from([1.0, 2.0, 5.0]),
                st.sampled_from("abc"),
                st.sampled_from([0.0, 3.0]),
                st.sampled_from([1e12, 4.0]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    picks = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=4))
    workers = []
    for index, pick in enumerate(picks):
        memory, speed, host, link, matrix_rate = kinds[pick]
        shares_host = draw(st.booleans())
        shared = draw(st.sampled_from([0, 0, 200]))
        name = f"w{index}"
        home = host if shares_host else None
        offload = draw(st.sampled_from(offloads))
        workers.append(
            worker(
                name, memory, speed=speed, host=home, link=link, shared=shared, matrix_rate=matrix_rate, offload=offload
            )
        )
    return costs, workers


WORKLOADS = [
    SMALL,
    replace(SMALL, prompt_tokens=3, new_tokens=2),
    replace(SMALL, prompt_tokens=64, new_tokens=16, num_sequences=4),
]


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from(WORKLOADS))
def test_no_other_placement_is_better(case, limits):
    """Stages, bottleneck and latency equal those of the best of all placements; where none fits, it says so."""
    costs, workers = case
    best = brute_force(costs, workers, limits)
    if best is None:
        with pytest.raises(PlacementError, match="Add a worker with at least"):
            place(costs, workers, limits)
        return
    plan = place(costs, workers, limits)
    assert plan.is_exact
    assert value(plan, costs, workers, limits) == pytest.approx(best)
    check(plan, costs, workers)


TIERS = (NOTHING, (400, 0.5), (90, 0.5), (400, 4.0), (400, 0.05))
"""Bytes that a worker may keep beside its memory, and how many a second come back: whole attoseconds for a byte, or two
placements of equal bottleneck would differ by a rounding, and the one of longer latency be right to win."""


@st.composite
def tight_cases(draw):
    """Models of which most fit only with layers elsewhere, on workers that often share host and disk."""
    num_layers = draw(st.integers(9, 13))
    layers = draw(st.lists(st.integers(8, 20), min_size=num_layers, max_size=num_layers))
    kv = draw(st.lists(st.integers(0, 1), min_size=num_layers, max_size=num_layers))
    costs = model(layers, kv=kv, embedding=draw(st.integers(0, 9)), head=draw(st.sampled_from([0, 9, 40])))
    workers = []
    for index in range(draw(st.integers(2, 3))):
        home, offload = draw(st.sampled_from(["x", "x", None])), draw(st.sampled_from(TIERS[1:]))
        speed, rate = draw(st.sampled_from([1.0, 5.0])), draw(st.sampled_from([1e12, 4.0]))
        memory = draw(st.sampled_from([62, 70, 80]))
        workers.append(
            worker(f"w{index}", memory, speed=speed, host=home, shared=300, matrix_rate=rate, offload=offload)
        )
    return costs, workers


@settings(max_examples=500, deadline=None)
@given(cases(offloads=TIERS) | tight_cases(), st.sampled_from(WORKLOADS))
def test_no_other_placement_is_better_where_layers_may_be_offloaded(case, limits):
    """Nothing is offloaded where all fits; else no order, no cut and no other use of the tiers is better."""
    costs, workers = case
    best = brute_force(costs, workers, limits)
    if best is None:
        with pytest.raises(PlacementError, match="Add a worker with at least"):
            place(costs, workers, limits)
        return
    plan = place(costs, workers, limits)
    assert plan.is_exact
    is_needed = try_all(costs, workers, limits, offloading=False) is None
    assert any(stage.offloaded_layers for stage in plan.stages) is is_needed
    assert value(plan, costs, workers, limits, offloading=is_needed) == pytest.approx(best)
    check(plan, costs, workers)


@pytest.mark.parametrize("cut_limit", [100_000, 0])
@settings(max_examples=100, deadline=None)
@given(case=cases(offloads=TIERS))
def test_offloading_without_trying_every_order_fits_and_is_never_better(cut_limit, case):
    costs, workers = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_search, "_MAX_TRANSITIONS", 0)
        patch.setattr(placement_search, "_MAX_CUT_TRANSITIONS", cut_limit)
        try:
            plan = place(costs, workers, SMALL)
        except PlacementError:
            return
    check(plan, costs, workers)
    best = brute_force(costs, workers, SMALL)
    offloads = any(stage.offloaded_layers for stage in plan.stages)
    if offloads and try_all(costs, workers, SMALL, offloading=False) is not None:
        return  # four orders all failed where another fits without
    assert (-len(plan.stages), plan.bottleneck_s * (1 + 1e-9)) >= best[:2]


def value(plan, costs, workers, limits, *, offloading=False):
    """What `rate` says of a plan; what the plan says of itself is the same where steps are what counts."""
    by_id = {w.worker_id: w for w in workers}
    least = min(stage_cost(costs, limits, i, i + 1)[2] for i in range(costs.num_layers))
    bounds = [0, *(stage.layers.end for stage in plan.stages)]
    usable = [w for w in workers if w.memory_bytes >= least]
    chosen = [by_id[stage.worker_id] for stage in plan.stages]
    found = rate(costs, limits, usable, chosen, bounds, offloading=offloading)
    if limits is SMALL:
        assert (-len(plan.stages), plan.bottleneck_s, plan.latency_s) == pytest.approx(found)
    assert plan.latency_s == pytest.approx(found[2])
    return found


@pytest.mark.parametrize("cut_limit", [100_000, 0])
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_what_is_found_without_trying_every_order_fits_and_is_never_better(cut_limit, case):
    """With the exact search given up, and with shared memory split, a plan keeps every limit."""
    costs, workers = case
    best = brute_force(costs, workers, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_search, "_MAX_TRANSITIONS", 0)
        patch.setattr(placement_search, "_MAX_CUT_TRANSITIONS", cut_limit)
        try:
            plan = place(costs, workers, SMALL)
        except PlacementError:
            return  # four orders may all fail where another fits
    check(plan, costs, workers)
    assert best is not None
    assert (-len(plan.stages), plan.bottleneck_s * (1 + 1e-9)) >= best[:2]


def test_the_longer_the_prompts_the_more_layers_beside_the_head():
    """A prompt needs the head once, an answer for each token: 20 layers and a head of ten over two equal workers."""
    costs, workers = model([10] * 20, head=100), [worker("a", matrix_rate=4.0), worker("b", matrix_rate=4.0)]
    ends = [
        place(costs, workers, replace(SMALL, prompt_tokens=prompt, new_tokens=16, num_sequences=4)).stages[0].layers.end
        for prompt in (0, 16, 64, 1024)
    ]
    assert ends == [15, 12, 11, 10]  # the head counts like 10, 5, 2 and 0.15 layers


def check(plan, costs, workers):
    """What holds for every placement: all layers once, in order, nobody twice, all memory within bounds."""
    by_id = {w.worker_id: w for w in workers}
    assert [stage.layers.start for stage in plan.stages] == [0, *(stage.layers.end for stage in plan.stages[:-1])]
    assert plan.stages[-1].layers.end == costs.num_layers
    assert [stage.is_first for stage in plan.stages] == [True] + [False] * (len(plan.stages) - 1)
    assert [stage.is_last for stage in plan.stages] == [False] * (len(plan.stages) - 1) + [True]
    named = [stage.worker_id for stage in plan.stages] + [left.worker_id for left in plan.left_out]
    assert sorted(named) == sorted(by_id)
    assert SMALL.min_blocks <= plan.num_blocks <= SMALL.max_blocks
    devices = {}
    for stage in plan.stages:
        held, streamed, _ = stage_cost(costs, SMALL, stage.layers.start, stage.layers.end)
        member = by_id[stage.worker_id]
        used = stage.weight_bytes + stage.kv_bytes + SMALL.workspace_bytes
        used += stage.buffer_bytes - stage.offloaded_bytes
        assert stage.weight_bytes == held
        assert sum(costs.layer_bytes[layer] for layer in stage.offloaded_layers) == stage.offloaded_bytes
        assert stage.offloaded_bytes <= member.offload_bytes
        assert all(layer in stage.layers for layer in stage.offloaded_layers)
        transfer_s = stage.offloaded_bytes / member.offload_bandwidth if stage.offloaded_bytes else 0.0
        assert stage.step_s <= max(streamed * byte_s(costs, [member], 1), transfer_s) * (1 + 1e-9)
        assert used <= member.memory_bytes
        devices[member.host_id] = devices.get(member.host_id, 0) + used
    for host, used in devices.items():
        assert used <= max(max(w.memory_bytes, w.shared_memory_bytes) for w in workers if w.host_id == host)


# --- the rules, one by one ---------------------------------------------------------------------------


def test_equal_workers_share_equal_layers_in_the_order_given():
    plan = place(model([10] * 8), [worker("b"), worker("a"), worker("d"), worker("c")], SMALL)
    assert ranges(plan) == {"b": (0, 2), "a": (2, 4), "d": (4, 6), "c": (6, 8)}
    assert plan.bottleneck_s == 20.0
    assert plan.latency_s == 80.0
    assert plan.left_out == ()


def test_what_is_left_of_ties_goes_to_even_stages():
    """Ten layers on four workers: three, three, two, two, and not three, three, three, one."""
    plan = place(model([10] * 10), [worker(name) for name in "abcd"], SMALL)
    assert sorted(len(stage.layers) for stage in plan.stages) == [2, 2, 3, 3]


def test_layers_follow_speed():
    plan = place(model([10] * 9), [worker("slow", speed=1.0), worker("fast", speed=2.0)], SMALL)
    assert len(plan.stages[0].layers) + len(plan.stages[1].layers) == 9
    assert {s.worker_id: len(s.layers) for s in plan.stages} == {"slow": 3, "fast": 6}


def test_the_head_costs_time_and_the_embedding_does_not():
    """A head as heavy as two layers takes two layers from the last stage; the embedding takes none from the first."""
    plan = place(model([10] * 6, embedding=40, head=20), [worker("a"), worker("b")], SMALL)
    assert ranges(plan) == {"a": (0, 4), "b": (4, 6)}
    assert (plan.stages[0].weight_bytes, plan.stages[1].weight_bytes) == (80, 40)


def test_arithmetic_limits_a_worker_that_reads_fast():
    """Two operations for each two-byte weight: at 5 operations a second a worker can't use 100 bytes a second."""
    slow = replace(worker("a", speed=100.0), matrix_rate=5.0)
    assert place(model([10]), [slow], SMALL).bottleneck_s == pytest.approx(2.0)


def test_a_tied_embedding_is_held_once_by_one_stage_and_twice_by_two():
    costs = model([10, 10], embedding=50, head=52, tied=True)
    assert place(costs, [worker("a")], SMALL).stages[0].weight_bytes == 72
    assert [s.weight_bytes for s in place(costs, [worker("a"), worker("b")], SMALL).stages] == [60, 62]


def test_the_first_stage_goes_to_the_worker_that_can_hold_the_embedding():
    plan = place(model([10, 10], embedding=500), [worker("small", 100), worker("large", 1000)], SMALL)
    assert ranges(plan) == {"large": (0, 1), "small": (1, 2)}


def test_memory_comes_before_speed_and_keeps_room_for_kv():
    """The fast worker would take nearly everything; weights, KV of four tokens and workspace let it hold two layers."""
    tight = worker("fast", 2 * 10 + 2 * 4 + 3, speed=100.0)
    plan = place(model([10] * 6), [tight, worker("slow")], SMALL)
    assert {s.worker_id: len(s.layers) for s in plan.stages} == {"fast": 2, "slow": 4}
    assert plan.num_blocks == 2
    reasons = {s.worker_id: s.reason for s in plan.stages}
    assert "its memory holds no further layer" in reasons["fast"]
    assert "the slowest stage" in reasons["slow"]


def test_blocks_are_those_of_the_stage_with_least_room():
    """Of 100 bytes 20 are weights, 3 workspace; a block of two layers is 4 bytes: 19 blocks."""
    plan = place(model([10] * 4), [worker("a"), worker("b", 100)], SMALL)
    assert plan.num_blocks == 19
    assert [s.kv_bytes for s in plan.stages] == [76, 76]
    assert place(model([10] * 4), [worker("a"), worker("b")], SMALL).num_blocks == 32  # max_kv_tokens


def test_layers_without_kv_limit_no_blocks():
    plan = place(model([10, 10], kv=[0, 0]), [worker("a", 50)], SMALL)
    assert (plan.num_blocks, plan.stages[0].kv_bytes) == (32, 0)


def test_a_worker_too_small_for_any_layer_is_left_out_with_the_reason():
    plan = place(model([10 * GIB, 10 * GIB]), [worker("tiny", GIB), worker("big", 40 * GIB)], PlacementSettings())
    assert ranges(plan) == {"big": (0, 2)}
    assert [left.worker_id for left in plan.left_out] == ["tiny"]
    assert "can't hold even one layer" in plan.left_out[0].reason
    assert "it has 1.00 GiB" in plan.left_out[0].reason


def test_a_worker_that_measured_nothing_is_left_out():
    plan = place(model([10]), [worker("dead", speed=0.0), worker("odd", speed=float("nan")), worker("good")], SMALL)
    assert ranges(plan) == {"good": (0, 1)}
    assert [left.worker_id for left in plan.left_out] == ["dead", "odd"]


def test_more_workers_than_layers_uses_the_best():
    workers = [
        worker("slow"),
        worker("fast", speed=5.0),
        worker("far", speed=5.0, link=9.0),
        worker("other", speed=5.0),
    ]
    plan = place(model([10, 10]), workers, SMALL)
    assert list(ranges(plan)) == ["fast", "other"]
    assert [(left.worker_id, left.reason) for left in plan.left_out] == [
        ("slow", "every layer has a worker already"),
        ("far", "every layer has a worker already"),
    ]


def test_a_worker_with_which_nothing_fits_is_left_out():
    """`thin` could hold a layer, but neither the embedding nor the head, and there is no stage between them."""
    plan = place(model([10] * 3, embedding=500, head=500), [worker("thin", 100), worker("big", 2000)], SMALL)
    assert ranges(plan) == {"big": (0, 3)}
    assert plan.left_out[0].reason == "no placement that includes it too fits in memory"


def test_workers_on_one_host_share_its_speed():
    """Two on one CPU get as much together as one alone on an equal CPU; a lone step runs at full speed in each."""
    plan = place(model([10] * 8), [worker("a", host="x"), worker("b", host="x"), worker("c", host="y")], SMALL)
    assert {s.worker_id: len(s.layers) for s in plan.stages} == {"a": 2, "b": 2, "c": 4}
    assert plan.bottleneck_s == 40.0
    assert plan.latency_s == 80.0


def test_workers_on_one_device_have_the_best_speed_that_one_of_them_measured():
    """What starts together measures together, and one of two equal workers finds the memory busy."""
    plan = place(model([10] * 4), [worker("a", host="x", speed=2.0), worker("b", host="x", speed=5.0)], SMALL)
    assert ranges(plan) == {"a": (0, 2), "b": (2, 4)}
    assert [stage.step_s for stage in plan.stages] == [4.0, 4.0]


def test_gpus_of_one_host_do_not_share():
    workers = [worker("a", host="x", device="cuda:0"), worker("b", host="x", device="cuda:1")]
    assert place(model([10] * 4), workers, SMALL).bottleneck_s == 20.0
    both_on_one = [replace(w, device="cuda:0") for w in workers]
    assert place(model([10] * 4), both_on_one, SMALL).bottleneck_s == 40.0


def test_workers_on_one_host_share_its_memory():
    """Each could hold two thirds alone; both together hold no more than that, so the third host's worker must help."""
    here = [worker("a", 73, host="x"), worker("b", 73, host="x")]
    with pytest.raises(PlacementError, match="together"):
        place(model([10] * 6), here, SMALL)
    plan = place(model([10] * 6), [*here, worker("c", 60, host="y", speed=0.1)], SMALL)
    held = {s.worker_id: s.weight_bytes + s.kv_bytes + SMALL.workspace_bytes for s in plan.stages}
    assert held["a"] + held["b"] <= 73
    assert set(held) == {"a", "b", "c"}


def test_limits_below_the_hosts_memory_add_up():
    """Two workers that were told to use little of a large host may use both their limits."""
    workers = [worker("a", 50, host="x", shared=1000), worker("b", 50, host="x", shared=1000)]
    assert ranges(place(model([10] * 6), workers, SMALL)) == {"a": (0, 3), "b": (3, 6)}


def test_a_stage_twice_its_memory_offloads_as_few_layers_as_are_enough_and_says_what_that_costs():
    """16 layers of ten with room for eight: ten go, since two buffers stay; they take 100 ms, computing 160."""
    costs, limits = model([10 * MIB] * 16), PlacementSettings(workspace_bytes=0, min_kv_tokens=16)
    disk = worker("a", 80 * MIB + 16 * 16, speed=1e9 * MIB / 10**6, offload=(GIB, 1e9 * MIB / 10**6))
    plan = place(costs, [disk], limits)
    stage = plan.stages[0]
    assert stage.offloaded_layers == (1, 3, 4, 6, 7, 9, 11, 12, 14, 15)
    assert (stage.offloaded_bytes, stage.buffer_bytes) == (100 * MIB, 20 * MIB)
    assert plan.latency_s == pytest.approx(0.160)
    assert "10 of its 16 layers (100 MiB) on disk, since no placement fits in memory alone" in stage.reason
    assert "each step reads them at 1.05 GB/s: 100 ms beside 160 ms of computing" in stage.reason
    slow = place(costs, [replace(disk, offload_bandwidth=disk.offload_bandwidth / 4)], limits)
    assert slow.latency_s == pytest.approx(0.400)  # the disk, not the sum
    roomy = place(costs, [disk, worker("b", 200 * MIB)], limits)
    assert not any(stage.offloaded_layers for stage in roomy.stages)


def test_the_worker_with_the_faster_disk_offloads_more():
    slow, fast = worker("slow", 70, offload=(500, 0.05)), worker("fast", 70, offload=(500, 0.4))
    plan = place(model([10] * 20), [slow, fast], SMALL)
    moved = {stage.worker_id: stage.offloaded_bytes for stage in plan.stages}
    assert moved["fast"] > moved["slow"] > 0


def test_workers_of_one_host_share_its_disk():
    """In room: 60 bytes of it are enough for each of two hosts, but not for two workers of one."""
    here = [worker("a", 50, host="x", shared=100, offload=(60, 1.0)), worker("b", 50, host="y", offload=(60, 1.0))]
    assert place(model([10] * 10), here, SMALL).stages
    with pytest.raises(PlacementError, match="Offloading layers is not enough"):
        place(model([10] * 10), [replace(w, host_id="x", shared_memory_bytes=100) for w in here], SMALL)


def test_an_unfit_model_says_what_it_needs_and_what_would_help():
    costs = model([2 * GIB] * 10, embedding=GIB, head=GIB)
    workers = [worker("a", 8 * GIB), worker("b", 6 * GIB)]
    with pytest.raises(PlacementError) as caught:
        place(costs, workers, PlacementSettings())
    message = str(caught.value)
    assert "tiny needs 22.13 GiB (22.00 GiB of weights, KV for 1024 tokens, and workspace)" in message
    assert "the largest (a) offers 8.00 GiB, the 2 workers together 14.00 GiB" in message
    enough = float(message.partition("Add a worker with at least ")[2].partition(" GiB")[0])
    assert enough < 22
    place(costs, [*workers, worker("c", int(enough * GIB))], PlacementSettings())


def test_without_workers_it_says_so():
    with pytest.raises(PlacementError, match="no worker to hold tiny"):
        place(model([1]), [], SMALL)


def test_large_clusters_are_placed_in_seconds():
    """36 unlike workers and 126 layers; the bound is loose, for machines that are busy with other things."""
    layers, kv = [6 * GIB] * 126, [4096] * 126
    costs = model(layers, kv=kv, embedding=4 * GIB, head=4 * GIB)
    unlike = [worker(f"w{i}", (30 + i) * GIB, speed=(1 + i / 7) * 1e11) for i in range(36)]
    equal = [worker(f"w{i}", 40 * GIB, speed=1e11) for i in range(36)]
    start = time.perf_counter()
    plans = [place(costs, unlike, PlacementSettings()), place(costs, equal, PlacementSettings())]
    assert time.perf_counter() - start < 20
    assert [len(plan.stages) for plan in plans] == [36, 36]
    assert [plan.is_exact for plan in plans] == [False, True]
    assert plans[0] == place(costs, unlike, PlacementSettings())


def test_two_kinds_of_many_workers_are_placed_exactly():
    workers = [worker(f"w{i}", 100 * GIB, speed=(1e11, 5e10)[i % 2]) for i in range(12)]
    plan = place(model([GIB] * 40, kv=[4096] * 40, head=GIB), workers, PlacementSettings())
    assert plan.is_exact
    fast_first = [stage.worker_id for stage in plan.stages]
    for kind in (0, 1):  # equal workers keep their order
        mine = [name for name in fast_first if int(name[1:]) % 2 == kind]
        assert mine == sorted(mine, key=lambda name: int(name[1:]))
    assert plan.stages[0].layers == LayerRange(0, len(plan.stages[0].layers))
