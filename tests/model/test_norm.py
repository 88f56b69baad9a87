"""A family's norm becomes our own kernel only where that gives what the norm gave, row by row."""

import pytest
import torch
from tiny_models import fill_randomly, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from shardwright.model.linear import Linears
from shardwright.model.norm import KernelNorm, swap_norm
from shardwright.model.product import FORMS

NAMED = ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "mixtral"]


def random(*shape, dtype, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms_of(family, dtype):
    """A tiny model of the family with random weights, and the names of its norms."""
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    fill_randomly(model, seed=7)
    return model, [name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__]


def exact(x, weight, epsilon, form):
    """The norm in float64, with the one rounding inside that the first form has."""
    x64 = x.double()
    scaled = x64 / (x64.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return scaled * (1 + weight.double() if form == 1 else weight.double())


@pytest.mark.parametrize("family", NAMED)
def test_every_norm_of_the_named_families_is_swapped_and_gives_the_same(product, dtype, family):
    model, names = norms_of(family, dtype)
    assert names
    linears = Linears(dtype=dtype, kernel=product)
    for number, name in enumerate(names):
        before = model.get_submodule(name)
        assert swap_norm(model, name, linears), f"{name}: {before}"
        after = model.get_submodule(name)
        assert isinstance(after, KernelNorm)
        assert after.weight is before.weight
        x = 3 * random(2, 50, before.weight.numel(), dtype=dtype, seed=number)
        with torch.inference_mode():
            expected, given = before(x), after(x)
        assert given.dtype == dtype
        assert (given == expected).float().mean() > 0.99
        torch.testing.assert_close(given, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 7, 31, 64, 511, 513, 576, 2048, 3001])
def test_a_norm_is_within_its_roundings_of_the_exact_one(product, dtype, size, form):
    x, weight = 5 * random(9, size, dtype=dtype), random(size, dtype=dtype, seed=4)
    given = product.rms_norm(x, weight, 1e-5, form).double()
    expected = exact(x, weight, 1e-5, form)
    step = torch.finfo(dtype).eps  # two roundings of half a step each at most, and float32's
    assert bool(((given - expected).abs() <= 1.02 * step * expected.abs() + 1e-6).all())


def test_a_row_is_the_same_whatever_it_comes_with_and_however_many_threads_compute(product, dtype):
    x, weight = random(300, 700, dtype=dtype), random(700, dtype=dtype, seed=4)
    whole = product.rms_norm(x, weight, 1e-6, 0)
    for rows in (slice(0, 1), slice(17, 20), slice(299, 300)):
        assert torch.equal(product.rms_norm(x[rows], weight, 1e-6, 0), whole[rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(product.rms_norm(x, weight, 1e-6, 0), whole)
    finally:
        torch.set_num_threads(threads)


def test_rows_that_are_not_one_behind_the_other_and_none_at_all(product, dtype):
    x, weight = random(6, 3, 64, dtype=dtype), random(64, dtype=dtype, seed=4)
    turned = x.transpose(0, 1)
    assert torch.equal(
        product.rms_norm(turned, weight, 1e-6, 1), product.rms_norm(turned.contiguous(), weight, 1e-6, 1)
    )
    assert product.rms_norm(x[:0], weight, 1e-6, 1).shape == (0, 3, 64)


def test_what_is_not_a_number_stays_so_and_only_in_its_row(product, dtype):
    x, weight = random(3, 100, dtype=dtype), random(100, dtype=dtype, seed=4)
    clean = product.rms_norm(x, weight, 1e-6, 0)
    x[1, 50] = float("nan")
    given = product.rms_norm(x, weight, 1e-6, 0)
    assert bool(given[1].isnan().all())
    assert torch.equal(given[[0, 2]], clean[[0, 2]])


class _Family(nn.Module):
    """Passes for a norm of `transformers`, and computes what it is told."""

    __module__ = "transformers.models.invented.modeling_invented"

    def __init__(self, size, dtype, compute):
        super().__init__()
        self.weight = nn.Parameter(random(size, dtype=dtype), requires_grad=False)
        self.eps = 1e-6
        self._compute = compute

    def forward(self, x):
        return self._compute(x, self.weight, self.eps)


_Family.__name__ = "InventedRMSNorm"


def llama(x, weight, epsilon):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda x, w, e: llama(x - x.mean(-1, keepdim=True), w, e), id="centred"),
        pytest.param(lambda x, w, e: llama(x, w, 1e3 * e), id="another epsilon"),
        pytest.param(lambda x, w, e: llama(x, w, e) * 1.01, id="scaled"),
        pytest.param(lambda x, w, e: llama(x, w, e).float(), id="another dtype"),
        pytest.param(lambda x, w, e: llama(x, w * w, e), id="another weight"),
    ],
)
def test_a_norm_that_computes_something_else_is_left(product, compute):
    model = nn.ModuleDict({"norm": _Family(64, torch.bfloat16, compute), "twin": _Family(64, torch.bfloat16, llama)})
    linears = Linears(dtype=torch.bfloat16, kernel=product)
    assert not swap_norm(model, "norm", linears)
    assert isinstance(model["norm"], _Family)
    assert swap_norm(model, "twin", linears)


def test_norms_in_another_dtype_without_a_kernel_or_not_of_a_family_are_left(product):
    model, (name, *_) = norms_of("llama", torch.float32)
    assert not swap_norm(model, name, Linears(dtype=torch.bfloat16, kernel=product))
    model, (name, *_) = norms_of("llama", torch.bfloat16)
    assert not swap_norm(model, name, Linears(dtype=torch.bfloat16))
    plain = nn.ModuleDict(
        {"norm": nn.RMSNorm(64, dtype=torch.bfloat16), "other": nn.LayerNorm(64, dtype=torch.bfloat16)}
    )
    for name in plain:
        assert not swap_norm(plain, name, Linears(dtype=torch.bfloat16, kernel=product))


def test_a_norm_of_heads_in_front_of_tokens_lies_as_they_lie(product, dtype):
    """As gemma3 has them; nothing is copied for it."""
    rows = torch.randn((1, 5, 3, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(2)).to(dtype)
    given = product.rms_norm(rows.transpose(1, 2), weight, 1e-6, 0)
    assert given.stride() == rows.transpose(1, 2).stride()
    assert torch.equal(given.transpose(1, 2), product.rms_norm(rows, weight, 1e-6, 0))
