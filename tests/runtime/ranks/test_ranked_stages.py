"""Stages that two ranks compute together give the whole model's tokens."""

from __future__ import annotations

import pytest
import split_models as lab
import torch
from ranked_models import RankedModel
from tiny_models import prompt_of

from shardwright.errors import UnsupportedModelError
from shardwright.types import SequenceSlice


@pytest.mark.parametrize("family", ["gemma", "llama", "qwen3", "mistral", "phi3", "olmo2"])
def test_two_ranks_of_two_stages_give_the_whole_models_tokens(ranks, make_whole, family):
    """Ragged batches, prompts in chunks, scattered blocks."""
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    split = RankedModel(ranks, whole.folder, 2)
    try:
        assert lab.serve(split, lab.RAGGED) == expected
    finally:
        split.close()


def test_a_preempted_sequence_goes_on_with_the_same_tokens(ranks, make_whole):
    """Recomputed from its tokens in other blocks, on all ranks, while its old ones hold something else."""
    whole = make_whole("llama")
    prompt = prompt_of(9, 1)
    (expected,) = lab.whole_answers(whole.model, [lab.Asked(prompt=prompt, max_new_tokens=4)])
    split = RankedModel(ranks, whole.folder, 2)

    def next_token(tokens, start, blocks):
        part = SequenceSlice(
            seq_id=4, start_position=start, token_ids=tuple(tokens), block_table=blocks, sampling=lab.GREEDY
        )
        return split.step(part)[0].token_id

    tokens = list(prompt)
    tokens.append(next_token(tokens, 0, (0, 1, 2)))
    tokens.append(next_token(tokens[-1:], 9, (0, 1, 2)))
    next_token(prompt_of(12, 8), 0, (0, 1, 2))
    tokens.append(next_token(tokens, 0, (20, 11, 30)))
    tokens.append(next_token(tokens[-1:], 11, (20, 11, 30)))
    split.close()
    assert tokens[len(prompt) :] == expected


def test_each_rank_holds_its_kv_heads_and_half_of_the_weights(ranks, make_whole):
    """Norms and biases of sums are every rank's; one KV head is too."""
    whole = make_whole("llama")
    split = RankedModel(ranks, whole.folder, 1)
    weights = sum(p.nbytes for p in whole.model.parameters())
    small = sum(p.nbytes for p in whole.model.parameters() if p.dim() == 1)
    assert weights <= split.stages[0].weight_bytes <= weights + small + 1024  # and rotary frequencies
    assert split.stages[0].kv_bytes == 64 * 4 * (2 * 2 * 16 * 4) * 5
    split.close()
    single = make_whole("gemma")
    split = RankedModel(ranks, single.folder, 1)
    assert split.stages[0].kv_bytes == 2 * 64 * 4 * (2 * 1 * 16 * 4) * 5
    split.close()


@pytest.mark.parametrize("family", ["phi3", "qwen3", "olmo2"])
def test_bfloat16_answers_are_the_whole_models_or_within_rounding(ranks, make_whole, family):
    """With our own kernel, or packed linear layers where the machine has them; olmo2's norms see all ranks' heads."""
    whole = make_whole(family, dtype=torch.bfloat16)
    split = RankedModel(ranks, whole.folder, 2, dtype="bfloat16")
    answers = lab.serve(split, lab.RAGGED[:3])
    split.close()
    assert lab.are_within_rounding(whole.model, lab.RAGGED[:3], answers)


def test_a_stage_of_a_model_that_can_not_be_cut_leaves_the_ranks_able_to_go_on(ranks, make_whole):
    """Three KV heads and two ranks; then a model that fits."""
    odd = make_whole("llama", num_key_value_heads=3)
    with pytest.raises(UnsupportedModelError, match=r"6 query heads, 3 KV heads .* by 2 ranks; no number"):
        RankedModel(ranks, odd.folder, 1)
    mixture = make_whole("mixtral")
    with pytest.raises(UnsupportedModelError, match="family 'mixtral' can't be cut over several devices"):
        RankedModel(ranks, mixture.folder, 1)
    whole = make_whole("llama")
    split = RankedModel(ranks, whole.folder, 1)
    expected = lab.whole_answers(whole.model, lab.RAGGED[:1])
    assert lab.serve(split, lab.RAGGED[:1]) == expected
    split.close()
