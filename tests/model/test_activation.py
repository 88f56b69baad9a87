"""A family's activation function becomes our own kernel only where that gives what the function gave."""

import functools

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from shardwright.model.activation import KernelActivation, swap_activations
from shardwright.model.product import ACTIVATIONS

EXACT = {"silu": nn.functional.silu, "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh")}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 31, 64, 1000])
def test_an_activation_function_is_one_rounding_from_exact(product, dtype, name, width):
    x = torch.randn((40, width), generator=torch.Generator().manual_seed(5))
    x = (x * torch.logspace(-3, 2, 40)[:, None]).to(dtype)
    given = product.activate(x, ACTIVATIONS[name])
    exact = EXACT[name](x.double())
    assert given.dtype == dtype
    assert bool(((given.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * 1.01 * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_function_keeps_what_is_no_number(product, dtype, name):
    x = torch.tensor([[float("nan"), float("inf"), 0.0, -0.0]], dtype=dtype)
    given = product.activate(x, ACTIVATIONS[name])[0]
    assert given[0].isnan()
    assert given[1:].tolist() == [float("inf"), 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "found"),
    [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", None), ("gelu", None), ("relu", None)],
)
def test_a_familys_activation_function_is_swapped_for_the_one_that_it_is(product, dtype, name, found):
    """`gelu_new` rounds after each of its steps, so it gives something else."""
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.act_fn = ACT2FN[name]
    swap_activations(layer, product, dtype)
    after = layer.mlp.act_fn
    assert (after.name if isinstance(after, KernelActivation) else None) == found
