"""A row's token depends on its logits, its parameters, its position and its sequence's memory alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from byte_vocabulary import END, VOCABULARY
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardwright.model import sampling
from shardwright.model.grammar import GrammarCompiler
from shardwright.model.sampler_state import SequenceState
from shardwright.model.sampling import sample, score, uniform
from shardwright.types import Grammar, GrammarKind, SamplingParams, SequenceSetup, TokenRules

GREEDY = SamplingParams()
STOPS = frozenset({2, 7})


def random_logits(rows, vocabulary=40, seed=0):
    return 3 * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed))


def draw(row, params, u):
    return sampling._draw(row[None], [params], [u])[0]


def remembered(prompt, output=(), *, vocabulary=40, counted=True, stops=STOPS, **rules):
    setup = SequenceSetup(
        num_prompt_tokens=len(prompt),
        tokens=(*prompt, *output),
        rules=TokenRules(**rules),
        stop_token_ids=stops,
    )
    return SequenceState(3, setup, vocabulary=vocabulary, counted=counted, matcher=None)


def changed(row, params, state):
    """The logits that a greedy choice is made among."""
    return sampling._changed(row[None].float(), [0], [params], [state])[0]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.5, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert [pick.token_id for pick in sample(logits, [GREEDY, GREEDY], [3, 9])] == [1, 0]


def test_logprob_is_of_the_unmodified_logits():
    """Neither temperature nor filters, penalties, biases show in it."""
    logits = random_logits(3)
    params = [GREEDY, SamplingParams(temperature=0.3, top_k=2, top_p=0.5, seed=4), SamplingParams(presence_penalty=2.0)]
    states = [None, None, remembered((1, 2), tuple(range(20)), logit_bias=((30, 100.0),))]
    expected = torch.log_softmax(logits.double(), dim=-1)
    picks = sample(logits, params, [5, 6, 22], states)
    for row, pick in enumerate(picks):
        assert math.isclose(pick.logprob, float(expected[row, pick.token_id]), abs_tol=1e-5)
    assert picks[2].token_id == 30


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


FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=5),
    SamplingParams(temperature=1.7, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=9, top_p=0.7),
    SamplingParams(temperature=0.8, min_p=0.05),
    SamplingParams(temperature=2.1, min_p=1.0),
    SamplingParams(temperature=1.4, top_p=0.9, min_p=0.2),
    SamplingParams(temperature=1.6, top_k=30, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=1.6, top_k=3000, min_p=0.001),
]


def warped_probabilities(row, params):
    """What `transformers` would sample from; its order of the warpers is ours."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(warpers(None, row[None].double())[0], dim=-1)


@pytest.mark.parametrize("params", FILTERS)
def test_draws_follow_the_distribution_that_transformers_would_sample_from(params):
    """At evenly spread random numbers each token comes up as often as its probability says."""
    logits = random_logits(1)[0]
    expected = warped_probabilities(logits, params)
    draws = [draw(logits, params, (i + 0.5) / 2000) for i in range(2000)]
    drawn = torch.bincount(torch.tensor(draws), minlength=len(logits)).double() / 2000
    assert torch.allclose(drawn, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 1025, 30_000])
@pytest.mark.parametrize("params", FILTERS)
def test_what_is_kept_of_any_vocabulary_is_what_transformers_keeps(params, vocabulary, dtype):
    """A draw lies in the cumulated distribution where the random number does: over ids, or by falling probability."""
    row = random_logits(1, vocabulary, seed=vocabulary)[0].to(dtype).float()
    expected = warped_probabilities(row, params)
    if params.top_k and dtype == torch.bfloat16:
        # Where equal logits meet the border of top-k, `transformers` keeps all of them, we keep k.
        ids = row.sort(descending=True, stable=True).indices[: params.top_k]
        cut = torch.full_like(row, -torch.inf).scatter(0, ids, row[ids])
        expected = warped_probabilities(cut, replace(params, top_k=0))
    plain = not params.top_k and params.top_p == 1.0 and not params.min_p
    order = torch.arange(vocabulary) if plain else row.sort(descending=True, stable=True).indices
    cumulated = torch.cumsum(expected[order], dim=0)
    places = {int(token): place for place, token in enumerate(order)}
    # Equal ones at the border of top-p or min-p make up this much at most.
    slack = 1e-5 + (float(expected.max()) if dtype == torch.bfloat16 and params.top_p < 1.0 else 0.0)
    for u in (0.0, 1e-9, 0.1, 0.37, 0.5, 0.83, 0.99, 0.999999, 1 - 2**-53):
        place = places[draw(row, params, u)]
        assert float(cumulated[place]) >= u - slack
        assert (float(cumulated[place - 1]) if place else 0.0) <= u + slack


def test_a_flat_distribution_keeps_more_tokens_than_are_sorted_first():
    """Top-p over a large vocabulary with no favourites."""
    params = SamplingParams(temperature=1.0, top_p=0.8999)
    assert [draw(torch.zeros(5000), params, u) for u in (0.0, 0.5, 0.9999999)] == [0, 2250, 4499]
    assert [draw(torch.zeros(50000), params, u) for u in (0.0, 0.5, 0.9999999)] == [0, 22497, 44994]
    slope = torch.linspace(0, -4, 50000)  # without ties: first the 1,024 largest are looked at, then 16,384, then all
    probabilities = torch.softmax(slope.double(), dim=-1)
    for top_p, most in ((0.02, 1024), (0.6, 16384), (0.97, 50000)):
        kept = int((torch.cumsum(probabilities, 0) < top_p).sum()) + 1
        assert kept <= most
        assert draw(slope, SamplingParams(temperature=1.0, top_p=top_p), 1 - 2**-53) in range(kept - 2, kept + 1)


def test_top_k_keeps_the_lowest_ids_among_equals_at_its_border():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 5.0])
    params = SamplingParams(temperature=1.0, top_k=3)
    assert {draw(logits, params, i / 1000) for i in range(1000)} == {4, 1, 2}
    many = torch.zeros(4000)
    assert {draw(many, replace(params, top_k=1100), i / 5000) for i in range(5000)} == set(range(1100))


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300])
def test_a_very_low_temperature_is_greedy(temperature):
    logits = random_logits(8)
    for more in ({}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}):
        params = [SamplingParams(temperature=temperature, seed=s, **more) for s in range(8)]
        assert [p.token_id for p in sample(logits, params, [1] * 8)] == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("vocabulary", [40, 2000])
def test_the_repetition_penalty_is_that_of_transformers(vocabulary):
    choose = np.random.default_rng(vocabulary)
    for seed, penalty in enumerate((0.5, 1.1, 1.8, 100.0)):
        row = random_logits(1, vocabulary, seed)[0]
        prompt = choose.integers(vocabulary, size=30).tolist()
        output = choose.integers(vocabulary, size=10 * seed).tolist()
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), row[None].clone())[0]
        params = SamplingParams(repetition_penalty=penalty)
        assert torch.equal(changed(row, params, remembered(prompt, output, vocabulary=vocabulary)), expected)


def test_presence_and_frequency_penalties_count_the_output_alone():
    """OpenAI's formula: mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    row = random_logits(1)[0]
    state = remembered((1, 2, 3, 3), (3, 4, 4, 39, 4))
    params = SamplingParams(presence_penalty=0.75, frequency_penalty=-1.5)
    expected = row.clone()
    for token, count in ((3, 1), (4, 3), (39, 1)):
        expected[token] -= 0.75 - 1.5 * count
    assert torch.allclose(changed(row, params, state), expected, atol=1e-6)
    state.add(39)
    expected[39] += 1.5
    assert torch.allclose(changed(row, params, state), expected, atol=1e-6)


def test_no_stop_token_comes_before_the_least_length():
    row = random_logits(1)[0]
    prompt, output = [5, 6, 7], []
    state = remembered(prompt, stops=frozenset({2, 7, 999}), min_new_tokens=3, counted=False)
    processor = MinNewTokensLengthLogitsProcessor(3, 3, sorted(STOPS))
    for token in (9, 9, 9, 9):
        expected = processor(torch.tensor([prompt + output]), row[None])[0]
        assert torch.equal(changed(row, GREEDY, state), expected)
        output.append(token)
        state.add(token)


def test_biases_are_added_before_penalties():
    """As all of `transformers`' processors would do it, one after the other."""
    row = random_logits(1)[0]
    biases = ((3, -100.0), (4, 7.5), (5, 100.0))
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5)
    state = remembered((3, 6), (4, 8), logit_bias=biases, min_new_tokens=3)
    expected = row.clone()
    for token, bias in biases:
        expected[token] += bias
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 6, 4, 8]]), expected[None])[0]
    expected[[4, 8]] -= 0.5
    expected[[2, 7]] = -torch.inf
    assert torch.allclose(changed(row, params, state), expected, atol=1e-6)


def test_the_likeliest_tokens_are_those_of_the_unmodified_logits_in_order():
    logits = random_logits(4, 300).bfloat16().float()  # many are equal
    logits[3] = 0.0
    params = [SamplingParams(num_top_logprobs=n, temperature=t) for n, t in ((5, 0.0), (0, 0.0), (20, 2.0), (7, 0.0))]
    states = [remembered((1,), vocabulary=300, logit_bias=((9, 100.0),)), None, None, None]
    expected = torch.log_softmax(logits.double(), dim=-1)
    picks = sample(logits, params, [4] * 4, states)
    for row, (pick, p) in enumerate(zip(picks, params, strict=True)):
        ids = expected[row].sort(descending=True, stable=True).indices[: p.num_top_logprobs].tolist()
        assert [token for token, _ in pick.top] == ids
        assert [logprob for _, logprob in pick.top] == pytest.approx(expected[row, ids].tolist(), abs=1e-5)
    assert picks[0].token_id == 9
    assert [token for token, _ in picks[3].top] == list(range(7))
    assert len(sample(random_logits(1, 4), [SamplingParams(num_top_logprobs=20)], [1])[0].top) == 4


def test_scores_are_the_log_probabilities_of_given_tokens():
    logits = random_logits(70, 50)  # more than are scored at once
    tokens = [row % 50 for row in range(70)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    scores = score(logits, tokens, [2] * 70)
    assert [s.token_id for s in scores] == tokens
    assert [s.logprob for s in scores] == pytest.approx([float(expected[r, t]) for r, t in enumerate(tokens)], abs=1e-5)
    assert [s.top[0][0] for s in scores] == logits.argmax(dim=-1).tolist()


def mixed_batch(vocabulary):
    """All kinds of rows beside each other, in a seeded disorder."""
    choose = np.random.default_rng(vocabulary)

    def one_of(*options):
        return options[int(choose.integers(len(options)))]

    rows = []
    for seed in range(36):
        params = SamplingParams(
            temperature=one_of(0.0, 0.7, 1.5, 4.0),
            top_k=one_of(0, 0, 1, 20, 1100),
            top_p=one_of(1.0, 0.9, 0.5),
            min_p=one_of(0.0, 0.0, 0.02),
            repetition_penalty=one_of(1.0, 1.3),
            frequency_penalty=one_of(0.0, 0.5),
            num_top_logprobs=one_of(0, 3),
            seed=seed,
        )
        prompt = choose.integers(vocabulary, size=9).tolist()
        output = choose.integers(vocabulary, size=choose.integers(5)).tolist()
        rules = one_of({}, {"logit_bias": ((1, 4.0), (vocabulary - 1, 9.0))}, {"min_new_tokens": 3})
        needed = params.has_penalties or rules
        state = remembered(prompt, output, vocabulary=vocabulary, counted=params.has_penalties, **rules)
        rows.append((params, 10 + seed, state if needed else None))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [40, 3000, 20_011])
def test_a_row_is_drawn_alike_whatever_stands_beside_it(vocabulary, dtype):
    logits = random_logits(36, vocabulary).to(dtype)
    params, positions, states = zip(*mixed_batch(vocabulary), strict=True)
    together = sample(logits, params, positions, states)
    alone = [sample(logits[r : r + 1], [params[r]], [positions[r]], [states[r]])[0] for r in range(36)]
    assert [p.token_id for p in together] == [p.token_id for p in alone]
    assert [[t for t, _ in p.top] for p in together] == [[t for t, _ in p.top] for p in alone]
    swapped = sample(logits.flip(0), params[::-1], positions[::-1], states[::-1])[::-1]
    assert [p.token_id for p in swapped] == [p.token_id for p in alone]
    pairs = [sample(logits[r : r + 2], params[r : r + 2], positions[r : r + 2]) for r in range(0, 36, 2)]
    bare = sample(logits, params, positions)
    assert [p.token_id for pair in pairs for p in pair] == [p.token_id for p in bare]
    assert [p.token_id for p in bare] != [p.token_id for p in together]


def test_logits_are_left_as_they_were():
    logits = random_logits(6)
    before = logits.clone()
    params = [SamplingParams(temperature=t, repetition_penalty=1.5) for t in (0.0, 1.0) * 3]
    states = [remembered((1, 2), (3,), logit_bias=((4, 5.0),), min_new_tokens=9) for _ in range(6)]
    sample(logits, params, [3] * 6, states)
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_compared_as_they_are():
    logits = random_logits(3).bfloat16()
    assert [p.token_id for p in sample(logits, [GREEDY] * 3, [0] * 3)] == logits.argmax(dim=-1).tolist()


def test_a_sequence_whose_logits_are_no_numbers_harms_no_other():
    """Its own token is any one of the vocabulary."""
    logits = random_logits(8, 1200)
    params = [SamplingParams(temperature=1.0, seed=r, **FILTER) for FILTER in ({}, {"top_k": 9}) for r in range(2)]
    params += [SamplingParams(temperature=1.0, top_p=0.5), SamplingParams(temperature=1.0, min_p=0.5)]
    params += [GREEDY, SamplingParams(num_top_logprobs=4, temperature=0.5, top_k=1190)]
    expected = [p.token_id for p in sample(logits, params, [7] * 8)]
    for row in range(8):
        broken = logits.clone()
        broken[row] = torch.nan
        tokens = [p.token_id for p in sample(broken, params, [7] * 8)]
        assert 0 <= tokens[row] < 1200
        assert tokens[:row] + tokens[row + 1 :] == expected[:row] + expected[row + 1 :]


def test_a_token_without_a_chance_is_never_drawn_at_the_ends_of_the_unit_interval():
    row = torch.full((5000,), -torch.inf)
    row[[70, 3100]] = torch.tensor([0.0, 1.0])
    for more in ({}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1e-9}, {"top_k": 2000}):
        params = SamplingParams(temperature=0.9, **more)
        drawn = {draw(row, params, u) for u in (0.0, 5e-324, 1e-12, *np.linspace(0, 1, 50, endpoint=False), 1 - 2**-53)}
        assert drawn == {70, 3100}


def test_sets_of_tokens_are_spread_alike_on_all_devices():
    """With numpy on a CPU, by shifts elsewhere; a head's rows beyond the tokenizer's are in no set."""
    bits = np.random.default_rng(2).integers(2**32, size=(3, 5), dtype=np.uint32)
    bits[0, :2] = (0, 2**32 - 1)
    expected = torch.tensor([[bool(int(word) >> i & 1) for word in row for i in range(32)] for row in bits])
    assert torch.equal(sampling._shift_out(torch.from_numpy(bits.view(np.int32))), expected)
    for vocabulary in (129, 160, 200):
        allowed = sampling._spread(bits, torch.zeros(3, vocabulary))
        assert torch.equal(allowed[:, :160], expected[:, :vocabulary])
        assert not allowed[:, 160:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [40, 3000, 20_011])
def test_a_gpu_picks_what_a_cpu_picks(vocabulary):
    compiler = GrammarCompiler(VOCABULARY)
    logits = random_logits(37, vocabulary)
    params, positions, states = map(list, zip(*mixed_batch(vocabulary), strict=True))
    if vocabulary > len(VOCABULARY.tokens):
        rules = TokenRules(grammar=Grammar(kind=GrammarKind.JSON_OBJECT))
        setup = SequenceSetup(num_prompt_tokens=1, tokens=(1,), rules=rules, stop_token_ids=frozenset({END}))
        matcher = compiler.matcher(rules.grammar, {END})
        states.append(SequenceState(1, setup, vocabulary=vocabulary, counted=False, matcher=matcher))
    else:
        states.append(None)
    params.append(GREEDY)
    positions.append(2)
    expected = sample(logits, params, positions, states)
    found = sample(logits.cuda(), params, positions, states)
    assert [p.token_id for p in found] == [p.token_id for p in expected]
    assert [[t for t, _ in p.top] for p in found] == [[t for t, _ in p.top] for p in expected]
    assert [p.logprob for p in found] == pytest.approx([p.logprob for p in expected], abs=1e-4)
    assert score(logits.cuda(), [1] * 37, [2] * 37)[5].top[0][0] == int(logits[5].argmax())


@pytest.mark.parametrize("spread", [1.0, 40.0, 3000.0])
def test_log_probabilities_are_right_however_far_apart_the_logits_are(spread):
    logits = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(5)) * spread
    expected = logits.double().log_softmax(dim=-1)
    for row, pick in enumerate(sample(logits, [SamplingParams()] * 3, [0] * 3)):
        assert pick.token_id == int(logits[row].argmax())
        assert pick.logprob == pytest.approx(float(expected[row, pick.token_id]), abs=1e-5)
