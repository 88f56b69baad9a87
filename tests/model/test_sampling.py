"""A row's token depends on its logits, its parameters and its position alone."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shardwright.model.sampling import _draw as _draw_rows, sample, uniform


def _draw(row, params, u):
    return _draw_rows(row[None], [params], [u])[0]
from shardwright.types import SamplingParams

GREEDY = SamplingParams()


def random_logits(rows, vocabulary=40, seed=0):
    return 3 * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.5, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert [pick.token_id for pick in sample(logits, [GREEDY, GREEDY], [3, 9])] == [1, 0]


def test_logprob_is_of_the_unmodified_logits():
    """Neither temperature nor filters show in it."""
    logits = random_logits(2)
    params = [GREEDY, SamplingParams(temperature=0.3, top_k=2, top_p=0.5, seed=4)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, pick in enumerate(sample(logits, params, [5, 6])):
        assert math.isclose(pick.logprob, float(expected[row, pick.token_id]), abs_tol=1e-5)


def test_uniform_numbers_are_the_same_everywhere():
    """Pinned: a change would change the text of every seed."""
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(2**64 - 1, 4095)] == pytest.approx(
        [0.6524484863740322, 0.36818951565166946, 0.7012121095215252, 0.25890696956169235], abs=0
    )


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions():
    for numbers in ([uniform(7, p) for p in range(4000)], [uniform(s, 7) for s in range(4000)]):
        assert len(set(numbers)) == 4000
        counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), bins=20, min=0.0, max=1.0)
        chi_square = float(((counts - 200) ** 2 / 200).sum())
        assert chi_square < 44  # 0.1 % of fair draws exceed it at 19 degrees of freedom


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.7, top_p=0.8),
        SamplingParams(temperature=1.3, top_k=9, top_p=0.7),
    ],
)
def test_draws_follow_the_distribution_that_transformers_would_sample_from(params):
    """At evenly spread random numbers each token comes up as often as its probability says."""
    logits = random_logits(1)[0]
    warped = TemperatureLogitsWarper(params.temperature)(None, logits[None].double())
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(None, warped)
    if params.top_p < 1.0:
        warped = TopPLogitsWarper(params.top_p)(None, warped)
    expected = torch.softmax(warped[0], dim=-1)
    draws = [_draw(logits, params, (i + 0.5) / 2000) for i in range(2000)]
    drawn = torch.bincount(torch.tensor(draws), minlength=len(logits)).double() / 2000
    assert torch.allclose(drawn, expected, atol=1e-3)


def test_a_flat_distribution_keeps_more_tokens_than_are_sorted_first():
    """Top-p over a large vocabulary with no favourites."""
    logits = torch.zeros(5000)
    params = SamplingParams(temperature=1.0, top_p=0.8999)
    assert [_draw(logits, params, u) for u in (0.0, 0.5, 0.9999999)] == [0, 2250, 4499]


def test_top_k_keeps_the_lowest_ids_among_equals_at_its_border():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 5.0])
    params = SamplingParams(temperature=1.0, top_k=3)
    assert {_draw(logits, params, i / 1000) for i in range(1000)} == {4, 1, 2}


def test_a_very_low_temperature_is_greedy():
    logits = random_logits(8)
    params = [SamplingParams(temperature=1e-4, seed=s) for s in range(8)]
    assert [p.token_id for p in sample(logits, params, [1] * 8)] == logits.argmax(dim=-1).tolist()


def test_a_row_is_drawn_alike_whatever_stands_beside_it():
    logits = random_logits(6)
    params = [SamplingParams(temperature=1.5, top_p=0.95, seed=11 * row) if row % 2 else GREEDY for row in range(6)]
    positions = [row + 20 for row in range(6)]
    together = sample(logits, params, positions)
    alone = [sample(logits[r : r + 1], [params[r]], [positions[r]])[0] for r in range(6)]
    assert [p.token_id for p in together] == [p.token_id for p in alone]


def test_bfloat16_logits_are_compared_as_they_are():
    logits = random_logits(3).bfloat16()
    assert [p.token_id for p in sample(logits, [GREEDY] * 3, [0] * 3)] == logits.argmax(dim=-1).tolist()
