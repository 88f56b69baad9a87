"""Every family's cut model gives the whole model's greedy tokens, however it is batched and wherever it is cut."""

import pytest
import split_models as lab

FAMILIES = [
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_whole_models_for_1_2_3_and_5_stages(family, make_whole):
    """Ragged batches that sequences join and leave, prompts in chunks, scattered and reused blocks, in float32."""
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    for num_stages in (1, 2, 3, 5):
        split = lab.SplitModel(whole.folder, num_stages)
        assert lab.serve(split, lab.RAGGED, seed=num_stages) == expected, f"{num_stages} stages"
