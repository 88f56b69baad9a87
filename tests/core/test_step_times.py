"""How many steps in flight pay, by the measured tables."""

from dataclasses import replace

import pytest
from conversation import timing
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core.step_times import (
    MOST_STEPS,
    Mix,
    StagePace,
    StepShape,
    StepTimes,
    all_through_s,
    choose_steps_in_flight,
    cycle_s,
    split,
)
from shardwright.types import StepTiming


def prompt_timing(num_sequences: int, num_tokens: int, mean_s: float, *, count: int = 9) -> StepTiming:
    return StepTiming(num_sequences=num_sequences, num_tokens=num_tokens, mean_s=mean_s, count=count)


def measured(
    decodes: dict[int, float], prompts: dict[int, float] | None = None, *, concurrency: int = 1
) -> list[StepTiming]:
    """Decode steps by size; steps of one sequence by tokens."""
    timings = [timing(size, mean_s) for size, mean_s in decodes.items()]
    timings += [prompt_timing(1, tokens, mean_s) for tokens, mean_s in (prompts or {}).items()]
    return [replace(t, concurrency=concurrency) for t in timings]


def times_of(*timings: StepTiming) -> StepTimes:
    times = StepTimes()
    times.add(timings)
    return times


def stages(
    table: dict[int, float],
    *,
    prompts: dict[int, float] | None = None,
    count: int = 2,
    delay_s: float = 0.0,
    same_host: bool = False,
    together: dict[int, float] | None = None,  # times while two stages of the machine compute at once
):
    timings = [*measured(table, prompts), *measured(together or {}, concurrency=2)]
    return [
        StagePace(num_sharing=count if same_host else 1, times=times_of(*timings), link_delay_s=delay_s)
        for _ in range(count)
    ]


def choose(paces, *, decodes: int = 0, prompts: int = 0, tokens: int = 0, chunk: float = 512) -> int:
    mix = Mix(num_decodes=decodes, num_prompts=prompts, prompt_tokens=tokens)
    return choose_steps_in_flight(paces, mix, chunk_tokens=lambda _: chunk)


FLAT = {1: 0.02, 8: 0.02}
LINEAR = {1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08}

# --- the tables ------------------------------------------------------------------------------------


def test_times_between_measured_sizes_lie_on_the_line():
    times = times_of(*measured({1: 0.01, 5: 0.05}))
    assert times.at(3) == pytest.approx(0.03)
    assert times.at(1) == 0.01
    assert times.at(50) == 0.05
    assert times.at(0) == 0
    assert StepTimes().at(1) is None
    assert times.at(1, 100) is None


def test_a_smaller_step_than_measured_is_hoped_to_take_less_but_half_at_least():
    times = times_of(timing(8, 0.08))
    assert times.at(6) == pytest.approx(0.06)
    assert times.at(4) == times.at(1) == pytest.approx(0.04)


def test_a_smaller_step_is_never_thought_slower():
    """A table from noisy measurements is made to rise."""
    assert times_of(*measured({1: 0.05, 2: 0.02, 4: 0.03})).at(1) == 0.02


def test_one_disturbed_report_does_not_change_a_time_and_a_drift_does():
    times = times_of(*[timing(2, 0.02)] * 5)
    times.add([timing(2, 9.0)])
    assert times.at(2) == 0.02
    times.add([timing(2, 0.03)] * 3)
    assert times.at(2) == 0.03


def test_the_first_step_of_a_shape_alone_does_not_count():
    """It may prepare kernels and buffers: the probe is such a one. On a slow stage every report has one step."""
    times = times_of(replace(timing(1, 9.0), count=1), StepTiming(num_sequences=2, num_tokens=2, mean_s=9.0, count=0))
    assert times.at(1) is None
    times.add([replace(timing(1, 0.5), count=1)])
    assert times.at(1) == 0.5
    times.add([replace(timing(1, 0.5), count=1)])
    assert times.at(1) == 0.5


def test_prompt_tokens_add_to_a_step_what_it_took_beyond_its_sequences():
    times = times_of(timing(8, 0.1), prompt_timing(8, 8 + 200, 0.5))
    assert times.at(8, 200) == pytest.approx(0.5)
    assert times.at(8, 100) == pytest.approx(0.3)
    assert times.at(8, 400) == pytest.approx(0.9)
    assert times.most_prompt_tokens == 200


def test_prompts_are_known_before_decodes_are():
    """All of such a step's time is then its tokens'; a decode that is measured later takes its part."""
    times = times_of(prompt_timing(1, 513, 0.6))
    assert times.at(1, 512) == pytest.approx(0.6)
    assert times.at(1) is None
    times.add([timing(1, 0.1)])
    assert times.at(1, 512) == pytest.approx(0.6)
    assert times.at(1, 256) == pytest.approx(0.35)


def test_tables_of_other_concurrency_stand_in_for_what_was_not_measured():
    times = times_of(timing(4, 0.02))
    assert times.at(4, concurrency=2) == 0.02  # hoped, so that it is tried
    times = times_of(replace(timing(4, 0.04), concurrency=2))
    assert times.at(4) == pytest.approx(0.022)
    times.add([timing(4, 0.03)])
    assert times.at(4) == 0.03
    assert times.at(4, concurrency=2) == 0.04


def test_nothing_is_hoped_for_where_nothing_shall_be_tried():
    """Splitting up and computing at once are then thought to bring nothing."""
    times = times_of(timing(8, 0.08), prompt_timing(8, 108, 0.18))
    assert times.at(4, hopeful=False) == 0.08
    assert times.at(8, concurrency=2, hopeful=False) == 0.16
    assert times.at(8, 100, concurrency=2, hopeful=False) == pytest.approx(0.36)
    assert times_of(replace(timing(8, 0.08), concurrency=2)).at(8, hopeful=False) == 0.08


def test_a_prompts_first_step_counts_until_another_is_known():
    """Thought slower than it is, it harms nobody's decodes."""
    times = times_of(timing(1, 0.1), prompt_timing(1, 101, 3.1, count=1))
    assert times.at(1, 100) == pytest.approx(3.1)
    times.add([prompt_timing(1, 26, 0.15)])
    assert times.at(1, 100) == pytest.approx(0.3)


# --- the formula -----------------------------------------------------------------------------------


def test_a_mix_is_shared_out_evenly_and_prompts_go_where_decodes_are_fewer():
    mix = Mix(num_decodes=5, num_prompts=3, prompt_tokens=300)
    assert split(mix, num_steps=2, chunk_tokens=1000) == {
        StepShape(num_sequences=4, prompt_tokens=198): 1,
        StepShape(num_sequences=4, prompt_tokens=99): 1,
    }
    assert split(mix, num_steps=1, chunk_tokens=150) == {StepShape(num_sequences=7, prompt_tokens=148): 1}


def test_a_cycle_is_the_longest_trip_or_the_busiest_stage():
    paces = stages({1: 0.01, 8: 0.08}, delay_s=0.005)
    assert cycle_s(paces, {StepShape(num_sequences=8): 1}) == pytest.approx(0.17)
    assert cycle_s(paces, {StepShape(num_sequences=8): 3}) == pytest.approx(0.24)
    assert cycle_s(stages({}), {StepShape(num_sequences=8): 1}) is None


def test_all_are_through_when_the_pipeline_filled_and_drained():
    paces = stages({8: 0.08}, delay_s=0.005)
    assert all_through_s(paces, {StepShape(num_sequences=8): 1}) == pytest.approx(0.17)
    assert all_through_s(paces, {StepShape(num_sequences=8): 3}) == pytest.approx(0.17 + 2 * 0.08)
    uneven = [*stages({1: 0.01, 8: 0.02}, count=1), *stages({1: 0.02, 8: 0.08}, count=1)]
    steps = {StepShape(num_sequences=8): 1, StepShape(num_sequences=1): 2}
    assert all_through_s(uneven, steps) == pytest.approx(0.1 + 2 * 0.02)
    assert all_through_s(paces, {StepShape(num_sequences=8): 3}, num_rounds=2.5) == pytest.approx(0.33 + 1.5 * 0.24)
    assert all_through_s(stages({}), {StepShape(num_sequences=8): 1}) is None


def test_a_slow_link_is_a_stage_too():
    slow = [replace(pace, link_token_s=0.01) for pace in stages(FLAT)]
    assert cycle_s(slow, {StepShape(num_sequences=8): 3}) == pytest.approx(0.24)


# --- the choice ------------------------------------------------------------------------------------


def test_where_time_is_flat_one_step_is_best():
    """Decode bound by memory: each step reads all weights, so two half steps cost two whole ones."""
    assert choose(stages(FLAT), decodes=8) == 1


def test_where_time_grows_with_the_sequences_every_machine_gets_a_step():
    assert choose(stages(LINEAR), decodes=8) == 2
    assert choose(stages(LINEAR, count=4), decodes=8) == 4
    assert choose(stages(LINEAR), decodes=1) == 1


def test_prompts_that_are_all_there_is_are_split_only_where_filling_the_pipeline_costs_less():
    """Two stages that share their machine's cores: each is twice as slow while the other computes."""
    alone = {"prompts": {100: 0.1, 200: 0.2}}
    shared = [
        StagePace(
            num_sharing=2,
            times=times_of(*measured({1: 0.001}, alone["prompts"]), *measured({1: 0.002}, {100: 0.2}, concurrency=2)),
        )
        for _ in range(2)
    ]
    assert choose(shared, prompts=8, tokens=200) == 1
    assert choose(stages({1: 0.001}, **alone), prompts=8, tokens=200) > 1, "two machines compute at once"
    assert choose(shared, prompts=5, tokens=112) == 1, "a number of prompts that does not divide their tokens"


@pytest.mark.parametrize("tokens", [1000, 1024, 1025, 1280])
def test_whether_one_round_takes_all_prompts_makes_no_jump(tokens):
    """Two machines, times in proportion to tokens: small steps fill the pipeline sooner, one token more or less."""
    assert choose(stages({1: 0.001}, prompts={64: 0.064, 512: 0.512}), prompts=8, tokens=tokens) == 8


def test_slow_links_are_filled_with_more_steps():
    """S (1 + l/t) steps: more are on their way where links are slow."""
    assert choose(stages(LINEAR, delay_s=0.02), decodes=8) > 2


def test_on_one_machine_measurements_under_two_steps_decide():
    """Stages that wait for memory slow each other down; stages that wait for the interpreter don't."""
    assert choose(stages(LINEAR, same_host=True), decodes=8) == 2
    assert choose(stages(LINEAR, same_host=True, together={4: 0.08}), decodes=8) == 1
    assert choose(stages(LINEAR, same_host=True, together={4: 0.04}), decodes=8) == 2


def test_without_measurements_decodes_go_in_one_step_and_prompts_in_one_for_each_stage():
    assert choose([], decodes=8) == 1
    half_known = [*stages(LINEAR, count=1), *stages({}, count=1)]
    assert choose(half_known, decodes=8) == 1
    assert choose(half_known, prompts=16, tokens=16 * 512) == 2
    assert choose(stages({}, count=4), prompts=3, tokens=3 * 512) == 3
    assert choose(stages({}, count=4), prompts=16, tokens=16 * 5) == 1
    assert choose(stages({}), prompts=1, tokens=4096) == 1


def test_smaller_steps_are_tried_by_halves_until_they_do_not_pay():
    assert choose(stages({8: 0.08}), decodes=8) == 2
    assert choose(stages({4: 0.08, 8: 0.08}), decodes=8) == 1
    assert choose(stages({4: 0.04, 8: 0.08}), decodes=8) == 2
    assert choose(stages({8: 0.08}, count=1), decodes=8) == 1


def test_prompts_pay_for_steps_in_flight_where_decodes_do_not():
    """The same stages: flat for decodes, while a chunk takes in proportion to its tokens."""
    paces = stages(FLAT, prompts={64: 0.15, 512: 1.0})
    assert choose(paces, decodes=16) == 1
    assert choose(paces, prompts=16, tokens=16 * 512) == 2
    assert choose(paces, decodes=8, prompts=8, tokens=8 * 512, chunk=100) == 2
    assert choose(paces, prompts=1, tokens=512) == 1


def test_nothing_is_tried_while_decodes_have_prompts_beside_them():
    """Half a batch was never measured: it is tried with decodes alone."""
    paces = stages({8: 0.08}, prompts={512: 1.0})
    assert choose(paces, decodes=8) == 2
    assert choose(paces, decodes=8, prompts=1, tokens=16, chunk=16) == 1


def test_a_choice_stays_unless_another_is_better_by_more_than_noise():
    mix = Mix(num_decodes=8)
    slightly = stages({4: 0.0395, 8: 0.0395 * 2}, delay_s=0.0)
    assert choose_steps_in_flight(slightly, mix, chunk_tokens=lambda _: 0) == 2
    even = stages({4: 0.0395, 8: 0.04})
    assert choose_steps_in_flight(even, mix, chunk_tokens=lambda _: 0) == 1
    assert choose_steps_in_flight(even, mix, chunk_tokens=lambda _: 0, current=2) == 2
    worse = stages({4: 0.041, 8: 0.04})
    assert choose_steps_in_flight(worse, mix, chunk_tokens=lambda _: 0, current=2) == 1


def test_stages_of_one_machine_that_do_not_hinder_each_other_keep_prompts_apart():
    """Measured under two steps only, from the first prompts on: one at a time is not hoped to be better."""
    times = times_of(*measured({}, {512: 1.0}, concurrency=2))
    paces = [StagePace(num_sharing=2, times=times) for _ in range(2)]
    assert choose(paces, prompts=16, tokens=16 * 512) == 2


def test_times_of_zero_promise_nothing():
    assert choose(stages({1: 0.0}), decodes=8) == 1


@settings(deadline=None)  # the machine may be busy
@given(
    st.dictionaries(st.integers(1, 32), st.floats(1e-4, 1.0), min_size=1, max_size=5),
    st.integers(1, 4),
    st.floats(0.0, 0.5),
    st.booleans(),
    st.integers(1, 64),
)
def test_the_choice_is_never_slower_than_one_step(table, count, delay_s, same_host, num_sequences):
    paces = stages(table, count=count, delay_s=delay_s, same_host=same_host, together=table)
    chosen = choose(paces, decodes=num_sequences)
    assert 1 <= chosen <= min(num_sequences, MOST_STEPS)
    mix = Mix(num_decodes=num_sequences)
    cycles = [cycle_s(paces, split(mix, num_steps=steps, chunk_tokens=0)) for steps in (1, chosen)]
    assert cycles[1] <= cycles[0]
