"""A pipeline's measurements, and the answers that the scheduler gets from them."""

import pytest
from conversation import assignment, piece, timing

from shardwright.core.pacing import MAX_GAP_RATIO, Pacing
from shardwright.core.step_budget import UNMEASURED_TOKENS, ContextCost
from shardwright.core.step_times import Mix
from shardwright.types import StepInput, StepTiming


def pipeline(*worker_ids: str, context: ContextCost | None = None) -> Pacing:
    stages = [
        assignment(index=index, of=len(worker_ids), worker_id=worker_id) for index, worker_id in enumerate(worker_ids)
    ]
    return Pacing(stages, context=context or ContextCost(), token_budget=512)


def step(number: int, *, sequences: int = 8, tokens: int = 0, steps_in_flight: int = 1) -> StepInput:
    """Decodes, the first of them with so many tokens more."""
    slices = [piece(seq_id, 0, (1,) * (1 + tokens * (seq_id == 0)), (0,)) for seq_id in range(sequences)]
    return StepInput(epoch=1, step=number, slices=tuple(slices), steps_in_flight=steps_in_flight)


def travel(pacing: Pacing, seconds: float, *, times: int = 3, first: int = 1, **shape: int) -> None:
    """Steps that go alone, one after the other."""
    for number in range(first, first + times):
        pacing.sent(step(number, **shape), 10.0 * number)
        pacing.back(number, 10.0 * number + seconds)


def test_measurements_change_the_choice():
    pacing = pipeline("a", "b")
    mix = Mix(num_decodes=8)
    assert pacing.steps_in_flight(mix) == 1
    for worker_id in ("a", "b"):
        pacing.heard(worker_id, [timing(4, 0.04), timing(8, 0.08)])
    pacing.heard("stranger", [timing(8, 9.0)])
    assert pacing.steps_in_flight(mix) == 2
    assert pacing.steps_in_flight(mix) == 2


def test_a_trip_beyond_the_stages_time_is_the_links_delay():
    pacing = pipeline("a", "b")
    travel(pacing, 0.26)
    pacing.heard("a", [timing(8, 0.1)])
    assert pacing.link_delay_s == 0
    pacing.heard("b", [timing(8, 0.1)])
    assert pacing.link_delay_s == pytest.approx(0.06 - 0.03 * 0.26)
    assert pacing.link_token_s == 0


def test_a_large_steps_trip_tells_what_a_link_takes_for_a_token():
    pacing = pipeline("a")
    travel(pacing, 0.2)
    travel(pacing, 1.2, first=4, sequences=1, tokens=499)
    pacing.heard(
        "a", [timing(1, 0.1), timing(8, 0.1), StepTiming(num_sequences=1, num_tokens=500, mean_s=0.5, count=9)]
    )
    assert pacing.link_delay_s == pytest.approx(0.1 - 0.006)
    assert pacing.link_token_s == pytest.approx((0.7 - 0.036 - 0.094) / 500)


def test_a_step_that_waits_behind_another_tells_nothing_of_links():
    pacing = pipeline("a")
    pacing.heard("a", [timing(8, 0.1)])
    for number in range(1, 10):
        pacing.sent(step(number), 0.0)
    for number in range(1, 10):
        pacing.back(number, 9.0)
    pacing.heard("a", [timing(8, 0.1)])
    assert pacing.link_delay_s == 0


def test_one_slow_trip_is_no_delay_and_a_small_rest_is_an_error():
    pacing = pipeline("a")
    travel(pacing, 0.101, times=4)
    travel(pacing, 5.0, times=1, first=9)
    pacing.heard("a", [timing(8, 0.1)])
    assert pacing.link_delay_s == 0


def test_prompts_may_take_a_whole_chunk_while_nothing_decodes_and_less_of_a_long_prefix():
    pacing = pipeline("a", context=ContextCost(((10**6, 0.001),)))
    budget = pacing.prompt_budget(num_decodes=0, num_steps=1, tokens=512)
    assert budget.grant(prefix=0, wanted=4000) == 512
    assert budget.grant(prefix=3000, wanted=4000) < 256
    beside = pacing.prompt_budget(num_decodes=3, num_steps=1, tokens=509)
    assert beside.grant(prefix=0, wanted=4000) <= UNMEASURED_TOKENS


def test_steps_in_flight_follow_what_waits():
    pacing = pipeline("a", "b")
    for worker_id in ("a", "b"):
        pacing.heard(
            worker_id, [timing(1, 0.1), timing(16, 0.1), StepTiming(num_sequences=1, num_tokens=513, mean_s=1, count=9)]
        )
    assert pacing.steps_in_flight(Mix(num_decodes=16)) == 1
    assert pacing.steps_in_flight(Mix(num_decodes=0, num_prompts=16, prompt_tokens=16 * 512)) == 2
    assert pacing.steps_in_flight(Mix(num_decodes=8, num_prompts=8, prompt_tokens=10**9)) == 2


def test_when_fewer_steps_are_to_be_in_flight_decodes_that_waited_for_it_go_without_a_chunk():
    pacing = pipeline("a")
    pacing.sent(step(1, steps_in_flight=2), 0.0)
    assert pacing.prompt_budget(num_decodes=8, num_steps=1, tokens=504).grant(prefix=0, wanted=100) == 0
    assert pacing.prompt_budget(num_decodes=8, num_steps=1, tokens=512).grant(prefix=0, wanted=100) > 0  # prompts alone
    pacing.sent(step(2), 0.1)
    assert pacing.prompt_budget(num_decodes=8, num_steps=1, tokens=504).grant(prefix=0, wanted=100) > 0


def beside_decodes() -> Pacing:
    """A stage of which steps of eight decodes were measured, alone and with a chunk."""
    pacing = pipeline("a")
    mixed = StepTiming(num_sequences=8, num_tokens=264, mean_s=0.356, count=9)
    pacing.heard("a", [timing(8, 0.1), mixed])
    return pacing


def granted(pacing: Pacing) -> int:
    """Tokens of a new prompt that a step with these decodes may take."""
    return pacing.prompt_budget(num_decodes=8, num_steps=1, tokens=504).grant(prefix=0, wanted=504)


def test_chunks_beside_decodes_become_smaller_while_these_wait_longer_than_promised():
    pacing = beside_decodes()
    allowed = granted(pacing)
    for number in (1, 2):
        pacing.sent(step(number, tokens=allowed), float(number))
        assert granted(pacing) == allowed
        pacing.back(number, number + 2 * MAX_GAP_RATIO * 0.1)
    assert granted(pacing) == pytest.approx(allowed / 2, abs=1)


def test_a_step_of_decodes_alone_or_of_prompts_alone_holds_no_chunk_back():
    pacing = beside_decodes()
    allowed = granted(pacing)
    for number in (1, 2, 3):
        pacing.sent(step(number), float(number))
        pacing.back(number, number + 0.9)
        pacing.sent(step(number + 10, sequences=1, tokens=100), number + 0.9)
        pacing.back(number + 10, number + 0.99)
        assert granted(pacing) == allowed
