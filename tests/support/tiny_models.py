"""Tiny random models of many families, with config values that are not neutral, and what the whole of each answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 151
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "gemma2": {
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 7,
        "query_pre_attn_scalar": 37,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "query_pre_attn_scalar": 29,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
    },
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 5},
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_parameters": YARN,
    },
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 8, "head_dim": None},
    "olmo2": {"attention_bias": True},
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.5,
        "residual_multiplier": 0.37,
        "logits_scaling": 2.3,
        "attention_multiplier": 0.31,
        "attention_bias": True,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 10},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A small config of the family with values that are not neutral."""
    fields = {**SMALL, **FAMILIES[model_type], **changes}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    return AutoConfig.for_model(model_type, **fields)


EMBEDDING_SIZE = {"olmo2": 1.1}
"""How large embeddings are where 0.05 is not right: olmo2's layers add vectors of one length, whatever they read."""


def fill_randomly(model: PreTrainedModel, seed: int) -> None:
    """Random weights with which answers wander over the vocabulary and logits are far from ties.

    Large embeddings under a tied head would give the prompt's last token for ever, and hide what attention does.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding_size = EMBEDDING_SIZE.get(model.config.model_type, 0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name == "model.norm.weight":
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(embedding_size * noise)
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)


def prompt_of(length: int, seed: int) -> list[int]:
    """A random prompt."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, size=length).tolist()


@dataclass
class Whole:
    """A whole model, as `transformers` has it, and the folder that it was saved to."""

    model: PreTrainedModel
    folder: Path


def save_whole(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Whole:
    """Make a tiny model and save it as safetensors."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype).eval()
    fill_randomly(model, seed=7)
    model.tie_weights()
    model.save_pretrained(folder)
    return Whole(model=model, folder=folder)


def greedy_answer(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What `transformers` generates greedily with the whole model for this prompt alone, past any end token."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()
