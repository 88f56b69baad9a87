"""Swaps linear layers for forms that run faster on their device, one at a time while a stage is loaded."""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in the order in which oneDNN's matrix product reads it.

    At a few rows a product is bound by reading the weight; packed once at load it is read about twice as fast as
    plain, which oneDNN would reorder or stride through on each call. The plain weight is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # plain attributes: an opaque mkldnn tensor is neither a parameter nor a buffer to anyone else
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # noqa: SLF001  torch's only name for it
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")  # noqa: SLF001
        return result

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        bias = 0 if self._bias is None else self._bias.nbytes
        weight: int = self.in_features * self.out_features * self._packed.dtype.itemsize
        return weight + bias

    def extra_repr(self) -> str:
        """As `nn.Linear` prints itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing pays and keeps the numbers: bfloat16 on a CPU whose oneDNN computes in it.

    float32 stays with `F.linear`, so that it computes what `transformers` computes.
    """
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    )


def pack_linear(model: nn.Module, module_name: str) -> bool:
    """Swap the named module for its packed form if it is a plain linear layer; tell whether it was.

    A weight that another module shares (a tied embedding on the same stage) stays plain, because the lookup needs
    it so and a packed copy would hold it twice.
    """
    module = model.get_submodule(module_name)
    # a subclass may compute something else; weights that a family keeps in float32 stay as they are
    if type(module) is not nn.Linear or module.weight.dtype != torch.bfloat16 or _is_shared(model, module):
        return False
    parent_name, _, name = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    packed = PackedLinear(module.weight, module.bias)
    setattr(parent, name, packed)
    return True


def _is_shared(model: nn.Module, module: nn.Linear) -> bool:
    """Whether another module holds the same weight."""
    holders = (name for name, p in model.named_parameters(remove_duplicate=False) if p is module.weight)
    return len(list(holders)) > 1
