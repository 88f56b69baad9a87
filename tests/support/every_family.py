"""A small config of any family, made by one rule for all of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_models import fill_randomly
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 5
SMALL: dict[str, Any] = {
    # sizes
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "ffn_hidden_size": 96,
    "mlp_hidden_size": 96,
    "dense_intermediate_size": 96,
    # token ids inside the vocabulary
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_num_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # values that are not neutral
    "sliding_window": 7,
    "residual_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
    "logit_scale": 0.3,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 20,
    "attention_bias": True,
    # gemma3n and gemma4
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 151,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "laurel_rank": 8,
    "altup_num_inputs": 3,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
TEXT = {name: value for name, value in SMALL.items() if not name.startswith(("n_", "ffn", "num_kv", "hidden_size_per"))}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING_AND_FULL},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING_AND_FULL},
    "internlm3": {"attention_bias": False},
}


def small_config(model_type: str) -> PreTrainedConfig:
    """A config of the family with every known size and multiplier that its class has."""
    cls = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", {})}
    fields = {name: value for name, value in SMALL.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention has one key for each head, of a size of its own
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = 4
    return cls(**{**fields, **OTHERWISE.get(model_type, {})})


def small_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the small config with random weights, the same each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type), dtype=dtype).eval()
    fill_randomly(model, seed=3)
    model.tie_weights()
    return model
