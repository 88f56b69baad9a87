"""How many steps in flight pay, by the measured tables."""

from dataclasses import replace

import pytest
from conversation import timing
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core.step_times import MOST_STEPS, StagePace, StepTimes, choose_steps_in_flight, tokens_per_second
from shardwright.types import StepTiming


def stages(
    table: dict[int, float],
    *,
    count: int = 2,
    delay_s: float = 0.0,
    same_host: bool = False,
    together: dict[int, float] | None = None,  # times while two stages of the machine compute at once
):
    return [
        StagePace(
            num_sharing=count if same_host else 1,
            times=StepTimes({1: dict(table), **({2: dict(together)} if together else {})}),
            link_delay_s=delay_s,
        )
        for _ in range(count)
    ]


FLAT = {1: 0.02, 8: 0.02}
LINEAR = {1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08}


def test_times_between_measured_sizes_lie_on_the_line():
    times = StepTimes({1: {1: 0.01, 5: 0.05}})
    assert times.at(3) == pytest.approx(0.03)
    assert times.at(1) == 0.01
    assert times.at(50) == 0.05
    assert StepTimes({1: {4: 0.04}}).at(1) == 0.04
    assert StepTimes({1: {4: 0.04}}).at(4, concurrency=2) is None
    assert StepTimes().at(1) is None


def test_a_smaller_step_is_never_thought_slower():
    """A table from noisy measurements is made to rise."""
    assert StepTimes({1: {1: 0.05, 2: 0.02, 4: 0.03}}).at(1) == 0.02


def test_reports_are_averaged_and_only_decode_counts():
    times = StepTimes()
    times.add([timing(2, 0.02), StepTiming(num_sequences=1, num_tokens=500, mean_s=9.0, count=1)])
    times.add([timing(2, 0.06), StepTiming(num_sequences=2, num_tokens=2, mean_s=9.0, count=0)])
    times.add([StepTiming(num_sequences=1, num_tokens=1, mean_s=9.0, count=1)])  # the probe: a cold step
    assert times.mean_s == {1: {2: pytest.approx(0.03)}}


def test_where_time_is_flat_one_step_is_best():
    """Decode bound by memory: each step reads all weights, so two half steps cost two whole ones."""
    assert choose_steps_in_flight(stages(FLAT), num_sequences=8) == 1
    assert choose_steps_in_flight(stages(FLAT, delay_s=0.1), num_sequences=8) == 1


def test_where_time_grows_with_the_sequences_every_machine_gets_a_step():
    assert choose_steps_in_flight(stages(LINEAR), num_sequences=8) == 2
    assert choose_steps_in_flight(stages(LINEAR, count=4), num_sequences=8) == 4
    assert choose_steps_in_flight(stages(LINEAR), num_sequences=1) == 1


def test_slow_links_are_filled_with_more_steps():
    """S (1 + l/t) steps: more are on their way where links are slow."""
    assert choose_steps_in_flight(stages(LINEAR, delay_s=0.02), num_sequences=8) > 2


def test_on_one_machine_measurements_under_two_steps_decide():
    """Stages that wait for memory slow each other down; stages that wait for the interpreter don't."""
    untried = stages(LINEAR, same_host=True)
    assert choose_steps_in_flight(untried, num_sequences=8) == 2
    slowed = stages(LINEAR, same_host=True, together={4: 0.08})
    assert choose_steps_in_flight(slowed, num_sequences=8) == 1
    unhindered = stages(LINEAR, same_host=True, together={4: 0.04})
    assert choose_steps_in_flight(unhindered, num_sequences=8) == 2


def test_reports_are_kept_by_concurrency():
    times = StepTimes()
    times.add([timing(4, 0.02), replace(timing(4, 0.05), concurrency=2)])
    assert times.at(4) == 0.02
    assert times.at(4, concurrency=2) == 0.05
    assert times.knows(4, concurrency=2)
    assert not times.knows(3, concurrency=2)


def test_without_measurements_one_step_is_in_flight():
    assert choose_steps_in_flight([], num_sequences=8) == 1
    half_known = [*stages(LINEAR, count=1), *stages({}, count=1)]
    assert choose_steps_in_flight(half_known, num_sequences=8) == 1
    assert tokens_per_second(half_known, num_sequences=8, num_steps=2) is None


def test_half_batches_are_tried_once():
    """Only whole batches were seen: two steps go out, their times come in, and the formula decides."""
    whole = stages({8: 0.08})
    assert choose_steps_in_flight(whole, num_sequences=8) == 2
    assert choose_steps_in_flight(stages({4: 0.08, 8: 0.08}), num_sequences=8) == 1
    assert choose_steps_in_flight(stages({4: 0.04, 8: 0.08}), num_sequences=8) == 2
    assert choose_steps_in_flight(stages({8: 0.08}, count=1), num_sequences=8) == 1


def test_times_of_zero_promise_nothing():
    assert choose_steps_in_flight(stages({1: 0.0}), num_sequences=8) == 1


@settings(deadline=None)  # the machine may be busy
@given(
    st.dictionaries(st.integers(1, 32), st.floats(1e-4, 1.0), min_size=1, max_size=5),
    st.integers(1, 4),
    st.floats(0.0, 0.5),
    st.booleans(),
    st.integers(1, 64),
)
def test_the_choice_is_never_slower_than_one_step(table, count, delay_s, same_host, num_sequences):
    table[1] = min(table.values())  # a half batch was seen
    paces = stages(table, count=count, delay_s=delay_s, same_host=same_host, together=table)
    chosen = choose_steps_in_flight(paces, num_sequences=num_sequences)
    assert 1 <= chosen <= min(num_sequences, MOST_STEPS)
    alone = tokens_per_second(paces, num_sequences=num_sequences, num_steps=1)
    assert tokens_per_second(paces, num_sequences=num_sequences, num_steps=chosen) >= alone
