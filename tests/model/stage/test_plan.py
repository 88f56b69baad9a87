"""What a model is made of is found out without its weights; what can't be cut is refused by name."""

import json

import pytest
import torch
from tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.model.families import model_costs, plan_family, slice_model
from shardwright.model.family_config import read_config
from shardwright.model.supported import SPLITTABLE_FAMILIES
from shardwright.types import LayerRange


def costs_of(config, dtype="bfloat16"):
    return model_costs(json.dumps(config.to_dict()), name="tiny", dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "mixtral", "phi3"])
def test_the_stages_of_a_model_hold_each_parameter_once_under_its_own_name(family):
    config = tiny_config(family, tie_word_embeddings=False)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    found = {}
    for a, b in ((0, 2), (2, 3), (3, 5)):
        part = slice_model(config, LayerRange(a, b), is_first=a == 0, is_last=b == 5)
        parameters = {name: tuple(p.shape) for name, p in part.named_parameters()}
        assert not found.keys() & parameters.keys()
        found |= parameters
        assert all(p.is_meta for p in part.parameters())
    assert found == expected


def test_a_tied_head_is_kept_on_the_last_stage_under_its_own_name():
    part = slice_model(tiny_config("gemma"), LayerRange(4, 5), is_first=False, is_last=True)
    assert "lm_head.weight" in dict(part.named_parameters())


def test_costs_are_bytes_in_the_compute_dtype():
    """Of each layer, embedding, norm and head; half of them in half the precision."""
    config = tiny_config("llama")
    costs = costs_of(config, "float32")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert costs.layer_bytes == tuple(sum(p.nbytes for p in layer.parameters()) for layer in whole.model.layers)
    assert costs.embedding_bytes == whole.model.embed_tokens.weight.nbytes
    assert costs.head_bytes == whole.lm_head.weight.nbytes + whole.model.norm.weight.nbytes
    assert costs.layer_kv_bytes_per_token == (2 * 2 * 16 * 4,) * 5
    assert (costs.hidden_size, costs.activation_bytes_per_token, costs.max_context) == (48, 192, 256)
    assert (costs.tied_embedding, costs.element_bytes) == (False, 4)
    half = costs_of(config, "bfloat16")
    assert 2 * sum(half.layer_bytes) == sum(costs.layer_bytes)
    assert half.layer_kv_bytes_per_token == (2 * 2 * 16 * 2,) * 5


def test_attention_to_a_position_costs_a_part_of_a_tokens_matrix_products():
    """Two products for each head, 2 operations each, beside 2 for each weight of the layers."""
    config = tiny_config("llama")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    linear = 2 * sum(p.numel() for layer in whole.model.layers for p in layer.parameters() if p.dim() > 1)
    attended = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert costs_of(config).context_costs == ((256, pytest.approx(attended / linear)),)


def test_windows_bound_what_attention_costs():
    (window, short), (context, whole) = costs_of(tiny_config("gemma3_text")).context_costs
    assert (window, context) == (6, 256)
    assert short == pytest.approx(2 * whole)  # four layers of six


def test_of_a_mixture_of_experts_those_that_a_token_uses_count():
    few, all_of_them = (tiny_config("mixtral", num_experts_per_tok=used) for used in (1, 4))
    assert few.num_local_experts == 4
    ((_, cost),), ((_, less),) = costs_of(few).context_costs, costs_of(all_of_them).context_costs
    assert cost > 1.5 * less


def test_costs_of_a_large_model_take_no_memory_for_it():
    """A model of 500 billion parameters is described like any other."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32768,
        intermediate_size=131072,
        num_hidden_layers=30,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=256000,
        tie_word_embeddings=True,
    )
    costs = costs_of(config)
    assert sum(costs.layer_bytes) > 850 * 2**30
    assert costs.tied_embedding
    assert costs.head_bytes == costs.embedding_bytes + 2 * 32768


def test_windows_and_heads_are_what_the_family_uses():
    plan = plan_family(tiny_config("gemma3_text"))
    windows = [layer.attentions[0].window for layer in plan.probed.layers]
    assert windows == [6, 6, None, 6, 6, None]
    assert (plan.layers, plan.embedding, plan.head) == ("model.layers", "model.embed_tokens", "lm_head")


def test_a_context_ends_where_rotary_frequencies_would_change_for_the_whole_batch():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 100}
    assert costs_of(tiny_config("llama", rope_parameters=rope)).max_context == 100


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "keeps a state other than K and V"),
        ("qwen3_next", "keeps a state other than K and V"),
        ("bloom", "keeps a state other than K and V"),
        ("roberta", "attends to later positions"),
        ("vit", "not a causal language model"),
        ("no-such-family", "does not have it"),
    ],
)
def test_a_family_that_can_not_be_cut_is_refused_with_the_list_of_those_that_can(model_type, reason):
    config_json = json.dumps({"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 192})
    with pytest.raises(UnsupportedModelError) as caught:
        model_costs(config_json, name="x", dtype="float32")
    message = str(caught.value)
    assert repr(model_type) in message
    assert reason in message
    assert all(family in message for family in FAMILIES)


def test_quantised_checkpoints_and_code_of_their_own_are_not_run():
    fields = {**tiny_config("llama").to_dict(), "auto_map": {"AutoModelForCausalLM": "theirs.Theirs"}}
    assert type(read_config(json.dumps(fields))).__module__.startswith("transformers.")
    with pytest.raises(UnsupportedModelError, match="quantised"):
        read_config(json.dumps({**fields, "quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    "config_json",
    ["{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": "llama", "hidden_size": 1.5}'],
)
def test_a_config_that_is_none_is_told(config_json):
    with pytest.raises(CheckpointError, match="config"):
        read_config(config_json)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"num_hidden_layers": 0}])
def test_a_config_that_makes_no_model_is_told(changes):
    with pytest.raises((UnsupportedModelError, CheckpointError), match="llama"):
        model_costs(json.dumps({"model_type": "llama", **changes}), name="x", dtype="float32")


def test_the_list_of_families_is_sorted_and_known_to_transformers():
    assert list(SPLITTABLE_FAMILIES) == sorted(set(SPLITTABLE_FAMILIES))
    assert set(FAMILIES) <= set(SPLITTABLE_FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
