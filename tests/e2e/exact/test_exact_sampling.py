"""Seeded sampling gives the same text whatever it is batched with and wherever the model is cut."""

from dataclasses import replace

import pytest
import torch
from live_sessions import Ask, ask_all
from tiny_models import prompt_of

from shardwright.model.sampling import sample
from shardwright.types import SamplingParams

WARM = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=11)
ASKS = (
    Ask(prompt=prompt_of(19, 90), max_new_tokens=14, sampling=WARM),
    Ask(prompt=prompt_of(6, 91), max_new_tokens=18, sampling=replace(WARM, seed=12)),
    Ask(prompt=prompt_of(11, 92), max_new_tokens=16, sampling=SamplingParams(temperature=1.1, seed=2**64 - 1)),
    Ask(prompt=prompt_of(3, 93), max_new_tokens=12, sampling=replace(WARM, top_k=0, seed=14)),
)
CROWD = (
    Ask(prompt=prompt_of(15, 94), max_new_tokens=9),
    Ask(prompt=prompt_of(4, 95), max_new_tokens=30, sampling=replace(WARM, seed=15), after=3),
)
CUTS = {
    "one stage": (1, {"steps_in_flight": 1}),
    "two stages, prompts in chunks": (2, {"token_budget": 5}),
    "three stages, blocks taken away": (3, {"token_budget": 9, "kv_tokens": 48, "steps_in_flight": 2}),
}


def sampled_answer(model, ask):
    """What the whole model gives alone: its logits of the whole text each time, without any cache."""
    tokens = list(ask.prompt)
    for _ in range(ask.max_new_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1:]
        tokens.append(sample(logits, [ask.sampling], [len(tokens)])[0].token_id)
    return tokens[len(ask.prompt) :]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
async def test_a_seeds_text_is_the_whole_models_alone_and_in_company(family, cut, make_whole, open_split):
    whole = make_whole(family)
    expected = [sampled_answer(whole.model, ask) for ask in ASKS]
    num_stages, settings = CUTS[cut]
    async with open_split(whole.folder, num_stages, **settings) as session:
        alone = [(await ask_all(session, [ask]))[0].tokens for ask in ASKS]
        company = await ask_all(session, [*CROWD, *ASKS])
        snapshot = session.engine.snapshot()
    assert alone == expected
    assert [reply.tokens for reply in company[len(CROWD) :]] == expected
    assert (snapshot.total_preemptions > 0) == ("kv_tokens" in settings)


async def test_other_seeds_give_other_texts_and_the_same_seed_the_same(make_whole, open_split):
    whole = make_whole("llama")
    ask = ASKS[0]
    asks = [replace(ask, sampling=replace(WARM, seed=seed)) for seed in (1, 2, 3, 4, 5, 1)]
    async with open_split(whole.folder, 2) as session:
        texts = [tuple(reply.tokens) for reply in await ask_all(session, asks)]
    assert len(set(texts)) == 5
    assert texts[5] == texts[0]
