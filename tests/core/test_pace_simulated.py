"""The formulas against a pipeline that is simulated step by step."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timed_line import Run, TrueStage

from shardwright.core.step_budget import ChunkRamp, chunk_limit, decode_gap_s
from shardwright.core.step_times import Mix, choose_steps_in_flight, cycle_s, split

LONGEST_GAP = 2.5
PROMISED_GAP = 3.0


def milliseconds(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda value: value / 1000)


STAGES = st.lists(
    st.builds(
        TrueStage,
        base_s=milliseconds(1, 50),
        sequence_s=milliseconds(0, 10),
        token_s=milliseconds(0.02, 2),
        delay_s=milliseconds(0, 40),
        link_token_s=milliseconds(0, 0.5),
    ),
    min_size=1,
    max_size=4,
)


def choose(paces, mix: Mix) -> int:
    return choose_steps_in_flight(paces, mix, chunk_tokens=lambda _: 512)


@settings(deadline=None, max_examples=60)
@given(STAGES, st.integers(1, 24))
def test_the_chosen_steps_in_flight_are_within_five_percent_of_the_best(line, num_sequences):
    paces = [stage.measured() for stage in line]
    chosen = choose(paces, Mix(num_decodes=num_sequences))
    rates = {
        steps: Run(stages=line, num_sequences=num_sequences, num_steps=steps).tokens_per_second()
        for steps in range(1, num_sequences + 1)
    }
    assert rates[chosen] >= 0.95 * max(rates.values()), f"{chosen} of {rates}"


# Steps without a chunk turn up in other places of each round.
_STAGGERED = [TrueStage(base_s=0.004, sequence_s=0.006, link_token_s=0.0002), TrueStage(base_s=0.005, token_s=0.0005)]


@settings(deadline=None, max_examples=60)
@given(STAGES, st.integers(1, 32), st.integers(1, 3), st.lists(st.booleans(), min_size=1, max_size=7))
@example(_STAGGERED, 24, 1, [True, True, False, True])
def test_a_decodes_gap_under_a_burst_of_prompts_stays_below_the_promise(line, num_sequences, split_up, turns):
    """Also while it begins, whichever steps carry the chunks, and when the steps are split up for it.

    Not when they become other groups, say two steps three: somebody misses a turn then, once.
    """
    paces = [stage.measured() for stage in line]
    before = choose(paces, Mix(num_decodes=num_sequences))
    gap_s = decode_gap_s(paces, num_decodes=num_sequences)
    under = before * split_up
    limit = chunk_limit(
        paces, num_decodes=num_sequences, num_steps=under, most_tokens=512, most_gap_s=LONGEST_GAP * gap_s
    )
    run = Run(stages=line, num_sequences=num_sequences, num_steps=before)
    run.advance(10 * before)
    quiet = max(run.gaps[-num_sequences * 3 :])
    has_chunk = itertools.cycle(turns)
    ramp = ChunkRamp()

    def chunk() -> float:
        tokens = ramp.allowed(limit, num_steps=under) if next(has_chunk) else 0.0
        ramp.sent(num_steps=under, prompt_tokens=tokens)
        return tokens

    run.num_steps, run.chunk, run.gaps = under, chunk, []
    run.advance(30 * under)
    if limit.at_once:  # else prompts advance all the same
        assert max(run.gaps) <= PROMISED_GAP * max(gap_s, quiet)


@settings(deadline=None, max_examples=60)
@given(STAGES, st.integers(1, 32), st.integers(1, 32))
def test_a_cycle_by_the_formula_is_the_simulated_one(line, num_sequences, share):
    num_steps = -(-num_sequences // share)
    expected = cycle_s(
        [stage.measured() for stage in line],
        split(Mix(num_decodes=num_sequences), num_steps=num_steps, chunk_tokens=0),
    )
    rate = Run(stages=line, num_sequences=num_sequences, num_steps=num_steps).tokens_per_second()
    assert num_sequences / rate == pytest.approx(expected, rel=0.1)


def test_a_slow_link_costs_little_throughput_with_enough_sequences():
    """20 ms one way between two stages whose time grows with the sequences: 0.9 of the throughput without it."""
    stages = [TrueStage(base_s=0.02, sequence_s=0.02, delay_s=delay_s) for delay_s in (0.0, 0.02)]
    near = [TrueStage(base_s=0.02, sequence_s=0.02)] * 2
    rates = []
    for line in (stages, near):
        chosen = choose([stage.measured() for stage in line], Mix(num_decodes=16))
        rates.append(Run(stages=line, num_sequences=16, num_steps=chosen).tokens_per_second())
    assert rates[0] >= 0.9 * rates[1]


def test_prompts_use_both_stages():
    """16 prompts of 512 tokens: nearly twice as fast as one step at a time, though decodes alone would go in one."""
    line = [TrueStage(base_s=0.05, token_s=0.005)] * 2
    paces = [stage.measured() for stage in line]
    assert choose(paces, Mix(num_decodes=16)) == 1
    chosen = choose(paces, Mix(num_decodes=0, num_prompts=16, prompt_tokens=16 * 512))
    seconds = []
    for steps in (1, chosen):
        run = Run(stages=line, num_sequences=16, num_steps=steps, chunk=lambda: 512)
        run.advance(64)
        seconds.append(run.now)
    assert seconds[1] * 1.9 < seconds[0]


def test_beside_decodes_prompts_get_on_faster_in_more_steps():
    """A chunk in each step in flight: what a gap has room for is used in every stage at once."""
    line = [TrueStage(base_s=0.1, token_s=0.001)] * 2
    paces = [stage.measured() for stage in line]
    gap_s = decode_gap_s(paces, num_decodes=8)

    def limit(num_steps: int) -> float:
        return chunk_limit(
            paces, num_decodes=8, num_steps=num_steps, most_tokens=512, most_gap_s=LONGEST_GAP * gap_s
        ).evenly

    chosen = choose_steps_in_flight(paces, Mix(num_decodes=8, num_prompts=8, prompt_tokens=4096), chunk_tokens=limit)
    assert chosen == 2
    speeds = []
    for steps in (1, chosen):
        run = Run(stages=line, num_sequences=8, num_steps=steps, chunk=itertools.repeat(limit(steps)).__next__)
        run.advance(50 * steps)
        speeds.append((len(run.gaps) / run.now, run.prompt_tokens / run.now))
    assert speeds[1][0] > 0.95 * speeds[0][0]
    assert speeds[1][1] > 1.8 * speeds[0][1]
