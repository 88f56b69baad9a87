"""Swaps root-mean-square norms with 16-bit weights on a CPU for our own kernel, where it computes what they compute.

A family's module takes six or more of torch's operations, each with its own trip through the interpreter: for one token
of a small model as much time as a fifth of the products. Families differ in where they round and whether they add 1 to
the weight; which form a module has is not looked up but tried, on the weights that it was loaded with.
"""

from __future__ import annotations

import torch
from torch import nn

from shardwright.model.linear import Linears
from shardwright.model.product import FORMS, Product
from shardwright.model.trial import best_match

_TRIED_ROWS = 16
_SCALES = (1e-2, 0.3, 1.0, 40.0)  # of the rows, in turn: small ones show the epsilon


class KernelNorm(nn.Module):
    """A root-mean-square norm that our own kernel computes. The weight stays the parameter that it was."""

    def __init__(self, weight: torch.Tensor, epsilon: float, form: int, product: Product) -> None:
        """`weight` is the family's parameter, `form` one of `product.FORMS`."""
        super().__init__()
        self.weight = weight
        self.eps = epsilon
        self.form = form
        self._rms_norm = product.rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        return self._rms_norm(x, self.weight, self.eps, self.form)

    def extra_repr(self) -> str:
        """As families' modules print themselves."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def swap_norm(model: nn.Module, module_name: str, linears: Linears) -> bool:
    """Swap the named module, filled with its weights, if our kernel gives the same; tell whether it was swapped."""
    kernel, module = linears.kernel, model.get_submodule(module_name)
    if kernel is None or not _may_be_swapped(module, linears.dtype):
        return False
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    if not isinstance(epsilon, float) or not isinstance(weight, nn.Parameter):
        return False
    form = _find_form(module, weight, epsilon, kernel)
    if form is None:
        return False
    parent_name, _, name = module_name.rpartition(".")
    setattr(model.get_submodule(parent_name), name, KernelNorm(weight, epsilon, form, kernel))
    return True


def _may_be_swapped(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a family's own norm with nothing but a weight: one that ranks share sums over them."""
    parameters = dict(module.named_parameters())
    return (
        type(module).__module__.startswith("transformers.")
        and "RMSNorm" in type(module).__name__
        and parameters.keys() == {"weight"}
        and not any(module.children())
        and parameters["weight"].dim() == 1
        and parameters["weight"].dtype == dtype
        and parameters["weight"].device.type == "cpu"
        and parameters["weight"].is_contiguous()
    )


def _find_form(module: nn.Module, weight: torch.Tensor, epsilon: float, kernel: Product) -> int | None:
    """The form that gives what the module gives, but for what the order of a sum turns; None if none does."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((_TRIED_ROWS, weight.numel()), generator=generator)
    scales = torch.tensor(_SCALES).repeat(_TRIED_ROWS // len(_SCALES))
    x = (rows * scales[:, None]).to(weight.dtype)
    with torch.inference_mode():
        expected = module(x)
        if expected.dtype != weight.dtype or expected.shape != x.shape:
            return None
        given = {form: kernel.rms_norm(x, weight, epsilon, form) for form in FORMS}
        # The weight may take a value below the dtype's normal numbers.
        return best_match(given, expected, atol=torch.finfo(weight.dtype).tiny)
