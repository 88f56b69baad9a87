"""What each rank holds: its heads, its part of every projection, or a refusal with the numbers that would work."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

from shardwright.errors import UnsupportedModelError
from shardwright.model.families import model_costs, plan_family
from shardwright.model.rank_plan import plan_ranks
from shardwright.model.shards import Shard


def planned(family, *, num_ranks=2, **changes):
    """Every rank's plan."""
    config = tiny_config(family, **changes)
    plan = plan_family(config)
    return [plan_ranks(config, plan, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


def ranges(plans, name):
    return [plan.shards[name].ranges for plan in plans]


def test_query_and_key_heads_are_divided_and_sums_take_their_columns():
    plans = planned("llama")  # 6 query heads, 2 KV heads of 16
    layer = "model.layers.0."
    assert ranges(plans, f"{layer}self_attn.q_proj.weight") == [((0, 48),), ((48, 96),)]
    assert ranges(plans, f"{layer}self_attn.k_proj.bias") == [((0, 16),), ((16, 32),)]
    assert plans[1].shards[f"{layer}mlp.down_proj.weight"] == Shard(1, ((40, 80),))
    assert f"{layer}mlp.down_proj.bias" not in plans[1].shards  # added once, behind the sum
    assert [layer.attentions[0].kv.heads for layer in plans[1].layers] == [1] * 5


def test_kv_heads_that_are_fewer_than_ranks_are_held_by_several():
    """Ranks 0 and 1 have the first of two KV heads, ranks 2 and 3 the second, beside the queries that share it."""
    plans = planned("llama", num_ranks=4, num_attention_heads=8)
    name = "model.layers.2.self_attn."
    assert ranges(plans, f"{name}k_proj.weight") == [((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)]
    assert ranges(plans, f"{name}q_proj.weight")[1:3] == [((32, 64),), ((64, 96),)]
    assert f"{name}k_proj" not in plans[0].columns


def test_fused_projections_are_cut_each_by_itself():
    """phi3's queries, keys and values lie in one weight, and so do the two halves of its gate."""
    (_, second) = planned("phi3")
    assert second.shards["model.layers.0.self_attn.qkv_proj.weight"].ranges == ((24, 48), (56, 64), (72, 80))
    assert second.shards["model.layers.0.mlp.gate_up_proj.weight"].ranges == ((40, 80), (120, 160))
    (_, other) = planned("phi3", num_key_value_heads=1)
    assert other.shards["model.layers.0.self_attn.qkv_proj.weight"].ranges == ((24, 48), (48, 56), (56, 64))


def test_embedding_and_head_are_divided_by_tokens_however_many():
    plans = planned("gemma")
    assert ranges(plans, "model.embed_tokens.weight") == ranges(plans, "lm_head.weight") == [((0, 76),), ((76, 151),)]


def test_a_norm_over_all_heads_is_whole_on_every_rank():
    (first, _) = planned("olmo2")
    assert {norm.module.rpartition(".")[2]: norm.size for norm in first.joint_norms} == {"q_norm": 96, "k_norm": 32}
    assert not any("norm" in name for name in first.shards)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {}, "6 query heads, 2 KV heads and other sizes don't divide by 3 ranks; what does is 2$"),
        (
            "gemma",
            {"intermediate_size": 96},
            "1 KV heads and other sizes don't divide by 4 ranks; what does is 2, 3 or 6$",
        ),
        ("llama", {"num_key_value_heads": 3}, "3 KV heads and other sizes don't divide by 2 ranks; no number of ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers_that_would_work(family, changes, message):
    wanted = int(message.partition("divide by ")[2][0])
    with pytest.raises(UnsupportedModelError, match=message):
        planned(family, num_ranks=wanted, **changes)


def test_mixtures_of_experts_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="family 'qwen3_moe' can't be cut over several devices"):
        planned("qwen3_moe")


def test_costs_count_what_several_ranks_hold_alike():
    """One KV head, two ranks: twice the KV of a position; two heads: as much as one rank holds."""
    single = model_costs(tiny_config("gemma").to_json_string(use_diff=False), name="gemma", dtype="float32")
    assert single.for_ranks(2).layer_kv_bytes_per_token == tuple(2 * n for n in single.layer_kv_bytes_per_token)
    pair = model_costs(tiny_config("llama").to_json_string(use_diff=False), name="llama", dtype="float32")
    assert pair.for_ranks(2) == pair
