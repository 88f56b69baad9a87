"""Gives a model on the meta device the buffers that no checkpoint holds: rotary frequencies, embedding scales."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwright.errors import UnsupportedModelError
from shardwright.model.construction import CONSTRUCTION
from shardwright.model.outline import Outline


def fill_computed_tensors(
    model: nn.Module, outline: Outline, device: torch.device, missing: Iterable[str] = ()
) -> None:
    """Compute all non-persistent buffers, and the tensors in `missing` that a checkpoint need not hold.

    Call before weights are loaded, while parameters are on the meta device: `from_pretrained`'s own initialisation
    (`_init_weights` of each module) runs over the model, and on meta tensors it costs nothing.
    """
    filled = [name for name, _ in model.named_buffers() if _is_computed(model, name)]
    filled += list(missing)
    for name in filled:
        module, leaf = _owner(model, name)
        meta = getattr(module, leaf)
        dtype = outline.dtypes.get(name, meta.dtype)
        empty = _poisoned(meta.shape, dtype, device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if isinstance(meta, nn.Parameter) else empty)
    with CONSTRUCTION, torch.no_grad():
        _initialize(model, outline.model)
    for name in filled:
        module, leaf = _owner(model, name)
        if _is_poisoned(getattr(module, leaf)):
            raise UnsupportedModelError(
                f"the family {outline.model.config.model_type!r} does not compute its tensor {name!r} by itself, and"
                " the checkpoint lacks it"
            )


def _initialize(module: nn.Module, submodel: PreTrainedModel) -> None:
    """Run the initialisation that belongs to each module, children first (`PreTrainedModel.initialize_weights`)."""
    owner = module if isinstance(module, PreTrainedModel) else submodel
    for child in module.children():
        _initialize(child, owner)
    owner._init_weights(module)  # noqa: SLF001  each family's rule for what no checkpoint holds


def _is_computed(model: nn.Module, name: str) -> bool:
    module, leaf = _owner(model, name)
    return leaf in module._non_persistent_buffers_set  # noqa: SLF001  torch has no public question for this


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _poisoned(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that shows afterwards whether anyone filled it."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    if dtype is torch.bool:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype, device=device)


def _is_poisoned(tensor: torch.Tensor) -> bool:
    if tensor.dtype.is_floating_point:
        return bool(tensor.isnan().any())
    return tensor.dtype is not torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())
