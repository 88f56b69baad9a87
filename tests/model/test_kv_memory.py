"""Reserved KV blocks take memory only as they are written."""

import psutil
import torch

from shardwright.model.kv_cache import KvShape, make_layer_cache

MIB = 1 << 20


def test_blocks_take_no_memory_before_they_are_written():
    """Also right after memory of the same size was given back, which an allocator would hand out again and clear."""
    process = psutil.Process()
    freed = [torch.ones(24 * MIB, dtype=torch.uint8) for _ in range(8)]
    freed.clear()
    before = process.memory_info().rss
    shape = KvShape(heads=4, key_dim=64, value_dim=64)  # 12 MiB of K and 12 of V a layer, as a small model has
    caches = [
        make_layer_cache(shape, num_blocks=1536, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
        for _ in range(16)
    ]
    assert sum(cache.num_bytes for cache in caches) == 384 * MIB
    assert process.memory_info().rss - before < 32 * MIB
    caches[0].keys[5] = 1.0
    assert caches[0].keys[5].float().sum() == 4 * 64
    assert not caches[0].keys[6].any()
