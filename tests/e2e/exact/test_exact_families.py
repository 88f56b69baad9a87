"""Every family, cut anywhere and batched anyhow, gives the greedy tokens of the whole model, in float32.

All goes through the real core, codec, weight sending and workers; only the network is in memory.
"""

import pytest
from live_sessions import Ask, ask_all
from tiny_models import FAMILIES, greedy_answer, prompt_of

ASKS = (
    Ask(prompt=prompt_of(23, 1), max_new_tokens=12),
    Ask(prompt=prompt_of(1, 2), max_new_tokens=17),
    Ask(prompt=prompt_of(9, 3), max_new_tokens=5),
    Ask(prompt=prompt_of(14, 4), max_new_tokens=8, after=6),
    Ask(prompt=prompt_of(4, 5), max_new_tokens=9, after=12),
    Ask(prompt=prompt_of(6, 6), max_new_tokens=3, after=30),
)
"""Unlike lengths; half of them join while others are under way, and each leaves at another moment."""

TIGHT = 48  # KV positions: less than what runs at once would like to have
CUTS = {
    1: {"token_budget": 7, "kv_tokens": TIGHT},
    2: {"token_budget": 7, "steps_in_flight": 2},
    3: {"token_budget": 5, "steps_in_flight": 3, "kv_tokens": TIGHT},
    5: {"token_budget": 11, "block_size": 3},
}
"""Stages, and settings under which prompts are cut in chunks, steps overlap, and blocks are taken away."""


def whole_answers(model):
    return [greedy_answer(model, ask.prompt, ask.max_new_tokens) for ask in ASKS]


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_are_the_whole_models_for_1_2_3_and_5_stages(family, make_whole, open_split):
    whole = make_whole(family)
    expected = whole_answers(whole.model)
    assert len({token for answer in expected for token in answer}) > 15, "answers that say something"
    for num_stages, settings in CUTS.items():
        async with open_split(whole.folder, num_stages, **settings) as session:
            replies = await ask_all(session, ASKS)
            assert [reply.tokens for reply in replies] == expected, f"{num_stages} stages"
            snapshot = session.engine.snapshot()
        assert snapshot.num_free_blocks == snapshot.num_blocks
        if settings.get("kv_tokens") == TIGHT:
            assert snapshot.total_preemptions > 0, f"{num_stages} stages"


@pytest.mark.parametrize("family", FAMILIES)
async def test_embedding_and_head_may_be_one_or_two_in_every_family(family, make_whole, open_split):
    """The other way round than in the test above."""
    tied = FAMILIES[family].get("tie_word_embeddings", False)
    whole = make_whole(family, tie_word_embeddings=not tied)
    async with open_split(whole.folder, 2, token_budget=9) as session:
        replies = await ask_all(session, ASKS)
    assert [reply.tokens for reply in replies] == whole_answers(whole.model)
