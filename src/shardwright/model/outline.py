"""The whole model without a byte of weights: the reference for a stage's names, shapes, dtypes and ties."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from shardwright.model.construction import CONSTRUCTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The whole model on the meta device, as `from_pretrained` builds it before it reads weights."""

    model: PreTrainedModel
    state: dict[str, torch.Tensor]  # parameters and persistent buffers, meta tensors
    ties: dict[str, str]  # parameter -> the parameter that it shares its values with
    ignored_when_missing: re.Pattern[str] | None
    dtypes: dict[str, torch.dtype]  # of parameters, persistent and other buffers, as loaded


def draw_outline(model: nn.Module, config: Any, dtype: torch.dtype) -> Outline:
    """The outline of the model that `model` is a slice of; `config` is the whole model's.

    Its dtypes are those that `from_pretrained(dtype=dtype)` gives: what a family creates in a dtype of its own keeps
    it, and so do the modules that a family wants in float32.
    """
    config = copy.deepcopy(config)
    with CONSTRUCTION, torch.device("meta"):
        if isinstance(model, PreTrainedModel):
            whole = type(model)._from_config(config, dtype=dtype, attn_implementation="eager")  # noqa: SLF001  what AutoModel.from_config calls
        else:
            whole = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    state = whole.state_dict()
    dtypes = {name: buffer.dtype for name, buffer in whole.named_buffers()}
    dtypes |= {name: tensor.dtype for name, tensor in state.items()}
    plan = whole._get_dtype_plan(dtype)  # noqa: SLF001  from_pretrained's own rule for modules kept in float32
    if plan:
        pattern, group_names, _ = build_glob_alternation(list(plan))
        for name in state:
            if match := pattern.search(name):
                dtypes[name] = plan[group_names[match.lastgroup]]
    missing = whole._keys_to_ignore_on_load_missing  # noqa: SLF001  from_pretrained's list of what need not be stored
    return Outline(
        model=whole,
        state=state,
        ties=dict(whole.all_tied_weights_keys),
        ignored_when_missing=re.compile("|".join(f"({p})" for p in sorted(missing))) if missing else None,
        dtypes=dtypes,
    )
