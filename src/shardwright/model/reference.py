"""The whole model exactly as `transformers` loads it, to compare a split one with. For checks, not for serving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from shardwright.model.family_config import read_config


def load_reference(weights: Sequence[Path], config_json: str, dtype: torch.dtype) -> Any:
    """Load the whole model on the CPU through `transformers`' own loader; nothing of `weights.py` is used.

    GGUF takes the same steps as `from_pretrained(gguf_file=...)`, which itself asks for one more package.
    """
    if weights[0].suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(weights[0].parent, dtype=dtype, local_files_only=True)
        return model.eval()
    config = read_config(config_json)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_gguf_checkpoint(str(weights[0]), return_tensors=True, model_to_load=empty, torch_dtype=dtype)
    model = type(empty).from_pretrained(None, config=config, state_dict=tensors["tensors"], dtype=dtype)
    return model.eval()
