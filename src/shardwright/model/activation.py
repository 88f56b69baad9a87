"""Swaps activation functions of 16-bit layers on a CPU for our own kernel, where it computes what they compute.

Which function a module is is not looked up but tried.
"""

from __future__ import annotations

import torch
from torch import nn

from shardwright.model.product import ACTIVATIONS, Product
from shardwright.model.trial import best_match


class KernelActivation(nn.Module):
    """An activation function that our own kernel computes."""

    def __init__(self, name: str, product: Product) -> None:
        """`name` is one of `product.ACTIVATIONS`."""
        super().__init__()
        self.name = name
        self._form = ACTIVATIONS[name]
        self._activate = product.activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return self._activate(x, self._form)

    def extra_repr(self) -> str:
        """Which one."""
        return self.name


def swap_activations(layer: nn.Module, product: Product, dtype: torch.dtype) -> None:
    """Have the kernel compute a layer's activation functions where it gives the same. Which they are is tried."""
    for parent in layer.modules():
        for name, module in parent.named_children():
            where = type(module).__module__
            if where.startswith(("transformers.activations", "torch.nn.modules.activation")):
                found = _find_activation(module, product, dtype)
                if found is not None:
                    setattr(parent, name, KernelActivation(found, product))


def _find_activation(module: nn.Module, product: Product, dtype: torch.dtype) -> str | None:
    if next(module.parameters(), None) is not None:
        return None
    x = torch.randn((64, 96), generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([0.1, 1.0, 3.0, 20.0]).repeat(16)[:, None]).to(dtype)
    with torch.inference_mode():
        expected = module(x)
        if expected.dtype != dtype or expected.shape != x.shape:
            return None
        given = {name: product.activate(x, form) for name, form in ACTIVATIONS.items()}
        # Where torch's own sum of 1 and a tanh near -1 leaves few bits, they are noise.
        return best_match(given, expected, atol=2e-6)
