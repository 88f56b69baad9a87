"""Stages that two ranks compute together give the whole model's tokens."""

from __future__ import annotations

import pytest
import split_models as lab
from ranked_models import RankedModel


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
