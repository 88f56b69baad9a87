"""Packed linear layers compute what plain ones do, and hold their weight once."""

import sys

import pytest
import torch
from torch import nn

from shardwright.model import linear
from shardwright.model.linear import PackedLinear, can_pack, pack_linear

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="oneDNN has no bfloat16 on this CPU")


def make_linear(*, bias):
    torch.manual_seed(2)
    return nn.Linear(96, 72, bias=bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_packed_products_are_within_rounding_of_exact_ones(rows, bias):
    plain = make_linear(bias=bias)
    model = nn.ModuleDict({"inner": nn.ModuleDict({"up": plain})})
    x = torch.randn((1, rows, 96), dtype=torch.bfloat16)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    assert pack_linear(model, "inner.up")
    packed = model["inner"]["up"]
    assert isinstance(packed, PackedLinear)
    assert packed.num_bytes == (96 * 72 + (72 if bias else 0)) * 2
    torch.testing.assert_close(packed(x).double(), exact, atol=2.0**-8, rtol=2.0**-7)


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_is_packed_in_pieces_and_used_up(monkeypatch, bias):
    """Half a dozen pieces, the last one shorter; the plain weight's pages are given back one piece after the other."""
    plain = nn.Linear(1024, 700, bias=bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    x = torch.randn((1, 3, 1024), dtype=torch.bfloat16)
    weight = plain.weight.double()
    exact = nn.functional.linear(x.double(), weight, plain.bias.double() if bias else None)
    monkeypatch.setattr(linear, "MAX_PIECE_BYTES", 128 * 2 * 1024)
    packed = PackedLinear(plain.weight, plain.bias)
    assert packed.num_bytes == (1024 * 700 + (700 if bias else 0)) * 2
    torch.testing.assert_close(packed(x).double(), exact, atol=2.0**-7, rtol=2.0**-7)
    if sys.platform == "linux":
        assert torch.count_nonzero(plain.weight) < 0.05 * plain.weight.numel()  # pages that two pieces share stay


def test_rows_may_be_a_view_of_more():
    plain = make_linear(bias=True)
    model = nn.ModuleDict({"up": plain})
    wide = torch.randn((5, 200), dtype=torch.bfloat16)
    expected = plain(wide[::2, 50:146].contiguous())
    pack_linear(model, "up")
    torch.testing.assert_close(model["up"](wide[::2, 50:146]), expected)


def test_a_weight_that_the_embedding_shares_stays_plain():
    """The lookup needs it so; a packed copy would hold it twice."""
    model = nn.ModuleDict({"embedding": nn.Embedding(72, 96, dtype=torch.bfloat16), "head": make_linear(bias=False)})
    model["head"].weight = model["embedding"].weight
    assert not pack_linear(model, "head")
    assert type(model["head"]) is nn.Linear


def test_only_plain_bfloat16_linear_layers_are_packed():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(96, dtype=torch.bfloat16),
            "other": Doubling(96, 72, dtype=torch.bfloat16),
            "kept": nn.Linear(96, 72, dtype=torch.float32),
        }
    )
    assert [pack_linear(model, name) for name in model] == [False, False, False]
