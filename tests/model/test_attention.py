"""Attention over blocks equals attention over whole sequences, for any batch, window, cap and sinks."""

from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch

from shardwright.errors import UnsupportedModelError
from shardwright.model.attention import (
    PORT_ATTRIBUTE,
    AttentionCall,
    BatchCell,
    PagedLayer,
    StepBatch,
    paged_attention,
)
from shardwright.model.kv_cache import KvShape, make_layer_cache
from shardwright.types import SequenceSlice

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@dataclass
class Sequence:
    """One sequence's whole q, k, v, each [positions, heads, dim], and its blocks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: tuple[int, ...]


def make_sequences(lengths, *, heads=6, kv_heads=2, key_dim=8, value_dim=8, scattered=True):
    generator = torch.Generator().manual_seed(3)
    order = list(range(64))
    if scattered:
        order = np.random.default_rng(5).permutation(64).tolist()
    sequences = []
    for length in lengths:
        count = -(-length // BLOCK_SIZE)
        table, order = order[:count], order[count:]
        sequences.append(
            Sequence(
                q=torch.randn((length, heads, key_dim), generator=generator),
                k=torch.randn((length, kv_heads, key_dim), generator=generator),
                v=torch.randn((length, kv_heads, value_dim), generator=generator),
                table=tuple(table),
            )
        )
    return sequences


def naive(sequence, start, end, call):
    """Positions start to end - 1, one at a time, in float64."""
    shared = sequence.q.shape[1] // sequence.k.shape[1]
    k = sequence.k.double().repeat_interleave(shared, dim=1)
    v = sequence.v.double().repeat_interleave(shared, dim=1)
    rows = []
    for position in range(start, end):
        first = 0 if call.window is None else max(0, position - call.window + 1)
        scores = torch.einsum("hd,khd->hk", sequence.q[position].double(), k[first : position + 1]) * call.scaling
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        weights = scores.exp()
        total = weights.sum(dim=-1)
        if call.sinks is not None:
            total = total + call.sinks.double().exp()
        rows.append(torch.einsum("hk,khd->hd", weights / total[:, None], v[first : position + 1]))
    return torch.stack(rows)


def run(layer, cell, parts):
    """One step over (sequence, start, end) parts; returns [rows, heads, value_dim]."""
    slices = [
        SequenceSlice(
            seq_id=index,
            start_position=start,
            token_ids=(1,) * (end - start),
            block_table=sequence.table[: -(-end // BLOCK_SIZE)],
            sampling=None,
        )
        for index, (sequence, start, end, _) in enumerate(parts)
    ]
    cell.batch = StepBatch(slices, windows=[layer._window], block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    q, k, v = (
        torch.cat([getattr(s, name)[start:end] for s, start, end, _ in parts]).transpose(0, 1)[None] for name in "qkv"
    )
    return layer.attend(q, k, v, None, parts[0][3])[0]


def make_layer(sequences, window):
    shape = KvShape(heads=sequences[0].k.shape[1], key_dim=sequences[0].k.shape[2], value_dim=sequences[0].v.shape[2])
    cell = BatchCell()
    cache = make_layer_cache(shape, num_blocks=64, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    return PagedLayer(cache, cell, window), cell


CALLS = {
    "plain": AttentionCall(scaling=0.3, window=None, softcap=None, sinks=None),
    "window": AttentionCall(scaling=0.3, window=5, softcap=None, sinks=None),
    "window of one": AttentionCall(scaling=0.3, window=1, softcap=None, sinks=None),
    "cap": AttentionCall(scaling=0.3, window=None, softcap=0.7, sinks=None),
    "sinks": AttentionCall(scaling=0.3, window=None, softcap=None, sinks=torch.linspace(-1, 2, 6)),
    "all": AttentionCall(scaling=0.3, window=6, softcap=1.1, sinks=torch.linspace(-1, 2, 6)),
}


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_ragged_steps_give_what_each_sequence_alone_gives(name, scattered):
    """Chunks, decodes and both mixed in one step, in an order that changes."""
    call = CALLS[name]
    sequences = make_sequences([19, 3, 11, 9], scattered=scattered)
    layer, cell = make_layer(sequences, call.window)
    a, b, c, d = sequences
    steps = [
        [(a, 0, 7, call), (b, 0, 1, call)],
        [(b, 1, 2, call), (a, 7, 16, call), (c, 0, 10, call)],
        [(d, 0, 8, call)],
        [(a, 16, 17, call), (b, 2, 3, call), (c, 10, 11, call)],
        [(d, 8, 9, call), (a, 17, 19, call)],
    ]
    for parts in steps:
        expected = torch.cat([naive(s, start, end, call) for s, start, end, _ in parts])
        torch.testing.assert_close(run(layer, cell, parts).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kv_heads", "key_dim", "value_dim"), [(1, 8, 8), (6, 8, 8), (3, 16, 8), (6, 6, 12)])
def test_heads_may_be_shared_and_values_of_another_size(kv_heads, key_dim, value_dim):
    """Multi-query, multi-head and grouped heads; latent attention has keys wider than values."""
    call = CALLS["plain"]
    sequences = make_sequences([9, 6], kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    layer, cell = make_layer(sequences, None)
    a, b = sequences
    for parts in ([(a, 0, 8, call), (b, 0, 5, call)], [(b, 5, 6, call), (a, 8, 9, call)]):
        expected = torch.cat([naive(s, start, end, call) for s, start, end, _ in parts])
        torch.testing.assert_close(run(layer, cell, parts).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "window", "all"])
@pytest.mark.parametrize("scattered", [True, False])
def test_long_contexts_in_a_batch_of_single_tokens_give_what_each_alone_gives(name, scattered):
    """On a CPU a long context in neighbouring blocks is attended in place, beside a padded group of short ones."""
    call = CALLS[name]
    sequences = make_sequences([141, 20, 37, 5], scattered=scattered)
    layer, cell = make_layer(sequences, call.window)
    for sequence in sequences:
        run(layer, cell, [(sequence, 0, len(sequence.q) - 1, call)])
    parts = [(s, len(s.q) - 1, len(s.q), call) for s in sequences]
    expected = torch.cat([naive(s, start, end, call) for s, start, end, _ in parts])
    torch.testing.assert_close(run(layer, cell, parts).double(), expected, atol=1e-5, rtol=1e-5)


def test_two_sequences_read_a_prefix_from_the_same_blocks():
    """The second sequence computes only what comes after the shared blocks."""
    call = CALLS["plain"]
    a, b = make_sequences([12, 12])
    b.k[:8], b.v[:8] = a.k[:8], a.v[:8]
    b.table = (*a.table[:2], *b.table[2:])
    layer, cell = make_layer([a], None)
    run(layer, cell, [(a, 0, 12, call)])
    torch.testing.assert_close(
        run(layer, cell, [(b, 8, 12, call)]).double(), naive(b, 8, 12, call), atol=1e-5, rtol=1e-5
    )


def test_blocks_used_again_hold_nothing_of_their_last_owner():
    call = CALLS["plain"]
    a, b = make_sequences([16, 6])
    layer, cell = make_layer([a], None)
    run(layer, cell, [(a, 0, 16, call)])
    b.table = a.table[1:3]
    run(layer, cell, [(b, 0, 5, call)])
    torch.testing.assert_close(run(layer, cell, [(b, 5, 6, call)]).double(), naive(b, 5, 6, call), atol=1e-5, rtol=1e-5)


@pytest.fixture
def module():
    """An attention module with a port that returns its call."""

    class Echo:
        def attend(self, query, key, value, mask, call):
            return call

    made = torch.nn.Module()
    setattr(made, PORT_ATTRIBUTE, Echo())
    return made


def test_what_families_hand_through_without_meaning_is_accepted(module):
    q = torch.zeros((1, 2, 3, 16))
    call, _ = paged_attention(
        module, q, q, q, None, dropout=0.0, scaling=None, sliding_window=0, position_ids=q, use_cache=False
    )
    assert call == AttentionCall(scaling=0.25, window=None, softcap=None, sinks=None)


def test_an_argument_that_attention_does_not_know_is_refused_by_name(module):
    """Dropping it would give wrong tokens without a word."""
    q = torch.zeros((1, 2, 3, 4))
    with pytest.raises(UnsupportedModelError, match="'position_bias'"):
        paged_attention(module, q, q, q, None, scaling=1.0, position_bias=q)


def test_attention_to_later_positions_is_refused(module):
    q = torch.zeros((1, 2, 3, 4))
    with pytest.raises(UnsupportedModelError, match="later positions"):
        paged_attention(module, q, q, q, None, is_causal=False)


def test_attention_outside_the_decoder_layers_is_refused():
    q = torch.zeros((1, 2, 3, 4))
    with pytest.raises(UnsupportedModelError, match="outside"):
        paged_attention(torch.nn.Module(), q, q, q, None)


def test_kv_blocks_take_memory_only_when_they_are_written():
    """The resident size of this process grows by what is written, not by what is reserved."""
    before = psutil.Process().memory_info().rss
    shape = KvShape(heads=8, key_dim=128, value_dim=128)
    cache = make_layer_cache(shape, num_blocks=8192, block_size=16, dtype=torch.bfloat16, device=CPU)
    assert cache.num_bytes == 8192 * 16 * shape.bytes_per_token(torch.bfloat16) == 512 * 2**20
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
    assert not cache.keys[-1].any()
