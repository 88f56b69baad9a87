"""How many prompt tokens a step may take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.core.step_budget import (
    LEAST_TOKENS,
    UNMEASURED_TOKENS,
    ChunkLimit,
    ChunkRamp,
    ContextCost,
    GapWatch,
    PromptBudget,
    chunk_limit,
    decode_gap_s,
)
from shardwright.core.step_times import StagePace, StepTimes
from shardwright.types import StepTiming

WIDE = ContextCost(((4096, 0.001),))


def pace(*, decode_s: float = 0.1, token_s: float = 0.001, tokens: int = 512, link_token_s: float = 0.0) -> StagePace:
    times = StepTimes()
    times.add([StepTiming(num_sequences=size, num_tokens=size, mean_s=decode_s, count=9) for size in (1, 32)])
    if tokens:
        mean_s = decode_s + token_s * tokens
        times.add([StepTiming(num_sequences=1, num_tokens=1 + tokens, mean_s=mean_s, count=9)])
    return StagePace(num_sharing=1, times=times, link_token_s=link_token_s)


def limits(stages, *, decodes: int = 8, steps: int = 1, most: float = 512) -> ChunkLimit:
    gap_s = decode_gap_s(stages, num_decodes=decodes)
    most_gap_s = None if gap_s is None else 2.5 * gap_s
    return chunk_limit(stages, num_decodes=decodes, num_steps=steps, most_tokens=most, most_gap_s=most_gap_s)


def limit(stages, **options: float) -> float:
    return limits(stages, **options).evenly


# --- context ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 0.1)), max_size=3), st.integers(0, 200), st.integers(0, 500)
)
def test_effective_tokens_are_the_sum_over_tokens_of_what_each_attends_to(terms, num_tokens, prefix):
    context = ContextCost(tuple(terms))
    one_by_one = sum(
        1 + sum(cost * min(position + 1, window) for window, cost in terms)
        for position in range(prefix, prefix + num_tokens)
    )
    assert context.effective(num_tokens, prefix=prefix) == pytest.approx(one_by_one)


@given(st.integers(0, 600), st.integers(0, 5000), st.floats(0, 2000))
def test_the_most_tokens_are_those_that_still_fit(at_most, prefix, effective):
    count = WIDE.most_tokens(effective, prefix=prefix, at_most=at_most)
    assert 0 <= count <= at_most
    assert WIDE.effective(count, prefix=prefix) <= effective
    assert count == at_most or WIDE.effective(count + 1, prefix=prefix) > effective


def test_chunks_shrink_as_the_prefix_grows_and_their_cost_stays():
    whole = WIDE.effective(512, prefix=0)
    chunks = [WIDE.most_tokens(whole, prefix=prefix, at_most=512) for prefix in (0, 512, 1024, 2048)]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] == 512
    assert chunks[-1] < 300
    costs = [WIDE.effective(count, prefix=p) for count, p in zip(chunks, (0, 512, 1024, 2048), strict=True)]
    assert costs == pytest.approx([whole] * 4, rel=0.01)


# --- one step --------------------------------------------------------------------------------------


def test_a_step_takes_prompts_until_its_allowance_is_used():
    budget = PromptBudget(ContextCost(), effective=100, tokens=500)
    assert budget.grant(prefix=0, wanted=60) == 60
    budget.spend(prefix=0, count=60)
    assert budget.grant(prefix=0, wanted=60) == 40
    budget.spend(prefix=0, count=40 - (LEAST_TOKENS - 1))
    assert budget.grant(prefix=0, wanted=60) == 0  # what is left would be a crumb
    assert budget.grant(prefix=0, wanted=LEAST_TOKENS - 1) == LEAST_TOKENS - 1


def test_the_first_prompt_advances_whatever_it_costs():
    budget = PromptBudget(WIDE, effective=LEAST_TOKENS, tokens=500)
    assert budget.grant(prefix=4000, wanted=900) == LEAST_TOKENS
    budget.spend(prefix=4000, count=LEAST_TOKENS)
    assert budget.grant(prefix=0, wanted=900) == 0


def test_the_steps_token_budget_is_never_passed():
    budget = PromptBudget(ContextCost(), effective=1000, tokens=10)
    assert budget.grant(prefix=0, wanted=60) == 10
    budget.spend(prefix=0, count=10)
    assert budget.grant(prefix=0, wanted=60) == 0


# --- beside decodes --------------------------------------------------------------------------------


def test_while_nothing_decodes_a_whole_chunk_is_taken():
    assert limit([pace()], decodes=0) == 512
    assert limit([pace(tokens=0)], decodes=0) == 512


def test_before_prompts_were_measured_beside_decodes_few_tokens_are_taken():
    assert limit([pace(), pace(tokens=0)]) == UNMEASURED_TOKENS
    assert limit([pace(tokens=0)], most=20) == 20
    assert limit([]) == UNMEASURED_TOKENS


def test_a_steps_trip_stays_below_the_ratio():
    """0.2 s without prompts may become 0.5 s: 150 tokens of 1 ms at each of two stages.

    The prompt's first token is one more sequence in the step, and that costs nothing here.
    """
    assert limit([pace(), pace()]) == pytest.approx(151, abs=1)


def test_steps_in_flight_share_what_a_gap_has_room_for():
    """Two stages: twice (100 ms and the chunk) in 0.5 s, and at first once more, behind the other step."""
    found = limits([pace(), pace()], steps=2)
    assert found.evenly == pytest.approx(151, abs=1)
    assert found.at_once == pytest.approx(67, abs=1)


RAMP_LIMIT = ChunkLimit(at_once=64, evenly=110)


def take_in_turn(ramp, are_bare):
    """What two steps in flight take in turn, those apart that have no chunk."""
    taken = []
    for is_bare in are_bare:
        taken.append(0 if is_bare else ramp.allowed(RAMP_LIMIT, num_steps=2))
        ramp.sent(num_steps=2, prompt_tokens=taken[-1])
    return taken


def test_chunks_grow_round_by_round_from_what_is_safe_at_once():
    ramp = ChunkRamp()
    assert take_in_turn(ramp, [False] * 8) == [64, 64, 80, 80, 100, 100, 110, 110]
    assert ramp.allowed(RAMP_LIMIT, num_steps=3) == 64
    assert ramp.is_fewer(1)
    assert not ramp.is_fewer(2)


def test_a_step_without_a_chunk_lets_those_of_the_next_round_begin_anew():
    are_bare = [False, False, False, True, False, False, False]
    assert take_in_turn(ChunkRamp(), are_bare) == [64, 64, 80, 0, 64, 64, 80]


def test_a_chunks_time_on_a_link_counts():
    assert limit([pace(), pace(link_token_s=0.001)]) == pytest.approx(104, abs=1)


def test_where_nothing_fits_the_limit_says_so_and_prompts_advance_all_the_same():
    assert limits([pace(token_s=1.0)]) == ChunkLimit(0, 0)
    assert PromptBudget(ContextCost(), effective=0, tokens=500).grant(prefix=0, wanted=900) == LEAST_TOKENS


def test_chunks_grow_by_no_more_than_twice_what_was_measured():
    assert limit([pace(token_s=0.0, tokens=64)]) == 128
    assert limit([pace(token_s=0.0, tokens=8)]) == UNMEASURED_TOKENS
    assert limit([pace(token_s=0.0)]) == 512


def test_the_gap_without_prompts_is_that_of_the_best_number_of_steps():
    assert decode_gap_s([pace(), pace()], num_decodes=8) == pytest.approx(0.2)
    assert decode_gap_s([pace(), StagePace(num_sharing=1, times=StepTimes())], num_decodes=8) is None


# --- gaps that are longer than promised --------------------------------------------------------------


def share_after(*gaps_s: float, num_steps: int = 1) -> list[float]:
    """What chunks may have of their limit behind each of these gaps, where 0.2 s were promised."""
    watch = GapWatch()
    shares = []
    for gap_s in gaps_s:
        watch.took(gap_s, most_s=0.2, num_steps=num_steps)
        shares.append(watch.share)
    return shares


def test_gaps_that_keep_the_promise_hold_nothing_back():
    assert share_after(0.1, 0.19, 0.2, 0.1) == [1.0] * 4


def test_one_long_gap_is_passed_over_and_two_hold_chunks_back_by_the_shorter_one():
    assert share_after(0.4, 0.1, 0.4, 0.1) == [1.0] * 4
    assert share_after(0.8, 0.4) == pytest.approx([1.0, 0.5])


def test_chunks_grow_again_where_gaps_are_clearly_shorter_than_promised():
    assert share_after(0.4, 0.4, 0.199, 0.1, 0.1) == pytest.approx([1.0, 0.5, 0.5, 0.55, 0.605])
    assert share_after(0.4, 0.4, *[0.1] * 20)[-1] == 1.0


def test_steps_that_were_sent_before_are_not_held_against_the_smaller_chunks():
    assert share_after(0.4, 0.4, 0.4, 0.4, num_steps=2) == pytest.approx([1.0, 0.5, 0.5, 0.25])


def test_where_decodes_take_no_time_no_gap_is_too_long():
    watch = GapWatch()
    for _ in range(2):
        watch.took(0.4, most_s=0.0, num_steps=1)
    assert watch.share == 1.0


def test_chunks_are_never_held_back_altogether():
    assert share_after(*[9.0] * 9)[-1] == 0.125
    watch = GapWatch()
    assert watch.held_back(ChunkLimit(100, 200)) == ChunkLimit(100, 200)
    for _ in range(2):
        watch.took(0.4, most_s=0.2, num_steps=1)
    assert watch.held_back(ChunkLimit(100, 200)) == ChunkLimit(50, 100)
