"""A family's rotary embedding is computed by our own kernel only where that gives the family's own bits."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from every_family import small_model
from tiny_models import fill_randomly, tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from shardwright.model.rotary import KernelRotary, swap_rotary
from shardwright.model.supported import SPLITTABLE_FAMILIES


class Counting:
    """The kernel, and how often it turned."""

    def __init__(self, product):
        self._product = product
        self.num_calls = 0

    def rotate(self, *args):
        self.num_calls += 1
        return self._product.rotate(*args)


def heads(rows, num_heads, size, dtype, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, rows, num_heads, size), generator=generator).to(dtype).transpose(1, 2)


def angles(rows, size, dtype, *, seed=2):
    angle = 6 * torch.rand((1, rows, size), generator=torch.Generator().manual_seed(seed))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("size", [2, 6, 16, 64, 80, 256])
def test_the_kernel_gives_the_bits_of_the_familys_function(product, dtype, size, rows):
    q, k = heads(rows, 5, size, dtype), heads(rows, 2, size, dtype, seed=3)
    cos, sin = angles(rows, size, dtype)
    kernel = Counting(product)
    rotary = KernelRotary(modeling_llama.apply_rotary_pos_emb, kernel)
    given, expected = rotary(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert kernel.num_calls == 2, "the trial, and the call"
    for mine, its in zip(given, expected, strict=True):
        assert torch.equal(mine, its)
        assert rows == 1 or mine.stride() == its.stride()


def test_heads_cut_out_of_one_tensor_are_turned_where_they_lie(product, dtype):
    """As phi3 has them: queries, keys and values side by side in a row."""
    rows, size = 4, 16
    both = torch.randn((1, rows, 7 * size), generator=torch.Generator().manual_seed(1)).to(dtype)
    q = both[..., : 3 * size].view(1, rows, 3, size).transpose(1, 2)
    k = both[..., 3 * size : 5 * size].view(1, rows, 2, size).transpose(1, 2)
    cos, sin = angles(rows, size, dtype)
    kernel = Counting(product)
    given = KernelRotary(modeling_llama.apply_rotary_pos_emb, kernel)(q, k, cos, sin)
    assert kernel.num_calls == 2
    for mine, its in zip(given, modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(mine, its)


def test_infinity_and_nan_stay_what_they_are(product, dtype):
    q, k = heads(2, 1, 8, dtype), heads(2, 1, 8, dtype)
    q[0, 0, 0, 1], q[0, 0, 1, 6] = float("inf"), float("nan")
    cos, sin = angles(2, 8, dtype)
    given = KernelRotary(modeling_llama.apply_rotary_pos_emb, product)(q, k, cos, sin)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "turned"),
    [
        (modeling_cohere.apply_rotary_pos_emb, 16),  # neighbours instead of halves
        (modeling_phi3.apply_rotary_pos_emb, 8),  # a part of each head
        (lambda q, k, cos, sin: modeling_llama.apply_rotary_pos_emb(q, k, sin, cos), 16),
        (lambda q, k, cos, sin: modeling_llama.apply_rotary_pos_emb(q.float(), k.float(), cos, sin), 16),
    ],
    ids=["neighbours", "part of a head", "sines for cosines", "another dtype"],
)
def test_a_function_that_does_something_else_stays(product, dtype, function, turned):
    q, k = heads(3, 4, 16, dtype), heads(3, 2, 16, dtype, seed=3)
    cos, sin = angles(3, turned, dtype)
    given, expected = KernelRotary(function, product)(q, k, cos, sin), function(q, k, cos, sin)
    assert all(map(torch.equal, given, expected))


def test_what_the_kernel_does_not_take_goes_to_the_function(product):
    kernel = Counting(product)
    rotary = KernelRotary(modeling_llama.apply_rotary_pos_emb, kernel)
    size, dtype = 16, torch.bfloat16
    q, k = heads(3, 4, size, dtype), heads(3, 2, size, dtype)
    cos, sin = angles(3, size, dtype)
    rotary(q, k, cos, sin)
    assert kernel.num_calls == 2
    spread = torch.randn((1, 4, 3, 2 * size)).to(dtype)[..., ::2]
    for arguments in (
        (q.float(), k.float(), cos.float(), sin.float()),
        (q, k, cos.float(), sin.float()),
        (spread, k, cos, sin),
        (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), cos, sin),
    ):
        given = rotary(*arguments)
        assert all(map(torch.equal, given, modeling_llama.apply_rotary_pos_emb(*arguments)))
    rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    rotary(q, k, cos=cos, sin=sin)
    assert kernel.num_calls == 2


def test_a_function_of_queries_alone_is_called_as_it_is(product):
    """As gemma3n and gemma4 have it."""
    dtype = torch.bfloat16
    q, (cos, sin) = heads(3, 4, 16, dtype).transpose(1, 2), angles(3, 16, dtype)
    function = modeling_gemma3n.apply_rotary_pos_emb
    given = KernelRotary(function, product)(q, cos, sin, unsqueeze_dim=2)
    assert torch.equal(given, function(q, cos, sin, unsqueeze_dim=2))


def swapped(model, product):
    """Swap all modules of a model that may be; gives them."""
    return [module for module in model.modules() if swap_rotary(module, product)]


@pytest.mark.parametrize(
    "family", ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "granite", "mixtral"]
)
def test_a_model_gives_the_same_bits_with_all_its_attentions_turning_by_the_kernel(product, dtype, family):
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    fill_randomly(model, seed=7)
    ids = torch.tensor([[5, 9, 2, 7, 11, 3]])
    kernel = Counting(product)
    with torch.inference_mode():
        expected = model(ids).logits
        attentions = swapped(model, kernel)
        assert len(attentions) == model.config.num_hidden_layers
        assert torch.equal(model(ids).logits, expected)
        before = kernel.num_calls
        model(ids)
    assert kernel.num_calls - before == len(attentions)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", SPLITTABLE_FAMILIES)
def test_every_familys_model_gives_the_same_bits_with_all_its_attentions_swapped(product, family):
    """Whatever its function takes: some turn queries and keys by themselves, some name their arguments."""
    model = small_model(family, torch.bfloat16)
    ids = torch.tensor([[5, 9, 2, 7, 11, 3]])
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        swapped(model, product)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_swapped_module_is_gone_as_soon_as_nobody_holds_it(product):
    """Its weights and its K and V are a stage's memory, which the next stage needs."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
    attention = model.model.layers[0].self_attn
    assert swap_rotary(attention, product)
    seen = weakref.ref(attention)
    model.model.layers[0].self_attn = torch.nn.Identity()
    gc.disable()
    try:
        del attention
        assert seen() is None
    finally:
        gc.enable()


def test_the_librarys_own_module_stays_as_it_was(product):
    before = dict(vars(modeling_llama))
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
    assert swap_rotary(model.model.layers[0].self_attn, product)
    assert dict(vars(modeling_llama)) == before
    assert type(model.model.layers[1].self_attn) is modeling_llama.LlamaAttention
    assert isinstance(model.model.layers[0].self_attn, modeling_llama.LlamaAttention)


def test_a_module_without_rotary_embedding_is_left(product):
    linear = torch.nn.Linear(2, 2)
    assert not swap_rotary(linear, product)
    assert type(linear) is torch.nn.Linear
