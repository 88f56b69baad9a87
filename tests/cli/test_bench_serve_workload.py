"""The workload follows from its settings and seed alone."""

import dataclasses
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cli.bench_workload import WORDS, Spread, Workload, plan_requests, warm_up_requests
from shardwright.errors import ConfigError

PLAIN = Workload(num_requests=20, input_tokens=Spread(mean=10, spread=4), output_tokens=Spread(mean=5), seed=3)
IDS = dataclasses.replace(PLAIN, token_range=(100, 200))


def test_the_same_seed_gives_the_same_requests_and_another_one_others():
    assert plan_requests(PLAIN) == plan_requests(PLAIN)
    assert plan_requests(PLAIN) != plan_requests(dataclasses.replace(PLAIN, seed=4))


def test_these_requests_are_those_of_every_machine():
    """Figures of two machines are comparable only when both were asked the same."""
    workload = dataclasses.replace(
        IDS, num_requests=2, rate=2.0, shared_prefix=2, input_tokens=Spread(mean=3, spread=1)
    )
    assert [(r.prompt, r.max_tokens, round(r.at_s, 6)) for r in plan_requests(workload)] == [
        ((184, 102, 197, 125, 157, 140), 5, 0.080806),
        ((184, 102, 139, 174), 5, 0.358161),
    ]


def test_a_longer_run_begins_with_the_requests_of_a_shorter():
    longer = dataclasses.replace(PLAIN, num_requests=30, rate=5.0)
    shorter = dataclasses.replace(longer, num_requests=20)
    assert plan_requests(longer)[:20] == plan_requests(shorter)


def test_lengths_keep_to_their_range_and_use_all_of_it():
    requests = plan_requests(dataclasses.replace(IDS, num_requests=300))
    assert {len(request.prompt) for request in requests} == set(range(6, 15))
    assert {request.max_tokens for request in requests} == {5}
    assert all(100 <= token < 200 for request in requests for token in request.prompt)
    assert [request.num_prompt_tokens for request in requests] == [len(request.prompt) for request in requests]


def test_prompts_for_chat_are_words_of_the_list():
    for request in plan_requests(PLAIN):
        words = request.prompt.split()
        assert set(words) <= set(WORDS)
        assert len(words) == request.num_prompt_tokens


def test_every_word_is_there_once():
    assert len(set(WORDS)) == len(WORDS) > 100


def test_shared_prefixes_come_before_a_prompts_own_part():
    requests = plan_requests(dataclasses.replace(IDS, num_requests=60, shared_prefix=8, num_prefixes=3))
    prefixes = {request.prompt[:8] for request in requests}
    assert len(prefixes) == 3
    own = [request.prompt[8:] for request in requests]
    assert len(set(own)) == 60
    assert all(6 <= len(part) <= 14 for part in own)


def test_the_warm_up_shares_no_beginning_with_what_is_measured():
    workload = dataclasses.replace(IDS, shared_prefix=8)
    [warm] = warm_up_requests(workload, 1)
    assert len(warm.prompt) == 18
    assert warm.prompt[:8] != plan_requests(workload)[0].prompt[:8]


def test_arrivals_are_a_poisson_process_of_the_rate():
    """Mean and standard deviation of the gaps are both one over the rate; without a rate there are none."""
    times = [request.at_s for request in plan_requests(dataclasses.replace(PLAIN, num_requests=4000, rate=8.0))]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.08)
    assert {request.at_s for request in plan_requests(PLAIN)} == {0.0}


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_spread_is_refused_where_it_would_give_no_tokens(mean, spread):
    text = f"{mean},{spread}"
    if mean - spread < 1:
        with pytest.raises(ConfigError, match="must be at least 1 everywhere"):
            Spread.parse(text, name="--x")
    else:
        assert Spread.parse(text, name="--x") == Spread(mean=mean, spread=spread)


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1.5", ",", "3,"])
def test_a_spread_that_is_none_is_told_with_an_example(text):
    with pytest.raises(ConfigError, match=r"--x is '.*'; give tokens as MEAN or MEAN,SPREAD, such as 128 or 128,32"):
        Spread.parse(text, name="--x")


def test_one_number_is_a_spread_of_nothing():
    assert Spread.parse("128", name="--x") == Spread(mean=128, spread=0)
